"""Quantized pages: codes against formulas in NumPy, and attention to them against that to what they stand for."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import paged_decode_reference, paged_prefill_reference, rope_kv_write_reference
from pallas_kernels.kv_quant import BITS, QuantizedPool, dequantize, quantize, spread
from pallas_kernels.kv_write import kv_write_reference
from tests.kernels import test_launches
from tests.kernels.cases import Case, quantized
from tests.test_cache import roundtrip
from tests.test_cache import spread as spread_by_numpy

POLICY = {"int8": 8, "int4": 4, "fp8": 16}
HEADS = (64, 80, 96, 128)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("head_dim", HEADS)
def test_round_trip(head_dim, kind):
    x = np.random.default_rng(0).standard_normal((50, head_dim)).astype(np.float32) * 3 + 1
    x[0] = 0  # padded heads
    x[1] = 7
    codes, parameters = quantize(x, kind)
    assert codes.shape == (50, head_dim * BITS[kind] // 8) and parameters.shape == (50,)
    got = np.asarray(dequantize(codes, parameters, kind))
    np.testing.assert_allclose(got[:2], x[:2], rtol=1e-3)
    expected = roundtrip(x[2:].astype(float), POLICY[kind])
    off = ~np.isclose(got[2:], expected, rtol=1e-5, atol=1e-6)
    assert off.mean() < 1e-3  # what lies between two codes may go to either


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.03, 1e4), st.floats(-1e3, 1e3))
def test_no_code_is_further_than_half_a_step(seed, size, middle):
    x = (np.random.default_rng(seed).standard_normal((4, 64)) * size + middle).astype(np.float32)
    for kind, steps in (("int8", 255), ("int4", 15)):
        got = np.asarray(dequantize(*quantize(x, kind), kind))
        step = (x.max(-1) - x.min(-1)) / steps
        rounded = 2e-3 * np.abs(x).max(-1) + 1e-3 * steps * step + 1e-6  # of scale and zero
        assert (np.abs(got - x).max(-1) <= step / 2 + rounded).all()


@pytest.mark.parametrize("kind", BITS)
def test_no_number_stays_no_number(kind):
    x = np.ones((2, 64), np.float32)
    x[1, 5] = np.nan
    got = np.asarray(dequantize(*quantize(x, kind), kind))
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).all()


@pytest.mark.parametrize("head_dim", HEADS)
def test_spread(head_dim):
    """Equals SciPy's matrix, undoes itself, and keeps products."""
    q, k = np.random.default_rng(0).standard_normal((2, 9, head_dim)).astype(np.float32)
    np.testing.assert_allclose(spread(k), spread_by_numpy(k), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread(spread(k)), k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread(q) @ spread(k).T, q @ k.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, window", [("int8", 20), ("int4", None), ("fp8", 20)])
def test_attention_is_that_to_the_dequantized_pools(kind, window):
    case = Case([5, 150, 0, 64, 90], [5, 33, 0, 1, 1], page_size=16, padding=3, head_dim=80, window=window)
    pools = quantized(case, kind)
    plain = [jnp.swapaxes(dequantize(p.codes, p.parameters, kind), 2, 3) for p in pools]
    q, rows = jnp.asarray(case.q), case.rows()
    for got, want in zip(pools, plain, strict=True):
        assert got.shape == want.shape
    attend = jax.jit(lambda *x: paged_prefill_reference(*x[:3], 1, *x[3:], scale=0.2, window=window))
    np.testing.assert_array_equal(attend(q, *pools, *rows), attend(q, *plain, *rows))


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", BITS)
def test_rope_and_write(kind, tokens):
    """What is written is what the plain pools would get, quantized, and nothing else changes."""
    random = np.random.default_rng(tokens)
    plain = jnp.zeros((3, 5, 4, 2, 16))
    codes = jnp.asarray(random.integers(0, 256, (3, 5, 2, 4, 16 * BITS[kind] // 8)), jnp.uint8)
    parameters = jnp.asarray(random.integers(0, 2**31, (3, 5, 2, 4)), jnp.int32)
    pool = QuantizedPool(codes, parameters, kind)
    qkv = random.standard_normal((tokens, 2, 5, 16)).astype(np.float32)
    angle = random.uniform(0, 9, (tokens, 8)).astype(np.float32)
    slot = random.permutation(np.arange(4, 20))[:tokens].astype(np.int32)
    args = (qkv, np.cos(angle), np.sin(angle), 1, slot)
    expected_q, *expected = rope_kv_write_reference(plain, plain, *args)
    q, *new = rope_kv_write_reference(pool, pool, *args)
    if kind == "int4":
        expected_q, expected[0] = spread(expected_q), spread(expected[0])
    np.testing.assert_allclose(q, expected_q, rtol=1e-5, atol=1e-5)
    written = np.zeros((3, 5, 4), bool)
    written[1, slot // 4, slot % 4] = True
    written = written[:, 1:]  # page 0 is junk
    for got, x in zip(new, expected, strict=True):
        for array, old in ((got.codes, codes), (got.parameters, parameters)):
            array, old = (np.swapaxes(np.asarray(a), 2, 3)[:, 1:] for a in (array, old))
            np.testing.assert_array_equal(array[~written], old[~written])
        numbers = np.swapaxes(np.asarray(dequantize(got.codes, got.parameters, kind)), 2, 3)[:, 1:][written]
        want = np.asarray(dequantize(*quantize(x, kind), kind))[:, 1:][written]
        assert np.isclose(numbers, want, rtol=1e-5, atol=1e-5).mean() > 0.98


@pytest.mark.skipif(test_launches.pytestmark.args[0], reason=test_launches.pytestmark.kwargs["reason"])
def test_a_step_is_one_graph():
    """A decode step with an int4 cache launches no more than one with plain pages, and copies no pool."""
    command = [sys.executable, str(test_launches.SCRIPT), "--tokens", "16", "--rows", "16", "--kv", "int4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["command_buffers"], found["outside"], found["copies"]) == (1, {}, {})
    assert found["layer"] <= 12


@pytest.mark.parametrize("kind", ["int4"])
def test_write_then_attend_copies_no_pool(kind):
    """Two layers of a decode step of one token on donated pools: the pools stay where they are."""

    def step(k_pool, v_pool, q, slot, pages, length):
        for layer in range(2):
            k_pool, v_pool = kv_write_reference(k_pool, v_pool, q[:, :, 0], q[:, :, 1], layer, slot)
            q += paged_decode_reference(q, k_pool, v_pool, layer, pages, length, scale=0.1)
        return k_pool, v_pool, q

    codes = jax.ShapeDtypeStruct((2, 2048, 2, 64, 64 * BITS[kind] // 8), jnp.uint8)
    pool = QuantizedPool(codes, jax.ShapeDtypeStruct(codes.shape[:-1], jnp.int32), kind)
    shapes = [(1, 2, 2, 64), (1,), (1, 8), (1,)]
    others = [jax.ShapeDtypeStruct(s, jnp.int32 if i else jnp.float32) for i, s in enumerate(shapes)]
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(pool, pool, *others).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 << 20
    assert memory.alias_size_in_bytes == 2 * (codes.size + 4 * codes.size // codes.shape[-1])
