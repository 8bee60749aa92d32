"""Int4 against NumPy, and against a Dense of the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxserve import mesh as meshes
from jaxserve import ops
from jaxserve.quant.dense import Dense
from jaxserve.quant.int4 import Int4, group_of, nearest, quantize
from pallas_kernels import skinny_matmul_reference
from pallas_kernels.int4_mma import int4_untile


def random_nibbles(D, out, group, seed=0):
    """q, scale, zero of a random matrix, and the matrix in float64."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (D, *out)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.03, (D // group, *out)).astype(np.float32)
    zero = rng.integers(0, 17, (D // group, *out)).astype(np.uint8)  # GPTQ's zeros reach 16
    matrix = np.empty((D, *out))
    for k in range(D):
        matrix[k] = (q[k].astype(int) - zero[k // group]) * scale[k // group].astype(np.float64)
    return q, scale, zero, matrix


@pytest.mark.parametrize("group", [16, 32, 64, 128, 576])
@pytest.mark.parametrize("out", [(3,), (2, 5), (2, 4, 8)])
def test_product(group, out):
    q, scale, zero, matrix = random_nibbles(1152, out, group)
    x = np.random.default_rng(1).normal(size=(2, 3, 1152)).astype(np.float32)
    bias = np.arange(np.prod(out), dtype=np.float32).reshape(out)
    axes = (None,) * (1 + len(out))
    held = Int4(ops.int4_pack(jnp.asarray(q), group=group), jnp.asarray(scale), jnp.asarray(zero), bias, group, axes)
    with meshes.on(meshes.make_mesh(1)):
        found = jax.jit(Int4.dot)(held, x)
    np.testing.assert_allclose(found, np.tensordot(x, matrix, 1) + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [(None, "tp"), ("tp", None), (None, None, "tp"), (None, "tp", None)], ids=str)
def test_split(axes):
    """Columns or rows on two devices: what one has."""
    out = (4, 6)[: len(axes) - 1]
    q, scale, zero, matrix = random_nibbles(256, out, 64)
    x = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
    mesh = meshes.make_mesh(2)
    where = NamedSharding(mesh, P(*axes))
    arrays = (jax.device_put(a, where) for a in (ops.int4_pack(jnp.asarray(q), group=64), scale, zero))
    with meshes.on(mesh):
        found = jax.jit(Int4.dot)(Int4(*arrays, group=64, axes=axes), x)
    np.testing.assert_allclose(found, np.tensordot(x, matrix, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "out, axes, around",
    [((2, 3, 16), (None, None, None, None), {"norm"}), ((2, 3, 16), (None, "tp", None, None), {"norm", "bias"}),
     ((32,), ("tp", None), {"residual"}), ((2, 64), (None, None, "tp"), {"norm", "gated"})],
)  # fmt: skip
def test_fused(monkeypatch, out, axes, around):
    """One kernel (its definition) with what stands around it, of the tiles that a GPU has, by one device and by two."""

    def definition(x, tiles, scale, zero, *, group, norm, eps, gated, residual):
        q = int4_untile(tiles).reshape(-1, group, scale.shape[1]).astype(jnp.float32)
        weight = ((q - zero[:, None]) * scale[:, None]).reshape(-1, scale.shape[1])
        weight = weight.reshape(len(weight), 2, -1) if gated else weight
        added = residual if residual is None else jnp.broadcast_to(residual, (len(x), residual.shape[-1]))
        return skinny_matmul_reference(x, weight, norm=norm, eps=eps, gated=gated, residual=added)

    monkeypatch.setattr(ops, "kernels", lambda: True)
    monkeypatch.setattr(ops, "int4_fuses", lambda x, scale: True)
    monkeypatch.setattr(ops.pk, "int4_few", definition)
    q, scale, zero, matrix = random_nibbles(256, out, 64)
    rng, mesh = np.random.default_rng(1), meshes.make_mesh(2 if "tp" in axes else 1)
    x, norm, residual = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 256), 256, (3, *out)))
    with meshes.on(mesh):
        arrays = ops.int4_pack(jnp.asarray(q), group=64), jnp.asarray(scale), jnp.asarray(zero)
        held = Int4(*arrays, residual[0] if "bias" in around else None, group=64, axes=axes)
        more = {"norm": norm if "norm" in around else None, "eps": 1e-3, "gated": "gated" in around}
        more["residual"] = residual if "residual" in around else None
        found = jax.jit(lambda held, x: held.fused(x, **more))(held, x)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * norm if "norm" in around else x
    want = np.tensordot(x, matrix, 1)
    if "gated" in around:
        want = want[:, 0] / (1 + np.exp(-want[:, 0])) * want[:, 1]
    want = want + residual if "residual" in around else want + residual[0] if "bias" in around else want
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [(None, None, None), (None, None, "tp"), ("tp", None, None)], ids=str)
def test_gated(monkeypatch, axes):
    """SiLU and product as the kernel's end, where a device has all inputs of its outputs."""

    def definition(x, tiles, scale, zero, *, group, gated):
        assert gated
        weight = (int4_untile(tiles).reshape(-1, group, scale.shape[1]).astype(jnp.float32) - zero[:, None]) * scale[
            :, None
        ]
        weight = weight.reshape(x.shape[1], 2, -1).astype(x.dtype)
        return skinny_matmul_reference(x, weight, norm=None, eps=0.0, gated=True, residual=None)

    monkeypatch.setattr(ops, "kernels", lambda: True)
    monkeypatch.setattr(ops.pk, "int4_matmul", definition)
    q, scale, zero, matrix = random_nibbles(256, (2, 64), 64)
    x = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float16)
    with meshes.on(meshes.make_mesh(2 if "tp" in axes else 1)):
        arrays = ops.int4_pack(jnp.asarray(q), group=64), jnp.asarray(scale), jnp.asarray(zero)
        held = Int4(*arrays, group=64, axes=axes, order=jnp.arange(256)[::-1])
        found = jax.jit(Int4.gated)(held, x)
        assert held.replace(bias=jnp.zeros((2, 64))).gated(x) is None
    if axes[0]:
        assert found is None
        return
    want = np.tensordot(x[:, ::-1].astype(float), matrix, 1)
    want = want[:, 0] / (1 + np.exp(-want[:, 0])) * want[:, 1]
    assert np.linalg.norm(found - want) < 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_types(dtype):
    q, scale, zero, matrix = random_nibbles(128, (4,), 32)
    held = Int4(ops.int4_pack(jnp.asarray(q), group=32), jnp.asarray(scale), jnp.asarray(zero), group=32)
    x = jnp.ones((1, 128), jnp.bfloat16)
    with meshes.on(meshes.make_mesh(1)):
        found = held.dot(x, dtype)
    assert found.dtype == (dtype or jnp.bfloat16)
    np.testing.assert_allclose(found.astype(jnp.float32)[0], matrix.sum(0), rtol=2e-2, atol=2e-2)


