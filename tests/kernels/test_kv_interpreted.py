"""The kernels for quantized pages in Triton's interpreter against the definitions, as test_interpreted.py."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import (
    QuantizedPool,
    paged_decode,
    paged_decode_reference,
    paged_prefill,
    paged_prefill_reference,
    rope_kv_write,
    rope_kv_write_reference,
)
from pallas_kernels.kv_quant import unit, values
from pallas_kernels.triton_call import jit, tl
from tests.kernels import asm
from tests.kernels.cases import Case, quantized
from tests.kernels.test_interpreted import SIZES, Memory, interpreter, tuning  # noqa: F401  the module is skipped with it

KINDS = ("int8", "int4", "fp8")


def close(got, expected, dtype):
    assert got.dtype == expected.dtype
    tolerance = 2e-5 if dtype == np.float32 else 5e-3
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "heads, window, page_size, dtype", [((1, 1, 64), None, 16, np.float32), ((2, 3, 80), 30, 64, np.float16)]
)
def test_decode(heads, window, page_size, dtype, kind):
    kv_heads, group, head_dim = heads
    lengths = [5, 150, 0, 64, 1]
    case = Case(lengths, [min(n, 1) for n in lengths], page_size=page_size, kv_heads=kv_heads, group=group,
                head_dim=head_dim, dtype=dtype, padding=1, window=window)  # fmt: skip
    args = (case.q, *quantized(case, kind), 1, *map(jnp.asarray, (case.pages, case.length)))
    close(paged_decode(*args, scale=0.2, window=window), paged_decode_reference(*args, scale=0.2, window=window), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "heads, window, dtype",
    [((1, 3, 80), None, np.float16), ((1, 2, 16), 20, np.float32), ((1, 17, 16), None, np.float16)],
)
def test_prefill(heads, window, dtype, kind):
    kv_heads, group, head_dim = heads
    case = Case([5, 60, 0, 33, 40], [5, 9, 0, 1, 6], page_size=16, kv_heads=kv_heads, group=group,
                head_dim=head_dim, dtype=dtype, padding=7, window=window)  # fmt: skip
    args = (jnp.asarray(case.q), *quantized(case, kind), 1, *case.rows())
    close(
        paged_prefill(*args, scale=0.2, window=window), paged_prefill_reference(*args, scale=0.2, window=window), dtype
    )


@pytest.mark.parametrize(
    "kind, heads, page_size, dtype",
    [("int4", (2, 2), 16, np.float16), ("int8", (1, 1), 64, np.float32), ("fp8", (1, 9), 32, np.float16)],
)
def test_few_tokens(kind, heads, page_size, dtype, monkeypatch):
    """Prompts in tiles by the kernel that decodes: whole rows, several pieces, and padding."""
    monkeypatch.setattr(tuning, "lookup", lambda *_: {**SIZES, "tokens": 99})
    case = Case([2, 150, 0, 70, 1], [2, 1, 0, 6, 1], page_size=page_size, kv_heads=heads[0], group=heads[1],
                head_dim=64, dtype=dtype, padding=2)  # fmt: skip
    args = (jnp.asarray(case.q), *quantized(case, kind), 1, *case.rows())
    close(paged_prefill(*args, scale=0.2), paged_prefill_reference(*args, scale=0.2), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens, kv_heads, group, head_dim, norms", [(1, 2, 1, 16, False), (7, 3, 4, 80, True)])
def test_rope_and_write(tokens, kv_heads, group, head_dim, norms, kind):
    random = np.random.default_rng(0)
    case = Case([20], [20], kv_heads=kv_heads, head_dim=head_dim, page_size=4, dtype=np.float16)
    case.k[np.isnan(case.k)] = case.v[np.isnan(case.v)] = 0
    pools = quantized(case, kind)
    qkv = random.standard_normal((tokens, kv_heads, group + 2, head_dim)).astype(np.float16)
    angle = random.uniform(0, 100, (tokens, head_dim // 2)).astype(np.float32)
    slot = random.permutation(np.arange(4, 20))[:tokens].astype(np.int32)
    args = (*pools, *map(jnp.asarray, (qkv, np.cos(angle), np.sin(angle))), 1, jnp.asarray(slot))
    weights = dict(zip(("q_norm", "k_norm"), jnp.asarray(random.standard_normal((2, head_dim)), np.float16)))
    options = {**weights, "eps": 1e-5} if norms else {}
    (q, *new), (expected_q, *expected) = rope_kv_write(*args, **options), rope_kv_write_reference(*args, **options)
    close(q, expected_q, np.float16)
    for pool, other in zip(new, expected):
        assert isinstance(pool, QuantizedPool)
        for got, want in ((pool.parameters, other.parameters), (pool.codes, other.codes)):
            got, want = np.asarray(got)[:, 1:], np.asarray(want)[:, 1:]  # page 0 is junk
            np.testing.assert_array_equal(got[0], want[0])  # another layer
            assert (got == want).mean() > 0.98  # ties may go the other way


def towards_zero(a, b, sums):
    """a @ b + sums as tensor cores have it: sixteen products and the sum so far at once, rounded towards zero."""
    for k in range(0, a.shape[1], 16):
        exact = sums + a[:, k : k + 16].astype(np.float64) @ b[k : k + 16]
        sums = exact.astype(np.float32)
        sums = np.where(np.abs(sums) > np.abs(exact), np.nextafter(sums, np.float32(0)), sums)
    return sums


@pytest.mark.parametrize("new", [1, 2])
def test_no_error_grows_with_the_keys(new, monkeypatch):
    """Codes are positive: whatever a sum of them loses adds up."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, sums, *_):
        return TensorHandle(towards_zero(a.data, b.data, sums.data), sums.dtype.scalar)

    case = Case([1500], [new], page_size=64, kv_heads=1, group=1, head_dim=64, dtype=np.float16)
    args = (jnp.asarray(case.q), *quantized(case, "int4"), 1, *case.rows())
    expected = paged_prefill_reference(*args, scale=0.1)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(tuning, "lookup", lambda *_: {"block": 32, "warps": 1, "stages": 1, "smallest": 2048,
                                                      "programs": 1, "rows": 16})  # fmt: skip
    got = paged_prefill(*args, scale=0.1)
    assert abs(np.mean(np.asarray(got, np.float64) - np.asarray(expected, np.float64))) < 1e-4


