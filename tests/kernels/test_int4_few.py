"""The int4 kernel for few tokens in Triton's interpreter, its instructions by asm.py, against NumPy; and on a GPU."""

import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_tiles, triton_call
from tests.kernels.emulated import close, emulate
from tests.kernels.test_int4_matmul import Matrix

module = importlib.import_module("pallas_kernels.int4_few")
interpreted = pytest.mark.skipif(
    bool(triton_call.MISSING) or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)
EPS = 1e-3
pack = jax.jit(int4_tiles)


@pytest.fixture
def assembly(monkeypatch):
    return emulate(monkeypatch, module)


def case(T, D, F, group, options, dtype, scale_dtype=np.float16):
    """Arguments, those of `options` (letters: n norm, r residual, b bias, g gated), and the result in float64."""
    gated, random = "g" in options, np.random.default_rng(1)
    m = Matrix(D, F * (1 + gated), group, scale_dtype)
    x = m.tokens(T, dtype)
    y, more = np.asarray(x, np.float64), {"gated": gated}
    if "n" in options:
        more |= {"norm": jnp.asarray(1 + 0.3 * random.standard_normal(D), dtype), "eps": EPS}
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS) * np.asarray(more["norm"], np.float64)
    y = y @ m.values
    if gated:
        y = y[:, :F] / (1 + np.exp(-y[:, :F])) * y[:, F:]
    if "r" in options or "b" in options:
        more["residual"] = jnp.asarray(random.standard_normal((T, F) if "r" in options else F), dtype)
        y = y + np.asarray(more["residual"], np.float64)
    return (x, pack(jnp.asarray(m.q)), m.scale, jnp.asarray(m.zero)), more | {"group": group, "dtype": jnp.float32}, y


@interpreted
@pytest.mark.parametrize(
    "T, D, F, group, options, dtype, how",
    [
        (1, 128, 16, 128, "", jnp.bfloat16, {}),
        (2, 64, 32, 32, "r", jnp.float16, {}),  # half a chunk
        (3, 1024, 80, 128, "nb", jnp.float16, {"warps": 2, "tiles_each": 3}),  # the last program has fewer tiles
        (8, 576, 32, 64, "n", jnp.bfloat16, {"warps": 4}),  # the warps' shares are not alike
        (20, 192, 32, 32, "r", jnp.bfloat16, {}),  # two blocks of tokens
        (7, 512, 48, 32, "ngr", jnp.bfloat16, {"warps": 2, "tiles_each": 4, "stages": 3}),
        (5, 2048, 96, 128, "ngr", jnp.float16, {"warps": 16, "tiles_each": 6, "stages": 2}),
        (16, 384, 96, 64, "ng", jnp.bfloat16, {"warps": 4, "tiles_each": 4}),
    ],
)
def test_interpreted(assembly, T, D, F, group, options, dtype, how):
    arguments, more, want = case(T, D, F, group, options, dtype)
    close(module.int4_few.__wrapped__(*arguments, **more, **how), want, 3e-4)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types(assembly, dtype):
    """Scales and results of the activations' type."""
    arguments, more, want = case(3, 128, 16, 64, "", dtype, dtype)
    found = module.int4_few.__wrapped__(*arguments, **more | {"dtype": None})
    assert found.dtype == dtype
    close(found, want, 1e-2)  # the interpreter cuts bfloat16 off


@interpreted
def test_large_and_small(assembly):
    """A token's size changes nothing, and a few large inputs take nothing from the rest that they would not hide."""
    (x, *rest), more, _ = case(4, 256, 16, 128, "", jnp.bfloat16)
    found = module.int4_few.__wrapped__(x, *rest, **more)
    sizes = jnp.asarray([2.0**100, 2.0**-60, 0, 1], x.dtype)[:, None]
    scaled = module.int4_few.__wrapped__(x * sizes, *rest, **more)
    np.testing.assert_array_equal(scaled, found * sizes.astype(jnp.float32))
    far = module.int4_few.__wrapped__(x.at[0, 7].set(jnp.inf).at[1, 200].set(jnp.nan), *rest, **more)
    assert not np.isfinite(far[:2]).any()
    np.testing.assert_array_equal(far[2:], found[2:])


@interpreted
@pytest.mark.parametrize("sizes, D, group", [((0, 11, 1, 0, 20), 64, 32), ((2, 0, 0, 1), 192, 64), ((40, 3), 128, 128)])
def test_experts(assembly, sizes, D, group):
    E, F, T = len(sizes), 32, sum(sizes)
    m = Matrix(D, E * F, group)
    x = m.tokens(T, jnp.bfloat16)
    words = pack(jnp.asarray(m.q.reshape(D, E, F))).reshape(E * F // 16, D // 64, 128)
    found = module.int4_few.__wrapped__(x, words, m.scale, jnp.asarray(m.zero), jnp.asarray(sizes, jnp.int32),
                                        group=group, dtype=jnp.float32)  # fmt: skip
    matrices = m.values.reshape(D, E, F).swapaxes(0, 1)[np.repeat(np.arange(E), sizes)]
    close(found, np.einsum("td,tdf->tf", np.asarray(x, np.float64), matrices), 3e-4)


def test_shares():
    """They fit, and programs are there at once, in the sizes of models."""
    for T in (1, 4, 8, 16):
        for D, tiles in [(2048, 256), (2048, 128), (2048, 1024), (8192, 128), (4096, 384), (4096, 1792), (576, 60)]:
            warps, each, stages = module.shares(T, D, tiles, 132)
            assert warps * (stages * (1024 + 48) + module.STAGING) <= module.SHARED
            assert -(-tiles // each) <= 132 * 16 // warps or each == 4  # of the largest matrices, several rounds


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "T, D, F, group, options",
    [(1, 2048, 4096, 128, "n"), (8, 2048, 2048, 128, "r"), (2, 2048, 2304, 128, "ng"), (4, 8192, 2048, 64, "r"),
     (16, 576, 1536, 64, "ng"), (3, 1536, 576, 32, "r"), (5, 4096, 1024, 128, "ngr")],
)  # fmt: skip
def test_gpu(T, D, F, group, options, dtype):
    arguments, more, want = case(T, D, F, group, options, dtype)
    found = module.int4_few(*arguments, **more)
    close(found, want, 3e-4)
    np.testing.assert_array_equal(module.int4_few(*arguments, **more), found)
