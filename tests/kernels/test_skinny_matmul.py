"""Products of few tokens: the definition against NumPy, the kernel in Triton's interpreter, and on a GPU."""

import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call
from tests.kernels.emulated import close, emulate

module = importlib.import_module("pallas_kernels.skinny_matmul")
interpreted = pytest.mark.skipif(
    bool(triton_call.MISSING) or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)
EPS = 1e-3


def case(T, D, F, options, dtype, seed=0):
    """Arguments: x, weight, and those of `options` (letters: n norm, r residual, g gated)."""
    random = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * random.standard_normal(shape), dtype)

    x, weight = draw(T, D, scale=2), draw(*((D, 2, F) if "g" in options else (D, F)), scale=D**-0.5)
    more = {"gated": True} if "g" in options else {}
    if "n" in options:
        more |= {"norm": 1 + draw(D, scale=0.3), "eps": EPS}
    if "r" in options:
        more["residual"] = draw(T, F)
    return x, weight, more


def expected(x, weight, *, norm=None, eps=0.0, residual=None, gated=False):
    x, weight = (np.asarray(a, np.float64) for a in (x, weight))
    if norm is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(norm, np.float64)
    y = np.tensordot(x, weight, 1)
    if gated:
        y = y[:, 0] / (1 + np.exp(-y[:, 0])) * y[:, 1]
    return y if residual is None else y + np.asarray(residual, np.float64)


@pytest.mark.parametrize("options", ["", "n", "r", "ng", "nr", "gr"])
def test_definition(options):
    x, weight, more = case(5, 96, 64, options, jnp.bfloat16)
    got = module.skinny_matmul_reference(x, weight, **more)
    assert got.dtype == x.dtype
    close(got, expected(x, weight, **more), 1e-2)


@pytest.mark.parametrize(
    "T, D, F, gated, dtype",
    [(33, 64, 64, False, jnp.bfloat16), (1, 48, 64, False, jnp.bfloat16), (1, 64, 96, False, jnp.bfloat16),
     (1, 64, 64, False, jnp.float32)],
)  # fmt: skip
def test_refused(T, D, F, gated, dtype):
    with pytest.raises(ValueError, match="skinny_matmul takes"):
        module.skinny_matmul(jnp.zeros((T, D), dtype), jnp.zeros((D, F), dtype), gated=gated)


@pytest.fixture
def assembly(monkeypatch):
    return emulate(monkeypatch, module)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "T, D, F, options, how",
    [
        (1, 32, 64, "", {"split": 1}),
        (3, 128, 64, "n", {"warps": 1, "split": 1}),  # several turns
        (8, 128, 128, "r", {"warps": 2, "ahead": 2, "split": 1}),
        (16, 160, 64, "nr", {"warps": 2, "split": 1}),  # 5 units: the warps' shares are not alike
        (9, 160, 128, "nr", {"warps": 1, "split": 5}),
        (9, 640, 64, "n", {"warps": 4, "split": 2}),
        (17, 96, 64, "g", {"warps": 4, "split": 1}),  # a warp has nothing
        (32, 512, 64, "n", {"warps": 16, "split": 1}),
        (3, 192, 64, "ngr", {"warps": 1, "ahead": 2, "split": 3}),
        (17, 256, 128, "ng", {}),
        (32, 96, 64, "r", {}),
    ],
)
def test_interpreted(assembly, T, D, F, options, how, dtype):
    x, weight, more = case(T, D, F, options, dtype)
    got = module.skinny_matmul.__wrapped__(x, weight, **more, **how)
    assert got.dtype == dtype
    # bfloat16: the interpreter cuts values off, and x times the norm is rounded
    close(got, expected(x, weight, **more), 1.5e-2 if dtype == jnp.bfloat16 else 2e-3)


def test_shares():
    """The parts are alike, and no warp is without work, in the sizes of models."""
    sizes = [(2048, 4096, 0), (2048, 2048, 0), (2048, 8192, 1), (8192, 2048, 0), (576, 1536, 1), (96, 64, 0)]
    for D, F, gated in sizes:
        for T in (1, 16, 32):
            warps, ahead, split = module.shares(T, D, F, gated, 132)
            assert D // 32 % split == 0
            assert warps * ahead <= max(1, D // 32 // split)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "T, D, F, options, dtype",
    [(1, 2048, 4096, "n", jnp.bfloat16), (4, 2048, 2048, "r", jnp.float16), (16, 2048, 8192, "ng", jnp.bfloat16),
     (17, 576, 1536, "ng", jnp.bfloat16), (9, 96, 64, "ngr", jnp.float16)],
)  # fmt: skip
def test_gpu(T, D, F, options, dtype):
    x, weight, more = case(T, D, F, options, dtype)
    got = [module.skinny_matmul(x, weight, **more) for _ in range(3)]
    close(got[0], jax.jit(module.skinny_matmul_reference, static_argnames=("eps", "gated"))(x, weight, **more), 1e-2)
    for again in got[1:]:  # sums in the same order, counters as they were
        np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (got[0], again)))