@jit
def unpack(words_ptr, out_ptr, N: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, N)
    numbers = values(tl.load(words_ptr + at).to(tl.uint16), J, KIND, tl.float16, True)
    tl.store(out_ptr + at, numbers.to(tl.float32) * unit(J, KIND, tl.float16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_instructions_that_unpack(kind, monkeypatch):
    """All words, two at once."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def inline_asm(_, text, kinds, operands, results, is_pure, pack):
        assert pack == 2
        (bits,) = asm.run(text, kinds, [operands[0].data.view(np.uint32)])
        return types.SimpleNamespace(get_result=lambda _: TensorHandle(bits.view(np.float16), results[0].scalar))

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline_asm)
    words = np.arange(1 << 16, dtype=np.int32)
    size = 4 if kind == "int4" else 8
    for j in range(16 // size):
        out = np.zeros(words.shape, np.float32)
        unpack[(1,)](Memory(words), Memory(out), N=len(words), J=j, KIND=kind)
        codes = ((words >> (size * j)) & (2**size - 1)).astype(np.uint8)
        exact = (codes.view(ml_dtypes.float8_e4m3fn) if kind == "fp8" else codes).astype(np.float32)
        number_is = ~np.isnan(exact)  # not that of 127 and 255, which nothing is coded as
        np.testing.assert_array_equal(out[number_is], exact[number_is])
