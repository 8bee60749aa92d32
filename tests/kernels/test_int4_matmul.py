"""int4 matmuls: the tiles against NumPy, instruction by instruction; on a GPU every kernel against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_dequantize, int4_few, int4_matmul_reference, int4_pack, int4_tiles
from pallas_kernels.int4_mma import int4_by_values, int4_untile, int4_values


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
                k = 64 * unit + 32 * half + 16 * step + 2 * column  # two inputs of four, two 8 further on
                for r, e in np.ndindex(4, 2):
                    a[row + 8 * (r % 2), 2 * column + 8 * (r // 2) + e] = (word >> 4 * r >> 16 * e) & 15
                for h, e in np.ndindex(2, 2):
                    b[2 * column + 8 * h + e, row] = x[row, k + 8 * h + e]
            total += a @ b
        out[:, 16 * tile : 16 * tile + 16] = total.T
    np.testing.assert_allclose(out, x @ m.q)


@pytest.fixture
def hopper_int4(monkeypatch):
    """The kernel for an H200 that is not there."""
    module = pytest.importorskip("pallas_kernels.hopper_int4")
    monkeypatch.setattr(module, "cores", lambda: 132)
    return module


SHARES = [(64, 128, 64), (192, 384, 32), (576, 1152, 64), (2048, 2048, 128), (2048, 16384, 128), (4096, 6144, 128)]
SHARES += [(8192, 2048, 128), (11008, 4096, 128), (28672, 8192, 128), (4096, 28672, 32)]


@pytest.mark.parametrize("D, F, group", SHARES)
def test_all_inputs_and_outputs_have_a_block(hopper_int4, D, F, group):
    for T in (1, 9, 17, 64, 100, 256, 300, 1000, 4096, 9000):
        how = hopper_int4.chosen(T, D, F, group)
        assert D % (how.inputs * how.split) == 0 and D // how.split % group == 0
        assert how.tokens % 16 == 0 and how.tokens <= min(256, max(16, 2 * T))
        assert how.split == 1 or D // how.inputs // how.split >= 2


def test_a_core_has_one_block_after_the_other(hopper_int4):
    """So parts of the inputs are worth it only where cores would have nothing to do, or the last ones few."""

    def how(T, D, F):
        found = hopper_int4.chosen(T, D, F, 128)
        return found.tokens, found.split

    assert how(64, 2048, 16384) == (64, 1)  # 128 blocks for 132 cores
    assert how(256, 2048, 16384) == how(4096, 2048, 16384) == (256, 1)
    assert how(320, 2048, 16384) == (160, 1)  # 256 blocks, none of which has tokens that are not there
    assert how(64, 2048, 4096) == (64, 4)
    assert how(64, 8192, 2048) == (64, 8)
    assert how(64, 28672, 9216) == (64, 7)  # 72 blocks: four rounds of a seventh, not one of all


GPU = [(576, 960, 64), (2048, 2048, 128), (512, 256, 32), (64, 128, 64), (192, 128, 32), (4096, 256, 128)]
ALL = (1, 9, 64, 300)  # tokens, for each of them
# Every shape for a few numbers of tokens, every number for one, float16 for two: compiling takes all the time.
CASES = [(D, F, group, T, jnp.bfloat16) for D, F, group in GPU for T in ALL]
CASES += [(512, 256, 32, T, jnp.bfloat16) for T in (7, 8, 16, 33, 100, 256)]
CASES += [(D, F, group, T, jnp.float16) for D, F, group in (GPU[1], GPU[4]) for T in ALL]


@functools.cache
def matrix(D, F, group, dtype):
    """A matrix, and its nibbles as kernels read them."""
    m = Matrix(D, F, group, dtype)
    return m, jax.jit(int4_tiles)(m.q)


def check(way, D, F, group, T, dtype, out=jnp.float32):
    """A way's results are those of the values, up to the rounding of values and results."""
    m, tiles = matrix(D, F, group, jnp.bfloat16 if dtype == jnp.bfloat16 and D < 1000 else np.float16)
    x = m.tokens(T, dtype)
    found = jax.jit(functools.partial(way, group=group, dtype=out))(x, tiles, m.scale, m.zero)
    assert found.dtype == out
    want = np.asarray(x, np.float64) @ m.values
    error = np.linalg.norm(np.asarray(found, np.float64) - want) / np.linalg.norm(want)
    assert error < (5e-3 if dtype == jnp.bfloat16 else 1e-3), way


