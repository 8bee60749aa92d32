"""GPTQ: rounding that makes up for each weight's error in the weights that are rounded after it.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, accurate post-training quantization for generative pre-trained transformers,
2022 (arXiv 2210.17323).  A map's outputs are to change least over the calibration text: of inputs X the error of
rounded weights is tr(E' H E) with E what rounding changes and H = X'X, the Hessian.  Inputs are rounded one after the
other, and what that costs is taken from the rest, which H couples to it.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # inputs after which the others learn of the errors
SHRINKS = tuple(1 - 0.04 * i for i in range(1, 12))  # parts of a group's range that are tried
DAMPING = 0.01  # of the Hessian's mean diagonal
TRIES = 4  # each with ten times the damping


class Grid(NamedTuple):
    """The values that weights may have: (q - zero) * scale with q of 0 to 2^bits - 1."""

    scale: jax.Array  # float32[groups, outputs], which float16 holds exactly
    zero: jax.Array  # uint8[groups, outputs]


def solve(
    weight,
    hessian,
    group,
    *,
    bits=4,
    symmetric=False,
    act_order=False,
    grid=None,
    damping=DAMPING,
    search=True,
    least_zero=0,
):
    """Rounds a linear map so that what it does to its inputs changes least.

    weight: [inputs, *outputs].  hessian: [inputs, inputs], of `hessian`; only its proportions count.  group:
    neighbouring inputs that share a scale.  symmetric: the zero is always 2^(bits-1).  act_order: inputs are done from
    the largest down; groups stay neighbours.  grid: scale and zero [inputs/group, *outputs] where they are decided
    already; else they are made of the weights as errors have left them when a group's turn comes (with act_order, of
    those given).  search: shrink a group's range where that rounds better.  least_zero: no zero is below it.

    Returns q uint8 as weight, scale float32 (what float16 holds) and zero uint8 [inputs/group, *outputs].  ValueError
    where the Hessian is of no use: not finite, or singular even with damping.
    """
    inputs, outputs = weight.shape[0], weight.shape[1:]
    if inputs % group:
        raise ValueError(f"groups of {group} do not divide {inputs} inputs")
    flat = jnp.asarray(weight, jnp.float32).reshape(inputs, -1)
    if grid is not None:
        scale, zero = (jnp.asarray(part).reshape(-1, flat.shape[1]) for part in grid)
        grid = Grid(scale.astype(jnp.float32), zero.astype(jnp.uint8))
    settings = {"group": group, "bits": bits, "symmetric": symmetric, "act_order": act_order, "search": search}
    settings["least_zero"] = least_zero
    for attempt in range(TRIES):
        q, made, sound = _solve(flat, jnp.asarray(hessian, jnp.float32), grid, damping * 10**attempt, **settings)
        if bool(sound):
            shape = (inputs // group, *outputs)
            return q.reshape(weight.shape), made.scale.reshape(shape), made.zero.reshape(shape)
    raise ValueError("the inputs of this map give no usable Hessian: not finite, or singular")


@jax.jit
def _added(total, x):
    return total + jnp.matmul(x.T, x, precision="highest")


def hessian(batches: Iterable) -> jax.Array:
    """float32[inputs, inputs]: X'X of the inputs [tokens, inputs] that come in batches, a token's mean."""
    total, count = None, 0
    for x in batches:
        x = jnp.asarray(x, jnp.float32)
        total = _added(jnp.zeros((x.shape[1],) * 2, jnp.float32) if total is None else total, x)
        count += len(x)
    if total is None:
        raise ValueError("no calibration inputs came")
    return total / count


def values(q, scale, zero):
    """float32[inputs, *outputs] of what `solve` returns."""
    times = q.shape[0] // scale.shape[0]
    scale, zero = (jnp.repeat(jnp.asarray(part, jnp.float32), times, 0) for part in (scale, zero))
    return (jnp.asarray(q, jnp.float32) - zero) * scale


@jax.jit
def loss(weight, rounded, hessian):
    """The share of a map's outputs (their energy over the calibration text) that rounding it changes: a float."""
    flat = weight.reshape(weight.shape[0], -1)
    apart = flat - rounded.reshape(flat.shape)
    energy = [jnp.vdot(m, jnp.matmul(hessian, m, precision="highest")) for m in (apart, flat)]
    return energy[0] / jnp.maximum(energy[1], 1e-30)


