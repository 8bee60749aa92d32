"""What does not need a GPU: the package's door, the table of sizes, and rotation with writing."""

import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import lowers

prefill = importlib.import_module("pallas_kernels.paged_prefill")  # the package has the function by that name


def test_not_available_here():
    if jax.default_backend() != "gpu":
        assert "not on a GPU" in pk.available()


def test_a_kernel_without_gpu_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no GPU"):
        tuning.lookup("paged_decode", jnp.bfloat16, 64)


def test_every_device_knows_every_shape(monkeypatch):
    for path in tuning.TUNED.glob("*.json"):
        kind = path.stem.replace("_", " ").upper()
        monkeypatch.setattr(tuning, "device", lambda kind=kind: (kind, 90))
        for kernel, table in json.loads(path.read_text()).items():
            hopper = kernel == "hopper_prefill"  # made for fewer
            for head_dim in (64, 128) if hopper else (64, 80, 96, 128, 256):
                for dtype in (jnp.bfloat16, jnp.float16) if hopper else (jnp.bfloat16, jnp.float16, jnp.float32):
                    assert tuning.lookup(kernel, dtype, head_dim).get("block", 16) >= 16  # the least that tl.dot takes
            if path.stem != "default":
                assert tuning.lookup(kernel, jnp.bfloat16, 64) == table["16x64"]
    with pytest.raises(ValueError, match="16x1024"):
        tuning.lookup("paged_decode", jnp.bfloat16, 1000)


@pytest.fixture
def h200(monkeypatch):
    """As if compiling for an H200."""
    for module in (tuning, prefill):
        monkeypatch.setattr(module, "device", lambda: ("NVIDIA H200", 90))
    lowers.cache_clear()
    yield
    lowers.cache_clear()


def queries(tokens, *heads, dtype=jnp.bfloat16, page=64):
    """Queries and a pool of pages."""
    q = jax.ShapeDtypeStruct((tokens, *heads), dtype)
    return q, jax.ShapeDtypeStruct((1, 9, page, heads[0], heads[2]), dtype)


@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 7, 128), (3, 3, 64)])
def test_the_kernel_for_hopper_lowers(h200, monkeypatch, heads):
    from pallas_kernels import hopper_prefill

    monkeypatch.setattr(hopper_prefill, "cores", lambda: 132)
    assert prefill.hopper(*queries(4096, *heads), None)


def test_the_kernel_for_hopper_lowers_for_a_split_model(h200, monkeypatch):
    """Whoever asks is inside of shard_map then, where arrays have no place on the mesh."""
    from pallas_kernels import hopper_prefill

    monkeypatch.setattr(hopper_prefill, "cores", lambda: 132)
    mesh, found = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,)), []

    def ask(x):
        found.append(prefill.hopper(*queries(4096, 8, 2, 128), None))
        return x

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        spec = jax.sharding.PartitionSpec()
        jax.jit(jax.shard_map(ask, in_specs=spec, out_specs=spec)).trace(jax.ShapeDtypeStruct((), jnp.int32))
    assert found == [True]


def test_mosaic_asks_for_ptxas_once(monkeypatch):
    """A process for each question, with the interpreter lock held, was a third of a cold start's lowering."""
    asked = []
    extension = types.SimpleNamespace(_get_ptxas_isa_version=lambda: asked.append(1) or 90)
    monkeypatch.setitem(sys.modules, "jax._src.lib.mosaic_gpu", types.SimpleNamespace(_mosaic_gpu_ext=extension))
    mosaic._ask_once.__wrapped__()
    assert [extension._get_ptxas_isa_version() for _ in range(3)] == [90] * 3 and asked == [1]
    del extension._get_ptxas_isa_version
    mosaic._ask_once.__wrapped__()  # another Mosaic: nothing happens


def test_what_the_kernel_for_hopper_leaves(h200, monkeypatch):
    monkeypatch.setattr(prefill, "lowers", lambda *_: True)
    assert prefill.hopper(*queries(4096, 8, 2, 128), None)
    assert not prefill.hopper(*queries(4096, 8, 2, 128), 1000)  # a window
    assert not prefill.hopper(*queries(4096, 8, 2, 96), None)
    assert not prefill.hopper(*queries(4096, 8, 2, 128, dtype=jnp.float32), None)
    assert not prefill.hopper(*queries(4096, 8, 2, 128, page=256), None)
    monkeypatch.setattr(prefill, "device", lambda: ("NVIDIA A100-SXM4-80GB", 80))
    assert not prefill.hopper(*queries(4096, 8, 2, 128), None)


def test_without_mosaic_a_warning_says_why(h200, monkeypatch):
    monkeypatch.setitem(sys.modules, "pallas_kernels.hopper_prefill", None)
    monkeypatch.delattr("pallas_kernels.hopper_prefill", raising=False)
    with pytest.warns(UserWarning, match="slower.*hopper_prefill"):
        assert not prefill.hopper(*queries(4096, 8, 2, 128), None)
    assert not prefill.hopper(*queries(8192, 8, 2, 128), None)  # and does so once


@pytest.mark.parametrize("norms", [False, True])
def test_rope_and_write(norms):
    """Planes turned as complex numbers, rows of the pool written one by one."""
    random = np.random.default_rng(0)
    tokens, kv_heads, group, head_dim = 5, 2, 3, 16
    pools = random.standard_normal((2, 3, 4, 8, kv_heads, head_dim)).astype(np.float32)
    qkv = random.standard_normal((tokens, kv_heads, group + 2, head_dim)).astype(np.float32)
    angle = random.uniform(0, 9, (tokens, head_dim // 2)).astype(np.float32)
    weights = random.standard_normal((2, head_dim)).astype(np.float32)
    slot = np.array([9, 30, 11, 8, 25], np.int32)
    options = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-3} if norms else {}
    q, *new = pk.rope_kv_write_reference(
        *map(jnp.asarray, pools), qkv, np.cos(angle), np.sin(angle), 1, slot, **options
    )

    def turned(x, weight):
        if norms:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * weight
        planes = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angle)[:, None, None]
        return np.concatenate([planes.real, planes.imag], -1)

    np.testing.assert_allclose(q, turned(qkv[:, :, :-2], weights[0]), rtol=1e-5, atol=1e-5)
    keys, values = turned(qkv[:, :, -2:-1], weights[1])[:, :, 0], qkv[:, :, -1]
    for pool, after, written in zip(pools, new, (keys, values), strict=True):
        pool[1].reshape(32, kv_heads, head_dim)[slot] = written
        np.testing.assert_allclose(after, pool, rtol=1e-5, atol=1e-5)
