"""Products with norm, SiLU and residual in one kernel: a model by them against the same model by XLA's products."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import checkpoint, ops, weights
from jaxserve import mesh as meshes
from jaxserve.cache import PagedKV, Spans
from jaxserve.models import decoder
from jaxserve.models.config import from_hf
from pallas_kernels import skinny_matmul_reference
from scripts import tiny_checkpoint
from tests.kernels.emulated import Launcher, on_the_host
from tests.kernels.test_skinny_matmul import interpreted

kernel = importlib.import_module("pallas_kernels.skinny_matmul")
# Qwen3's norms of queries and keys; sizes that two devices can share and the kernel takes.
HF = tiny_checkpoint.config("Qwen3ForCausalLM", num_key_value_heads=4, num_attention_heads=8, intermediate_size=128)
ROWS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, HF)
    return folder


@pytest.fixture
def one_kernel(monkeypatch):
    """Every product is `ops.fused_matmul`, as the definition has it; the list of the weights' shapes."""
    seen = []

    def multiply(x, weight, **around):
        seen.append(weight.shape)
        return skinny_matmul_reference(x, weight, **around)

    monkeypatch.setattr(ops, "fuses", lambda x, weight, axes, gated: True)
    monkeypatch.setattr(ops.pk, "skinny_matmul", multiply)
    monkeypatch.setattr(kernel, "cores", lambda: 2)
    decoder.block.clear_cache()  # it knows nothing of the patches
    yield seen
    decoder.block.clear_cache()


def hidden(folder, tp=1, dtype=jnp.bfloat16, layers=2):
    """The final hidden states of a few rows with one token each, the first of a request."""
    cfg, mesh = from_hf(HF | {"num_hidden_layers": layers}), meshes.make_mesh(tp)
    with checkpoint.open(folder) as file, meshes.on(mesh):
        params = weights.load(file, cfg, mesh, dtype)
        cache = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), PagedKV.shape(cfg, 4, 4, mesh, jnp.dtype(dtype))
        )
        start, count = jnp.zeros(ROWS, jnp.int32), jnp.ones(ROWS, jnp.int32)
        spans = Spans.locate(ROWS, start, count, jnp.arange(1, ROWS + 1, dtype=jnp.int32)[:, None], count)
        out, _ = decoder.forward(cfg, params, cache, jnp.asarray([5, 40, 77], jnp.int32), spans)
        return np.asarray(out, np.float32)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_two_ways_are_equal(folder, one_kernel, monkeypatch, tp):
    got = hidden(folder, tp, jnp.float32)
    qkv, o, gate_up, down = (64, 256 // tp), (128 // tp, 64), (64, 2, 128 // tp), (128 // tp, 64)
    assert one_kernel == [qkv, o, gate_up, down]  # traced once
    monkeypatch.undo()
    decoder.block.clear_cache()
    np.testing.assert_allclose(got, hidden(folder, tp, jnp.float32), rtol=1e-4, atol=1e-4)


@interpreted
def test_the_kernel_in_a_model(folder, one_kernel, monkeypatch):
    on_the_host(monkeypatch)
    monkeypatch.setattr(kernel, "triton_call", Launcher(monkeypatch))
    monkeypatch.setattr(ops.pk, "skinny_matmul", kernel.skinny_matmul)
    monkeypatch.setattr(ops, "_split", lambda function, ins, outs: function)  # the interpreter wants arrays
    with jax.disable_jit():
        got = hidden(folder, layers=1)
    monkeypatch.undo()
    want = hidden(folder, layers=1)
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


@pytest.mark.parametrize(
    "tokens, gated, dtype, fused",
    [(4, False, "bfloat16", True), (5, False, "bfloat16", False), (16, True, "float16", True),
     (17, True, "float16", False), (1, False, "float32", False)],
)  # fmt: skip
def test_where_it_is_used(monkeypatch, tokens, gated, dtype, fused):
    monkeypatch.setattr(ops, "kernels", lambda: True)
    x, weight = jnp.zeros((tokens, 64), dtype), jnp.zeros((64, 2, 128) if gated else (64, 128), dtype)
    with meshes.on(meshes.make_mesh(2)):
        axes = (None, None, "tp")[-weight.ndim :]
        assert ops.fuses(x, weight, axes, gated) == fused
        assert not ops.fuses(x, weight[..., :64], axes, gated)  # half of 64 outputs are too few
        assert not ops.fuses(x, weight.astype("float32"), axes, gated)


@pytest.mark.parametrize("name, changes, fused", [
    ("Qwen3ForCausalLM", HF, True),
    ("Qwen2ForCausalLM", {}, False),  # a bias
    ("MixtralForCausalLM", {}, False),
])  # fmt: skip
def test_whether_all_products_are_kernels(monkeypatch, name, changes, fused):
    monkeypatch.setattr(ops, "kernels", lambda: True)
    hf, mesh = tiny_checkpoint.config(name) | changes, meshes.make_mesh(1)
    cfg = from_hf(hf)
    with meshes.on(mesh):
        params = weights.shapes(cfg, mesh, set(), jnp.bfloat16)
        assert [decoder.fuses(params, tokens) for tokens in (1, 4, 5)] == [fused, fused, False]
        assert not decoder.fuses(weights.shapes(cfg, mesh, set(), jnp.float32), 1)