def grid_of(rows, importance=None, *, bits=4, symmetric=False, search=True, least_zero=0):
    """The Grid of groups [groups, group, outputs]: their range cut into steps, 0 one of the values.

    importance: [groups, group], the weight of an input's error where the range is searched.
    """
    most, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = jnp.minimum(rows.min(1), 0), jnp.maximum(rows.max(1), 0)
    importance = jnp.ones(rows.shape[:2]) if importance is None else importance

    def made(shrink):
        if symmetric:  # one step more below 0 than above
            scale = jnp.maximum(-low / half, high / (half - 1)) * shrink
        else:
            scale = (high - low) / most * shrink
        scale = jnp.maximum(scale, 1e-6).astype(jnp.float16).astype(jnp.float32)
        zero = jnp.full_like(scale, half) if symmetric else jnp.clip(jnp.round(-low * shrink / scale), least_zero, most)
        return scale, zero

    best = made(1.0)
    if not search:
        return Grid(best[0], best[1].astype(jnp.uint8))

    def error(scale, zero):
        rounded = (_nearest(rows, scale[:, None], zero[:, None], most) - zero[:, None]) * scale[:, None]
        return jnp.einsum("gio,gi->go", (rows - rounded) ** 2, importance)

    def better(held, shrink):
        best, least = held
        tried = made(shrink)
        found = error(*tried)
        best = tuple(jnp.where(found < least, new, old) for new, old in zip(tried, best))
        return (best, jnp.minimum(found, least)), None

    (best, _), _ = jax.lax.scan(better, (best, error(*best)), jnp.asarray(SHRINKS))
    return Grid(best[0], best[1].astype(jnp.uint8))


def _nearest(row, scale, zero, most):
    return jnp.clip(jnp.round(row / scale) + zero, 0, most)


@partial(jax.jit, static_argnames=("group", "bits", "symmetric", "act_order", "search", "least_zero"))
def _solve(weight, hessian, grid, damping, *, group, bits, symmetric, act_order, search, least_zero):
    """(q, Grid, whether all is finite) for one damping."""
    inputs, outputs = weight.shape
    size = jnp.diagonal(hessian)
    dead = size <= 0  # inputs that never were anything else than 0: their weights are rounded as they are
    size = jnp.where(dead, jnp.where(dead.all(), 1, jnp.sum(size) / jnp.maximum(jnp.sum(~dead), 1)), size)
    coupled = jnp.where(jnp.eye(inputs, dtype=bool), size + damping * size.mean(), hessian)
    kind = {"bits": bits, "symmetric": symmetric, "search": search, "least_zero": least_zero}
    beforehand = grid is None and (act_order or group > 2 * BLOCK)
    if beforehand:
        grid = grid_of(weight.reshape(-1, group, outputs), size.reshape(-1, group), **kind)
    order = jnp.argsort(-size, stable=True) if act_order else jnp.arange(inputs)
    weight, coupled, of = weight[order], coupled[order][:, order], order // group
    factor = _upper(coupled)
    block = group if grid is None else _block(inputs)

    def one(at, carry):
        weight, q, scales, zeros = carry
        start = at * block
        rows = jax.lax.dynamic_slice_in_dim(weight, start, block)
        across = jax.lax.dynamic_slice_in_dim(factor, start, block)
        within = jax.lax.dynamic_slice_in_dim(across, start, block, 1)
        if grid is None:
            mine = grid_of(rows[None], jax.lax.dynamic_slice_in_dim(size, start, block)[None], **kind)
            scale, zero = (jnp.broadcast_to(part, rows.shape).astype(jnp.float32) for part in mine)
            scales, zeros = (jax.lax.dynamic_update_slice_in_dim(a, b, at, 0) for a, b in zip((scales, zeros), mine))
        else:
            group_of = jax.lax.dynamic_slice_in_dim(of, start, block)
            scale, zero = grid.scale[group_of], grid.zero[group_of].astype(jnp.float32)
        chosen, errors = _block_rounded(rows, within, scale, zero, 2**bits - 1)
        weight = weight - jnp.matmul(across.T, errors, precision="highest")  # 0 for those that are done
        return weight, jax.lax.dynamic_update_slice_in_dim(q, chosen, start, 0), scales, zeros

    groups = inputs // group
    empty = jnp.zeros((groups, outputs), jnp.float32), jnp.zeros((groups, outputs), jnp.uint8)
    start = weight, jnp.zeros(weight.shape, jnp.uint8), *(grid or empty)
    _, q, scale, zero = jax.lax.fori_loop(0, inputs // block, one, start)
    sound = jnp.isfinite(factor).all() & jnp.isfinite(scale).all()
    return jnp.zeros_like(q).at[order].set(q), Grid(scale, zero), sound


def _block_rounded(rows, factor, scale, zero, most):
    """q uint8 and errors of a block of inputs [B, outputs], each error spread over those behind it in the block."""

    def one(i, carry):
        rows, q, errors = carry
        chosen = _nearest(rows[i], scale[i], zero[i], most)
        error = (rows[i] - (chosen - zero[i]) * scale[i]) / factor[i, i]
        return rows - jnp.outer(factor[i], error), q.at[i].set(chosen.astype(jnp.uint8)), errors.at[i].set(error)

    start = rows, jnp.zeros(rows.shape, jnp.uint8), jnp.zeros_like(rows)
    return jax.lax.fori_loop(0, len(rows), one, start)[1:]


def _block(inputs):
    """The largest divisor of `inputs` that is at most BLOCK."""
    return next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0)


def _upper(matrix):
    """The upper triangular U with U'U the inverse of a positive definite matrix.

    With R upper triangular and RR' the matrix, which is a Cholesky factor seen from its end, U is the inverse of R.
    """
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(matrix)), lower=False)