@pytest.mark.gpu
@pytest.mark.parametrize(
    "D, F, group, dtype", [(*GPU[0], jnp.bfloat16), (*GPU[1], jnp.float16), (*GPU[4], jnp.bfloat16)]
)
def test_values(D, F, group, dtype):
    m = Matrix(D, F, group)
    tiles = jax.jit(int4_tiles)(m.q)
    want = jnp.asarray(m.values, jnp.float32).astype(dtype)
    np.testing.assert_array_equal(int4_values(tiles, m.scale, m.zero, group=group, dtype=dtype).T, want)


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, group, T, dtype", CASES)
def test_kernels(D, F, group, T, dtype):
    """Each way that takes so many tokens, as it chooses itself."""
    ways = [int4_few] if T <= 64 else [functools.partial(int4_by_values, at_once=D * max(256, F))]
    if F % 128 == 0 and T > 1 and hopper():
        from pallas_kernels.hopper_int4 import int4_wgmma

        ways.append(int4_wgmma)
    for way in ways:
        check(way, D, F, group, T, dtype)
    if T == 9:
        check(ways[0], D, F, group, T, dtype, out=dtype)


def hopper():
    from pallas_kernels.triton_call import device

    return device()[1] == 90


HOW = [  # D, F, group, T, dtype, what is other than what is chosen
    (2048, 2048, 128, 64, jnp.bfloat16, {"split": 1, "tokens": 32, "inputs": 64}),
    (2048, 2048, 128, 16, jnp.float16, {"split": 1}),
    (2048, 2048, 64, 64, jnp.bfloat16, {"workers": 4}),
    (2048, 2048, 128, 300, jnp.bfloat16, {"tokens": 256, "inputs": 64, "split": 1}),
    (2048, 2048, 128, 2000, jnp.bfloat16, {"tokens": 96, "inputs": 128, "split": 1}),  # several blocks a core
    (2048, 2048, 128, 1000, jnp.bfloat16, {"tokens": 256, "inputs": 64, "split": 4}),
    (2048, 2048, 128, 4099, jnp.bfloat16, {}),
    (576, 1152, 64, 200, jnp.bfloat16, {"tokens": 208, "inputs": 64, "split": 1}),  # an odd number of turns
]


@pytest.mark.gpu
@pytest.mark.parametrize("D, F, group, T, dtype, other", HOW)
def test_wgmma(D, F, group, T, dtype, other):
    if not hopper():
        pytest.skip("wgmma is Hopper's")
    from pallas_kernels.hopper_int4 import chosen, int4_wgmma

    how = chosen(T, D, F, group)._replace(**other)
    check(functools.partial(int4_wgmma, how=how), D, F, group, T, dtype, dtype)


GATED = [  # T, D, F of each half, dtype, what is other than what is chosen
    (40, 512, 320, jnp.bfloat16, {"tokens": 32, "split": 1}),
    (64, 2048, 8192, jnp.float16, {}),
    (300, 576, 192, jnp.bfloat16, {"tokens": 96, "split": 1}),
    (1000, 2048, 1024, jnp.bfloat16, {"tokens": 256, "split": 1}),
    (4099, 512, 2048, jnp.bfloat16, {}),
    (16, 2048, 320, jnp.bfloat16, {"split": 1}),
    (64, 512, 5120, jnp.bfloat16, {"split": 1, "workers": 4}),
    (16, 2048, 320, jnp.bfloat16, {"split": 4}),  # by XLA
]


@pytest.mark.gpu
@pytest.mark.parametrize("T, D, F, dtype, other", GATED)
def test_gated(T, D, F, dtype, other):
    if not hopper():
        pytest.skip("wgmma is Hopper's")
    from pallas_kernels.hopper_int4 import chosen, int4_wgmma

    m, tiles = matrix(D, 2 * F, 64, np.float16)
    x, how = m.tokens(T, dtype), chosen(T, D, 2 * F, 64)._replace(**other)
    found = int4_wgmma(x, tiles, m.scale, m.zero, group=64, how=how, gated=True)
    assert found.dtype == dtype and found.shape == (T, F)
    y = np.asarray(x, np.float64) @ m.values
    want = y[:, :F] / (1 + np.exp(-y[:, :F])) * y[:, F:]
    assert np.linalg.norm(np.asarray(found, np.float64) - want) < 1e-2 * np.linalg.norm(want)
    again = int4_wgmma(x, tiles, m.scale, m.zero, group=64, how=how, gated=True)
    np.testing.assert_array_equal(np.asarray(again, np.float32), np.asarray(found, np.float32))
