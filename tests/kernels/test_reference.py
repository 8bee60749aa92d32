"""The definitions against attention written token by token in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import kv_write_reference, paged_decode_reference, paged_prefill_reference
from tests.kernels.cases import Case

WINDOWS = (None, 1, 7, 40)
HEADS = ((1, 1, 64), (2, 3, 16), (4, 2, 80))


@functools.partial(jax.jit, static_argnames=("layer", "scale", "window"))
def decode(q, k, v, pages, length, layer, scale, window):
    return paged_decode_reference(q, k, v, layer, pages, length, scale=scale, window=window)


@functools.partial(jax.jit, static_argnames=("layer", "scale", "window"))
def prefill(q, k, v, rows, layer, scale, window):
    return paged_prefill_reference(q, k, v, layer, *rows, scale=scale, window=window)


def check(got, case, layer, scale, window):
    np.testing.assert_allclose(got, case.expected(layer, scale, window), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_decode(page_size, heads, window):
    kv_heads, group, head_dim = heads
    case = Case([5, 300, 0, 128, 1], [1, 1, 0, 1, 1], page_size=page_size, kv_heads=kv_heads, group=group,
                head_dim=head_dim, window=window)  # fmt: skip
    q = np.zeros((5, *case.q.shape[1:]), np.float32)  # an unused row has a place in q
    q[[0, 1, 3, 4]] = case.q
    got = np.asarray(decode(q, case.k, case.v, case.pages, case.length, 1, 0.2, window))
    assert not got[2].any()
    check(got[[0, 1, 3, 4]], case, 1, 0.2, window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_prefill(heads, window):
    kv_heads, group, head_dim = heads
    case = Case([100, 7, 0, 333, 64, 1, 90], [100, 1, 0, 65, 64, 1, 30], padding=9, kv_heads=kv_heads, group=group,
                head_dim=head_dim, window=window)  # fmt: skip
    check(prefill(case.q, case.k, case.v, case.rows(), 1, 0.2, window), case, 1, 0.2, window)


@settings(max_examples=30)
@given(data=st.data())
def test_prefill_of_any_batch(data):
    """Any mixture of chunks, single tokens and unused rows; few shapes, so that few programs are compiled."""
    tokens, rows = data.draw(st.sampled_from([(8, 3), (160, 5)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows)))
    new = np.diff([0, *cuts])
    lengths = [n + data.draw(st.integers(0, 140 - n)) if n and n < 140 else n for n in new]
    window = data.draw(st.sampled_from([None, 20]))
    case = Case(lengths, new, padding=tokens - cuts[-1], page_size=32, spare=0, seed=tokens, window=window)
    pages = np.zeros((rows, 5), np.int32)
    pages[:, : case.pages.shape[1]] = case.pages
    case.pages = pages
    pool = np.zeros((2, 16, *case.k.shape[2:]), np.float32)
    case.k, case.v = (np.concatenate([x, pool[:, x.shape[1] :]], axis=1) for x in (case.k, case.v))
    check(prefill(case.q, case.k, case.v, case.rows(), 0, 0.3, window), case, 0, 0.3, window)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    case = Case([70, 33], [40, 1], padding=3, dtype=dtype)
    got = prefill(case.q, case.k, case.v, case.rows(), 0, 0.25, None)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), case.expected(0, 0.25), rtol=1e-2, atol=1e-2)


def test_traced_layer():
    case = Case([70, 33], [1, 1])
    run = jax.jit(functools.partial(paged_decode_reference, scale=0.2))
    check(run(case.q, case.k, case.v, jnp.int32(1), case.pages, case.length), case, 1, 0.2, None)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_write(tokens):
    random = np.random.default_rng(tokens)
    k_pool, v_pool = random.standard_normal((2, 3, 5, 4, 2, 8)).astype(np.float32)
    k, v = random.standard_normal((2, tokens, 2, 8)).astype(np.float32)
    slot = random.permutation(np.arange(4, 20))[:tokens].astype(np.int32)
    new_k, new_v = kv_write_reference(jnp.asarray(k_pool), jnp.asarray(v_pool), k, v, 1, slot)
    for old, new, x in ((k_pool, new_k, k), (v_pool, new_v, v)):
        flat = old.reshape(3, 20, 2, 8)
        flat[1, slot] = x
        np.testing.assert_array_equal(np.asarray(new)[:, 1:], flat.reshape(old.shape)[:, 1:])  # page 0 is junk


@pytest.mark.parametrize("tokens", [1, 4])
def test_write_then_attend_copies_no_pool(tokens):
    """Three layers of a decode step on donated pools: the pools stay where they are."""

    def step(k_pool, v_pool, q, slot, pages, length):
        for layer in range(3):
            k_pool, v_pool = kv_write_reference(k_pool, v_pool, q[:, :, 0], q[:, :, 1], layer, slot)
            q += paged_decode_reference(q, k_pool, v_pool, layer, pages, length, scale=0.1)
        return k_pool, v_pool, q

    pool = jax.ShapeDtypeStruct((3, 512, 64, 2, 64), jnp.float32)  # 48 MiB
    shapes = [(tokens, 2, 2, 64), (tokens,), (tokens, 8), (tokens,)]
    others = [jax.ShapeDtypeStruct(s, jnp.int32 if i else jnp.float32) for i, s in enumerate(shapes)]
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(pool, pool, *others).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 << 20
    assert memory.alias_size_in_bytes == 2 * pool.size * 4
