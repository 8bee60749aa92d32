"""int4 matmuls: the tiles against NumPy, instruction by instruction; on a GPU every kernel against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_dequantize, int4_matmul_reference, int4_pack, int4_tiles
from pallas_kernels.int4_mma import int4_by_values, int4_skinny, int4_untile, int4_values


class Matrix:
    """A random matrix: q [D, F], scale, zero, and its values in float64."""

    def __init__(self, D, F, group, dtype=np.float16):
        rng = np.random.default_rng(D + F)
        self.group, self.q = group, rng.integers(0, 16, (D, F)).astype(np.uint8)
        self.scale = jnp.asarray(rng.uniform(0.005, 0.015, (D // group, F)), dtype)
        self.zero = rng.integers(0, 17, (D // group, F)).astype(np.uint8)
        scale, zero = (np.repeat(np.asarray(a, np.float64), group, 0) for a in (self.scale, self.zero))
        self.values = (self.q - zero) * scale

    def tokens(self, T, dtype):
        return jnp.asarray(np.random.default_rng(T).normal(size=(T, len(self.q))), dtype)


@pytest.mark.parametrize("group", [8, 32, 64, 192])
def test_definition(group):
    m = Matrix(192, 7, group, np.float32)
    packed = int4_pack(jnp.asarray(m.q), group=group)
    found = int4_dequantize(packed, m.scale, m.zero, group=group, dtype=jnp.float32)
    np.testing.assert_allclose(found, m.values, rtol=1e-6)
    x = m.tokens(3, jnp.float32)
    found = int4_matmul_reference(x, packed, m.scale, m.zero, group=group)
    np.testing.assert_allclose(found, np.asarray(x, np.float64) @ m.values, rtol=1e-4, atol=1e-4)


def test_tiles_come_back():
    q = Matrix(128, 96, 64).q
    tiles = int4_tiles(jnp.asarray(q.reshape(128, 2, 3, 16)))
    assert tiles.shape == (2, 3, 1, 2, 128)
    np.testing.assert_array_equal(int4_untile(tiles.reshape(6, 2, 128)), q)


def test_tiles_are_what_mma_wants():
    """The registers of mma.m16n8k16, lane by lane as PTX's specification has them, from the words of the tiles."""
    m, x = Matrix(128, 32, 64), np.random.default_rng(0).normal(size=(8, 128))
    words = np.asarray(int4_tiles(jnp.asarray(m.q))).view(np.uint32)
    out = np.zeros((8, 32))
    for tile in range(2):
        total = np.zeros((16, 8))
        for unit, half, step in np.ndindex(2, 2, 2):
            a, b = np.zeros((16, 16)), np.zeros((16, 8))
            for lane in range(32):
                row, column = divmod(lane, 4)
                word = int(words[tile, unit, 4 * lane + 2 * half + step])
                k = 64 * unit + 32 * half + 8 * column + 4 * step  # four inputs of the lane's eight
                for r, e in np.ndindex(4, 2):
                    a[row + 8 * (r % 2), 2 * column + 8 * (r // 2) + e] = (word >> 4 * r >> 16 * e) & 15
                for h, e in np.ndindex(2, 2):
                    b[2 * column + 8 * h + e, row] = x[row, k + 2 * h + e]
            total += a @ b
        out[:, 16 * tile : 16 * tile + 16] = total.T
    np.testing.assert_allclose(out, x @ m.q)


GPU = [(576, 960, 64), (2048, 2048, 128), (512, 256, 32), (64, 128, 64), (192, 128, 32), (4096, 256, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, group", GPU)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_values(D, F, group, dtype):
    m = Matrix(D, F, group)
    tiles = jax.jit(int4_tiles)(m.q)
    want = jnp.asarray(m.values, jnp.float32).astype(dtype)
    np.testing.assert_array_equal(int4_values(tiles, m.scale, m.zero, group=group, dtype=dtype).T, want)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, group", GPU)
@pytest.mark.parametrize("T", [1, 7, 8, 9, 16, 33, 100, 256, 300])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernels(D, F, group, T, dtype):
    from pallas_kernels.hopper_int4 import int4_wgmma
    from pallas_kernels.triton_call import device

    m = Matrix(D, F, group, jnp.bfloat16 if dtype == jnp.bfloat16 and D < 1000 else np.float16)
    x, tiles = m.tokens(T, dtype), jax.jit(int4_tiles)(m.q)
    packed = jax.jit(functools.partial(int4_pack, group=group))(m.q)
    want = int4_matmul_reference(x, packed, m.scale, m.zero, group=group, dtype=jnp.float32)
    ways = [int4_by_values, functools.partial(int4_by_values, at_once=D * 256)]
    ways += [int4_skinny, functools.partial(int4_skinny, warps=16, ahead=1)] if T <= 64 else []
    if F % 128 == 0 and device()[1] == 90:
        ways += [int4_wgmma, functools.partial(int4_wgmma, split=1, tokens=32, inputs=64)]
    for way in ways:
        found = way(x, tiles, m.scale, m.zero, group=group, dtype=jnp.float32)
        error = np.linalg.norm(found - want) / np.linalg.norm(want)
        assert error < (5e-3 if dtype == jnp.bfloat16 else 1e-3), way
        assert way(x, tiles, m.scale, m.zero, group=group).dtype == dtype
