"""GPTQ: the solver against rounding to nearest and a loop that follows the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.lite import gptq
from jaxserve.quant import int4

INPUTS, OUTPUTS, GROUP = 96, 40, 32


@pytest.fixture(scope="module")
def case():
    """A weight, and the Hessian of inputs that depend on each other."""
    draw = np.random.default_rng(0)
    mixed = draw.standard_normal((500, INPUTS)) @ draw.standard_normal((INPUTS, INPUTS)) * draw.uniform(0.1, 3, INPUTS)
    return draw.standard_normal((INPUTS, OUTPUTS)).astype(np.float32), gptq.hessian([mixed[:300], mixed[300:]])


def nearest(weight):
    q, scale, zero = int4.nearest(jnp.asarray(weight), GROUP)
    return q, np.asarray(scale).astype(np.float16).astype(np.float32), zero


def plain(weight, hessian, scale, zero, damping=gptq.DAMPING):
    """The paper's algorithm, a weight at a time, with the grid given: the q."""
    h = np.asarray(hessian, np.float64)
    inverse = np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(len(h)))
    weight, q = weight.astype(np.float64).copy(), np.zeros(weight.shape, int)
    for i in range(len(weight)):
        s, z = scale[i // GROUP], zero[i // GROUP].astype(int)
        q[i] = np.clip(np.round(weight[i] / s) + z, 0, 15)
        error = weight[i] - (q[i] - z) * s
        weight[i:] -= np.outer(inverse[i:, i] / inverse[i, i], error)
        inverse[i:, i:] -= np.outer(inverse[i:, i], inverse[i, i:]) / inverse[i, i]
    return q


def test_a_hessian_is_the_mean_of_all_tokens():
    x = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float32)
    np.testing.assert_allclose(gptq.hessian([x[:20], x[20:]]), x.T @ x / 50, rtol=1e-4)
    with pytest.raises(ValueError, match="no calibration inputs"):
        gptq.hessian([])


def test_equals_the_paper(case):
    weight, hessian = case
    _, scale, zero = nearest(weight)
    q, *_ = gptq.solve(weight, hessian, GROUP, grid=(scale, zero))
    assert (np.asarray(q) == plain(weight, hessian, scale, np.asarray(zero))).mean() > 0.999  # ties


@pytest.mark.parametrize(
    "settings", [{}, {"search": False}, {"act_order": True}, {"symmetric": True}, {"bits": 8}], ids=str
)
def test_beats_rounding_to_nearest(case, settings):
    weight, hessian = case
    bits = settings.get("bits", 4)
    rows = jnp.asarray(weight).reshape(-1, GROUP, OUTPUTS)
    kind = {"bits": bits, "symmetric": settings.get("symmetric", False), "search": False}
    scale, zero = gptq.grid_of(rows, **kind)
    rounded = gptq.solve(weight, np.eye(INPUTS), GROUP, **kind, damping=0)
    found = gptq.solve(weight, hessian, GROUP, **settings)
    losses = [float(gptq.loss(weight, gptq.values(*each), hessian)) for each in (found, rounded)]
    assert losses[0] < 0.6 * losses[1]
    assert int(found[0].max()) < 2**bits and found[0].dtype == found[2].dtype == jnp.uint8
    np.testing.assert_allclose(rounded[1], scale)
    np.testing.assert_array_equal(rounded[2], zero)


def test_equals_rounding_to_nearest_where_inputs_are_independent(case):
    weight, _ = case
    want, scale, zero = nearest(weight)
    for act_order in (False, True):
        q, s, z = gptq.solve(weight, 3 * np.eye(INPUTS), GROUP, search=False, act_order=act_order)
        np.testing.assert_array_equal(z, zero)
        np.testing.assert_allclose(s, scale)
        assert (np.asarray(q) == np.asarray(want)).mean() > 0.995  # of float16 scales


def test_a_given_grid_is_kept(case):
    weight, hessian = case
    _, scale, zero = nearest(weight)
    many = weight.reshape(INPUTS, 5, 8)
    grid = scale.reshape(-1, 5, 8), zero.reshape(-1, 5, 8)
    q, s, z = gptq.solve(many, hessian, GROUP, grid=grid, act_order=True)
    assert q.shape == many.shape
    np.testing.assert_array_equal(s, grid[0])
    np.testing.assert_array_equal(z, grid[1])
    assert float(gptq.loss(many, gptq.values(q, s, z), hessian)) < float(
        gptq.loss(many, gptq.values(nearest(weight)[0].reshape(many.shape), s, z), hessian)
    )


@pytest.mark.parametrize("group", [INPUTS, 8])
def test_groups_of_any_size(case, group):
    weight, hessian = case
    q, scale, zero = gptq.solve(weight, hessian, group)
    assert scale.shape == zero.shape == (INPUTS // group, OUTPUTS)
    assert float(gptq.loss(weight, gptq.values(q, scale, zero), hessian)) < 0.01
    with pytest.raises(ValueError, match="groups of 60 do not divide 96 inputs"):
        gptq.solve(weight, hessian, 60)


def test_inputs_that_are_always_zero_and_few_tokens(case):
    weight, hessian = case
    dead = np.asarray(hessian).copy()
    dead[5] = dead[:, 5] = 0
    assert np.isfinite(gptq.values(*gptq.solve(weight, dead, GROUP))).all()
    x = np.random.default_rng(0).standard_normal((3, INPUTS))
    few = gptq.hessian([x])
    assert float(gptq.loss(weight, gptq.values(*gptq.solve(weight, few, GROUP)), few)) < 0.01
    q, *_ = gptq.solve(weight, np.zeros((INPUTS, INPUTS)), GROUP, search=False)
    assert (np.asarray(q) == np.asarray(nearest(weight)[0])).mean() > 0.995


def test_a_hessian_that_is_no_number_is_refused(case):
    bad = np.asarray(case[1]).copy()
    bad[3, 4] = np.nan
    with pytest.raises(ValueError, match="no usable Hessian"):
        gptq.solve(case[0], bad, GROUP)


def test_scales_are_what_float16_holds():
    """As by its type, smallest numbers and ties included."""
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)  # all that are more than 0
    between = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([[0], halves, between, np.nextafter(between, 0), np.nextafter(between, np.inf)])
    x = x.astype(np.float32)
    np.testing.assert_array_equal(jax.jit(gptq.held_by_float16)(x), x.astype(np.float16).astype(np.float32))