def test_rounding():
    """No element is further than half a step from its original; zero stays zero."""
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(128, 3, 5)).astype(np.float32)
    weight[7] = 0
    weight[64:, 0] += 10  # a group that has one sign
    q, scale, zero = (np.asarray(a) for a in nearest(jnp.asarray(weight), 64))
    back = (q.reshape(2, 64, 3, 5).astype(float) - zero[:, None]) * scale[:, None]
    # The zero point is rounded too, which may clip an end of the range by half a step.
    assert (np.abs(back - weight.reshape(2, 64, 3, 5)) <= scale[:, None] * 1.001).all()
    assert np.median(np.abs(back - weight.reshape(2, 64, 3, 5)) / scale[:, None]) < 0.3
    assert not back.reshape(128, 3, 5)[7].any()
    dense = Dense(jnp.asarray(weight), jnp.ones((3, 5)))
    with meshes.on(meshes.make_mesh(1)):
        found = quantize(dense, 64).dot(jnp.ones((1, 128)))
    np.testing.assert_allclose(found[0], back.sum((0, 1)) + 1, rtol=1e-4, atol=1e-4)


def test_groups():
    assert [group_of(*case) for case in ((128, 4096), (64, 576), (576, 576), (11008, 11008), (32, 96), (128, 192))] == [
        128, 64, 64, 128, 32, 64,
    ]  # fmt: skip
