"""The loops of rounding: kernels in Triton's interpreter, and on a GPU, against the same in plain JAX."""

import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.lite import gptq
from jaxserve.lite import rounding as definition
from pallas_kernels import triton_call
from tests.kernels.emulated import Argument, on_the_host

module = importlib.import_module("pallas_kernels.rounding")
interpreted = pytest.mark.skipif(
    bool(triton_call.MISSING) or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)


def launch(kernel, *inputs, out, grid, warps, stages, **constants):
    """What `triton_call` does, by the interpreter."""
    arrays = [np.array(x, np.float32) for x in inputs] + [np.full(x.shape, np.nan, x.dtype) for x in out]
    kernel[grid](*map(Argument, arrays), **constants)
    return tuple(jnp.asarray(a) for a in arrays[len(inputs) :])


@pytest.fixture
def interpreter(monkeypatch):
    on_the_host(monkeypatch)
    monkeypatch.setattr(module, "triton_call", launch)


def case(group=16, columns=20):
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.standard_normal((group, columns)), jnp.float32)
    x = random.standard_normal((4 * group, group)) * np.exp(random.standard_normal(group))
    moments = jnp.asarray(x.T @ x / len(x), jnp.float32)
    return rows, moments


def check(rows, moments, flips=0.0):
    power, most = jnp.diag(moments), definition.LEVELS
    for symmetric in (False, True):
        want = definition._cut(rows[None], power[None], symmetric)
        pairs = jnp.array(definition._pairs(symmetric), jnp.float32)
        scale, zero = module.cut(rows, power, pairs, symmetric=symmetric, most=most)
        np.testing.assert_allclose(scale, want.scale[0], rtol=1e-6)
        np.testing.assert_array_equal(zero, want.zero[0])
    scale, zero = (part[0] for part in definition._cut(rows[None], power[None], False))
    factor = gptq.upper_factor(moments)
    grid = gptq.Grid(*(jnp.broadcast_to(part, rows.shape) for part in (scale, zero)))
    q, errors = module.spread(rows, factor, scale, zero, most=most)
    wanted, lost = gptq.block_rounded(rows, factor, grid, most)
    assert np.mean(np.asarray(q != wanted).any(0)) <= flips  # columns: what differs changes what comes after it
    np.testing.assert_allclose(np.median(np.abs(errors - lost)), 0, atol=1e-5)
    found = definition.Rounded(q, scale[None], zero[None])
    with jax.default_matmul_precision("highest"):
        better = definition._better_integers(rows, found, moments, len(rows), False)
        pull = moments @ (rows - found.values())
    q = module.descend(q, pull, moments, scale, zero, most=most)
    assert np.mean(np.asarray(q != better.q).any(0)) <= flips
    assert not np.array_equal(q, wanted)


@interpreted
def test_interpreted(interpreter):
    check(*case())


@pytest.mark.gpu
@pytest.mark.parametrize("group, columns", [(128, 1000), (64, 4096), (8, 24)])
def test_gpu(group, columns):
    check(*case(group, columns), flips=0.02)  # of values that lie in the middle
