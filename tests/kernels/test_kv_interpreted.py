"""The kernels for quantized pages in Triton's interpreter against the definitions, as test_interpreted.py."""

import jax.numpy as jnp
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
from tests.kernels.cases import Case, quantized
from tests.kernels.test_interpreted import interpreter, tuning  # noqa: F401  the whole module is skipped with it

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
@pytest.mark.parametrize("heads, window, dtype", [((1, 3, 80), None, np.float16), ((1, 2, 16), 20, np.float32)])
def test_prefill(heads, window, dtype, kind):
    kv_heads, group, head_dim = heads
    case = Case([5, 60, 0, 33, 40], [5, 9, 0, 1, 6], page_size=16, kv_heads=kv_heads, group=group,
                head_dim=head_dim, dtype=dtype, padding=7, window=window)  # fmt: skip
    args = (jnp.asarray(case.q), *quantized(case, kind), 1, *case.rows())
    close(
        paged_prefill(*args, scale=0.2, window=window), paged_prefill_reference(*args, scale=0.2, window=window), dtype
    )


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
