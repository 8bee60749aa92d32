"""The Triton kernels, wrappers included, in Triton's interpreter against the definitions: `TRITON_INTERPRET=1 pytest`.

Needs triton but no GPU; the interpreter knows no bfloat16.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    kv_write,
    kv_write_reference,
    paged_decode,
    paged_decode_reference,
    paged_prefill,
    paged_prefill_reference,
    pieces,
    rope_kv_write,
    rope_kv_write_reference,
    triton_call,
    tuning,
)
from tests.kernels.cases import Case
from tests.kernels.emulated import on_the_host

if triton_call.MISSING or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)

SIZES = {"block": 32, "warps": 4, "stages": 1, "smallest": 64, "programs": 12, "rows": 16}


class Memory:
    """A NumPy array as the interpreter wants it."""

    def __init__(self, array):
        self.array = array
        self.dtype = {"float16": "fp16", "float32": "fp32", "int32": "i32", "uint8": "u8"}[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


def run(kernel, *inputs, out, grid, in_place=(), warps, stages, registers=None, **constants):
    """`triton_call` by the interpreter; what a kernel leaves unwritten is NaN; what it does not return stays."""
    before = inputs
    inputs = [x if isinstance(x, int) else Memory(np.array(x)) for x in inputs]
    junk = {"f": np.nan, "i": -(2**30), "u": 171}
    outputs = [Memory(np.full(x.shape, junk[x.dtype.kind], x.dtype)) for x in out]
    kernel[grid](*inputs, *outputs, **constants)
    for i, (x, old) in enumerate(zip(inputs, before, strict=True)):
        if i not in in_place and not isinstance(x, int):
            np.testing.assert_array_equal(x.array, old)
    return tuple(jnp.asarray(x.array) for x in [*outputs, *(inputs[i] for i in in_place)])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    on_the_host(monkeypatch)
    for function in (paged_decode, paged_prefill, kv_write, rope_kv_write):
        monkeypatch.setitem(function.__globals__, "triton_call", run)
    for module in ("hopper_prefill", "pieces", "tiles"):
        monkeypatch.setattr(f"pallas_kernels.{module}.triton_call", run)
    monkeypatch.setattr(tuning, "lookup", lambda *_: SIZES)
    monkeypatch.setitem(paged_prefill.__globals__, "hopper", lambda *_: False)
    with jax.numpy_dtype_promotion("strict"):
        yield


def close(got, expected, dtype):
    assert got.dtype == expected.dtype
    tolerance = 1e-5 if dtype == np.float32 else 4e-3
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("heads", [(1, 1, 64), (2, 3, 80), (2, 20, 16)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode(page_size, heads, window, dtype):
    kv_heads, group, head_dim = heads
    lengths = [5, 300, 0, 128, 1, 65]
    case = Case(lengths, [min(n, 1) for n in lengths], page_size=page_size, kv_heads=kv_heads, group=group,
                head_dim=head_dim, dtype=dtype, padding=1, window=window)  # fmt: skip
    args = (case.q, case.k, case.v, 1, case.pages, case.length)
    args = [x if isinstance(x, int) else jnp.asarray(x) for x in args]
    close(paged_decode(*args, scale=0.2, window=window), paged_decode_reference(*args, scale=0.2, window=window), dtype)


@pytest.mark.parametrize(
    "lengths, window, wanted, most",
    [
        ([520] * 16, None, 33, 32),  # two pieces each, and not three of which the last is short
        ([500] * 7 + [32700] + [500] * 8, None, 33, 33),
        ([520] * 40, None, 33, 40),  # more rows than pieces
        ([500] * 30 + [32700], None, 33, 64),
        ([7, 0, 3000, 1, 64, 65], 700, 9, 9),
        ([5], None, 33, 1),
        ([32700], None, 280, 64),  # more would take longer to add up
    ],
)
@pytest.mark.parametrize("page_size, block", [(64, 64), (16, 64), (128, 32), (48, 32)])
def test_cut(lengths, window, wanted, most, page_size, block):
    """Every visible key is in one piece, no more pieces are made than asked for where that can be, and the lists of
    pages are right."""
    R, heads, size = len(lengths), 3, pieces.pages_listed(page_size, block)
    pages = np.random.default_rng(0).permutation(R * 2048).reshape(R, 2048).astype(np.int32)
    arrays = [jnp.asarray(x, jnp.int32) for x in (lengths, np.arange(R), pages)]
    work = np.asarray(pieces.cut(*arrays, window, page_size, block, 128, wanted, wanted + R, heads))
    assert not work[(wanted + R) * (8 + size) :].any()
    work = work[: (wanted + R) * (8 + size)].reshape(wanted + R, 8 + size)
    used = work[work[:, 0] >= 0]
    assert len(used) <= most
    for row, length in enumerate(lengths):
        mine = used[used[:, 0] == row]
        oldest = max(length - window, 0) if window else 0
        assert (mine[:, 4] == oldest).all()
        assert (mine[:, 6] == len(mine)).all()
        assert (mine[:, 5] == np.flatnonzero(used[:, 0] == row)[0]).all()
        assert mine[0, 2] == oldest // block * block
        assert mine[-1, 3] == length
        assert (mine[1:, 2] == mine[:-1, 3]).all()
        assert (mine[:, 2] % block == 0).all()
        for piece in mine:
            there = range(piece[2] // page_size, max(piece[3] - 1, piece[2]) // page_size + 1)[:size]
            assert (piece[8 : 8 + len(there)] == pages[row, there]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("window", [None, 1, 50])
@pytest.mark.parametrize("heads", [(1, 1, 64), (2, 3, 80)])
@pytest.mark.parametrize(
    "rows", [([100, 7, 0, 90, 16, 1], [100, 1, 0, 33, 16, 1], 7), ([9], [9], 0), ([40, 30], [1, 1], 30)]
)
def test_prefill(rows, heads, window, dtype):
    kv_heads, group, head_dim = heads
    lengths, new, padding = rows
    case = Case(lengths, new, padding=padding, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype,
                window=window)  # fmt: skip
    args = (jnp.asarray(case.q), jnp.asarray(case.k), jnp.asarray(case.v), 1, *case.rows())
    close(
        paged_prefill(*args, scale=0.2, window=window), paged_prefill_reference(*args, scale=0.2, window=window), dtype
    )


@pytest.mark.parametrize(
    "count, start, padding",
    [([100, 7, 0, 90, 16, 1], [0, 3, 0, 57, 900, 5], 70), ([1, 1], [4, 9], 0), ([2] * 300, [5] * 300, 1)],
)
def test_tiles(count, start, padding):
    """Every token of the rows of several, and of the padding, is in one tile; the costly ones come first."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    from pallas_kernels import hopper_prefill

    first = np.cumsum(count) - count
    tokens = sum(count) + padding
    arrays = (jnp.asarray(x, jnp.int32) for x in (first, count, start))
    number, *work = np.asarray(hopper_prefill._work(*arrays, tokens, 16))
    work = np.array(work)[: number[0]]
    cost = work[:, 6]
    assert (np.diff(cost) <= 0).all()
    assert (cost > 0).all()
    seen = np.zeros(tokens, int)
    for row, token, length, position, keys, in_row in work[:, :6]:
        seen[token : token + length] += 1
        if row < 0:
            assert token >= sum(count)
            assert (keys, in_row) == (1, 0)
        else:
            assert 0 <= token - first[row] <= count[row] - length
            assert position == start[row] + token - first[row]
            assert (keys, in_row) == (position + length, start[row] + count[row])
    single = np.repeat(np.equal(count, 1), count)
    np.testing.assert_array_equal(seen, np.append(~single, np.ones(padding)))


