"""GPTQ: rounding that makes up for each weight's error in the weights that are rounded after it.

`compensated` is the algorithm, for grids of any kind; `solve` is all that a GPTQ folder needs, with its grids.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, accurate post-training quantization for generative pre-trained transformers,
2022 (arXiv 2210.17323).  A map's outputs are to change least over the calibration text: of inputs X the error of
rounded weights is tr(E' H E) with E what rounding changes and H = X'X, the Hessian.  Inputs are rounded one after the
other, and what that costs is taken from the rest, which H couples to it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # inputs after which the others learn of the errors
SHRINKS = tuple(1 - 0.04 * i for i in range(12))  # parts of a group's range that are tried
DAMPING = 0.01  # of the Hessian's mean diagonal
TRIES = 4  # each with ten times the damping


class Grid(NamedTuple):
    """The values that weights may have: (q - zero) * scale with q of 0 to 2^bits - 1."""

    scale: jax.Array  # float32[groups, outputs], which float16 holds exactly
    zero: jax.Array  # float32[groups, outputs], whole numbers

    def nearest(self, rows, most: int):
        """q float32 of rows [groups, group, outputs], the nearest of 0 to `most`."""
        return nearest(rows, self.scale[:, None], self.zero[:, None], most)

    def values(self, q):
        """What q [groups, group, outputs] stand for."""
        return (q - self.zero[:, None]) * self.scale[:, None]


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
        grid = Grid(scale.astype(jnp.float32), zero.astype(jnp.float32))
    settings = {"group": group, "bits": bits, "symmetric": symmetric, "act_order": act_order, "search": search}
    settings["least_zero"] = least_zero
    for attempt in range(TRIES):
        q, scale, zero, sound = _solve(flat, jnp.asarray(hessian, jnp.float32), grid, damping * 10**attempt, **settings)
        if bool(sound):
            shape = (inputs // group, *outputs)
            return q.reshape(weight.shape), scale.reshape(shape), zero.reshape(shape)
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


def grid_of(rows, importance=None, *, bits=4, symmetric=False, search=True, least_zero=0) -> Grid:
    """The Grid of groups [groups, group, outputs]: their range cut into steps, 0 one of the values.

    importance: [groups, group], the weight of an input's error where the range is searched.
    """
    most, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = jnp.minimum(rows.min(1), 0), jnp.maximum(rows.max(1), 0)

    def shrunk(shrink):
        if symmetric:  # one step more below 0 than above
            scale = jnp.maximum(-low / half, high / (half - 1)) * shrink
        else:
            scale = (high - low) / most * shrink
        scale = held_by_float16(jnp.maximum(scale, 1e-6))
        zero = jnp.full_like(scale, half) if symmetric else jnp.clip(jnp.round(-low * shrink / scale), least_zero, most)
        return Grid(scale, zero)

    if not search:
        return shrunk(SHRINKS[0])
    importance = jnp.ones(rows.shape[:2]) if importance is None else importance
    return best_grid(rows, importance, most, shrunk, jnp.asarray(SHRINKS, jnp.float32))


def best_grid(rows, importance, most: int, made: Callable, tried) -> Grid:
    """The Grid of made(each of `tried`) that rows [groups, group, outputs] come out best with; the first of equals.

    Every group's output has a choice of its own.  importance: [groups, group], the weight of an input's error.
    """

    def better(held, one):
        best, least = held
        new = made(one)
        lost = jnp.square(new.values(new.nearest(rows, most)) - rows)
        lost = jnp.sum(lost * importance[..., None], 1)
        best = Grid(*(jnp.where(lost < least, a, b) for a, b in zip(new, best)))
        return (best, jnp.minimum(lost, least)), None

    first = made(tried[0])
    (best, _), _ = jax.lax.scan(better, (first, jnp.full(first.scale.shape, jnp.inf)), tried)
    return best


def nearest(weight, scale, zero, most: int):
    """The integer of 0 to `most` that stands for the value nearest to a weight, as float32."""
    return jnp.clip(jnp.round(weight / scale) + zero, 0, most)


def held_by_float16(x):
    """float32 of what float16 makes of x; exact from 0 on, and below 0 stays below or becomes 0."""
    # Not by its type: on a GPU XLA takes a conversion there and back for nothing.  Below its smallest normal number
    # float16 has steps of 2^-24.
    return jnp.where(x < 2.0**-14, jnp.round(x * 2.0**24) * 2.0**-24, jax.lax.reduce_precision(x, 5, 10))


@partial(jax.jit, static_argnames=("group", "bits", "symmetric", "act_order", "search", "least_zero"))
def _solve(weight, hessian, grid, damping, *, group, bits, symmetric, act_order, search, least_zero):
    """(q, scale, zero, whether all is finite) for one damping."""
    inputs, outputs = weight.shape
    size = jnp.diagonal(hessian)
    dead = size <= 0  # inputs that never were anything else than 0: their weights are rounded as they are
    size = jnp.where(dead, jnp.where(dead.all(), 1, jnp.sum(size) / jnp.maximum(jnp.sum(~dead), 1)), size)
    coupled = jnp.where(jnp.eye(inputs, dtype=bool), size + damping * size.mean(), hessian)
    kind = {"bits": bits, "symmetric": symmetric, "search": search, "least_zero": least_zero}
    importance = size.reshape(-1, group)
    if grid is None and (act_order or group > 2 * BLOCK):
        grid = grid_of(weight.reshape(-1, group, outputs), importance, **kind)
    order = jnp.argsort(-size, stable=True) if act_order else jnp.arange(inputs)
    factor = upper_factor(coupled[order][:, order])
    if grid is None:
        q, scale, zero = compensated(
            weight, factor, group, 2**bits - 1, lambda at, rows: grid_of(rows[None], importance[at][None], **kind)
        )
    else:
        of = (order // group).reshape(-1, _block(inputs))  # the group of each input, block by block
        q, *_ = compensated(
            weight[order], factor, of.shape[1], 2**bits - 1, lambda at, _: tuple(part[of[at]] for part in grid)
        )
        q, (scale, zero) = jnp.zeros_like(q).at[order].set(q), grid
    sound = jnp.isfinite(factor).all() & jnp.isfinite(scale).all()
    return q, scale, zero.astype(jnp.uint8), sound


def block_rounded(rows, factor, grid, most):
    """q uint8 and errors of a block of inputs [B, outputs], each error spread over those behind it in the block."""

    def one(i, carry):
        rows, q, errors = carry
        scale, zero = grid
        chosen = nearest(rows[i], scale[i], zero[i], most)
        error = (rows[i] - (chosen - zero[i]) * scale[i]) / factor[i, i]
        return rows - jnp.outer(factor[i], error), q.at[i].set(chosen.astype(jnp.uint8)), errors.at[i].set(error)

    start = rows, jnp.zeros(rows.shape, jnp.uint8), jnp.zeros_like(rows)
    return jax.lax.fori_loop(0, len(rows), one, start)[1:]


def compensated(weight, factor, block: int, most: int, grid_at: Callable, rounded: Callable = block_rounded):
    """Rounds a weight [inputs, outputs] input by input; those still to come take up what the rounding left behind.

    factor: of `upper_factor`.  block: inputs after which all others learn of the errors.  grid_at(number, rows): scale
    and zero float32, [1, outputs] or [block, outputs], of a block of which the errors before it left `rows`.  rounded:
    what does a block.

    Returns q uint8[inputs, outputs] of 0 to `most`, and all scales and zeros one below the other.
    """

    def one(weight, number):
        start = number * block
        rows = jax.lax.dynamic_slice_in_dim(weight, start, block)
        across = jax.lax.dynamic_slice_in_dim(factor, start, block)
        within = jax.lax.dynamic_slice_in_dim(across, start, block, 1)
        scale, zero = grid_at(number, rows)
        each = Grid(jnp.broadcast_to(scale, rows.shape), jnp.broadcast_to(zero, rows.shape))
        q, errors = rounded(rows, within, each, most)
        weight = weight - jnp.matmul(across.T, errors, precision="highest")  # 0 for those that are done
        return weight, (q, scale, zero)

    _, found = jax.lax.scan(one, weight, jnp.arange(len(weight) // block))
    return tuple(part.reshape(-1, weight.shape[1]) for part in found)


def _block(inputs):
    """The largest divisor of `inputs` that is at most BLOCK."""
    return next(size for size in range(min(BLOCK, inputs), 0, -1) if inputs % size == 0)


def upper_factor(matrix):
    """The upper triangular U with U'U the inverse of a positive definite matrix; not finite for any other.

    With R upper triangular and RR' the matrix, which is a Cholesky factor seen from its end, U is the inverse of R.
    """
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(matrix)), lower=False)