@pytest.mark.parametrize("shape", [(1, 2, 8), (7, 3, 80)])
def test_write(shape):
    tokens, kv_heads, head_dim = shape
    random = np.random.default_rng(0)
    pools = random.standard_normal((2, 3, 5, 4, kv_heads, head_dim)).astype(np.float16)
    x = random.standard_normal((2, *shape)).astype(np.float16)
    slot = random.permutation(np.arange(4, 20))[:tokens].astype(np.int32)
    args = (*jnp.asarray(pools), *jnp.asarray(x), 2, jnp.asarray(slot))
    for got, expected in zip(kv_write(*args), kv_write_reference(*args), strict=True):
        np.testing.assert_array_equal(got[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 2, 1, 16), (7, 3, 4, 80)])
def test_rope_and_write(shape, dtype, norms):
    tokens, kv_heads, group, head_dim = shape
    random = np.random.default_rng(0)
    pools = random.standard_normal((2, 3, 5, 4, kv_heads, head_dim)).astype(dtype)
    qkv = random.standard_normal((tokens, kv_heads, group + 2, head_dim)).astype(dtype)
    angle = random.uniform(0, 100, (tokens, head_dim // 2)).astype(np.float32)
    slot = random.permutation(np.arange(4, 20))[:tokens].astype(np.int32)
    args = (*jnp.asarray(pools), *map(jnp.asarray, (qkv, np.cos(angle), np.sin(angle))), 2, jnp.asarray(slot))
    weights = dict(zip(("q_norm", "k_norm"), jnp.asarray(random.standard_normal((2, head_dim)), dtype), strict=True))
    options = {**weights, "eps": 1e-5} if norms else {}
    got, expected = rope_kv_write(*args, **options), rope_kv_write_reference(*args, **options)
    close(got[0], expected[0], dtype)
    for new, old in zip(got[1:], expected[1:], strict=True):
        close(new[:, 1:], old[:, 1:], dtype)
