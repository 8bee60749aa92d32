"""How a linear map becomes integers of 4 bits, so that its outputs change least.

The format leaves three things free: for every group of neighbouring inputs and every output a scale and a zero, and
which of the 16 integers each value becomes.  K inputs, N outputs, g inputs of a group; a map is float32[K, N], and
`moments` float32[K, K] is the mean of x x^T over the map's inputs x.  What is made small is the squared error of the
outputs, tr((W-V)^T moments (W-V)).

1. `clipped`: every group's range is cut where that makes the error least that its own inputs cause (Lin et al., 2023:
   AWQ, there for one cut of both ends).
2. `compensated`: inputs are rounded one after the other, and those still to come take up what the rounding left behind
   (GPTQ, whose algorithm is in `gptq`); scales and zeros of a group are chosen by 1 when its turn comes.
3. `settled`: with the others fixed each scale has one best value, and so has each integer (Behdin et al., 2023:
   QuantEase); a few rounds of both.

Sample moments of few tokens say more than is true, so `damped` moments are what 2 and 3 are given.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve import ops
from jaxserve.lite import gptq
from jaxserve.lite.gptq import Grid, best_grid, held_by_float16, nearest
from jaxserve.quant import int4

LEVELS = 15  # steps between the smallest and the largest integer
CUTS = tuple(1 - 0.05 * n for n in range(8))  # shares of a range that are tried; to 0.65
APART = 0.21  # the cuts of both ends differ by less
ROUNDS = 2  # of `settled`


class Rounded(NamedTuple):
    """A map whose values are (q - zero) * scale."""

    q: jax.Array  # float32[K, N], 0 to 15
    scale: jax.Array  # float32[K/g, N] that float16 holds
    zero: jax.Array  # float32[K/g, N], 0 to 15

    def values(self):
        """float32[K, N]."""
        grid = Grid(self.scale, self.zero)
        return grid.values(_grouped(self.q, len(self.q) // len(self.scale))).reshape(self.q.shape)


def round_to_nearest(weight, group: int, symmetric: bool = False) -> Rounded:
    """What needs no calibration: a group's whole range is cut into 15 steps."""
    if symmetric:
        low, high = _range(_grouped(weight, group))
        return _rounded(weight, _grid(low, high, True))
    q, scale, zero = int4.nearest(weight, group)
    return Rounded(q.astype(jnp.float32), held_by_float16(scale), zero.astype(jnp.float32))


def damped(moments, tokens: int):
    """Moments with as much added to the diagonal as the sample errs by: its mean times sqrt(inputs / tokens).

    On SmolLM2-135M with 8192 tokens the error on other text is least between 0.2 (576 inputs) and 0.5 (1536) of the
    mean, a tenth lower than with GPTQ's usual 0.01.
    """
    inputs = len(moments)
    share = min(0.5, math.sqrt(inputs / max(tokens, 1)))
    mean = jnp.maximum(jnp.mean(jnp.diag(moments)), 1e-20)
    return moments + (share * mean) * jnp.eye(inputs)


@partial(jax.jit, static_argnames=("group", "symmetric"))
def clipped(weight, power, group: int, symmetric: bool = False) -> Rounded:
    """Rounds to nearest in ranges whose ends are cut.  power float32[K]: the mean square of each input."""
    return _rounded(weight, _cut(_grouped(weight, group), power.reshape(-1, group), symmetric))


@partial(jax.jit, static_argnames=("group", "symmetric", "rounds", "kernels"))
def solved(weight, moments, group: int, symmetric: bool = False, rounds: int = ROUNDS, kernels=False) -> Rounded:
    """The best that is known here: `compensated`, then `settled`.  moments: damped, or the text is learned by heart.

    kernels: the device has them for the loops over inputs (`kernels_for`).
    """
    found = compensated(weight, moments, group, symmetric, kernels)
    return settled(weight, found, moments, rounds, kernels)


def kernels_for(mesh, group: int) -> bool:
    """Whether the kernels can do what is on this mesh."""
    return mesh.size == 1 and ops.kernels() and ops.rounding.takes(group)


def compensated(weight, moments, group: int, symmetric: bool = False, kernels=False) -> Rounded:
    """GPTQ with a search for each group's range."""
    power = jnp.diag(moments).reshape(-1, group)

    def cut(number, rows):
        if kernels:
            pairs = jnp.array(_pairs(symmetric), jnp.float32)
            grid = ops.rounding.cut(rows, power[number], pairs, symmetric=symmetric, most=LEVELS)
            return Grid(*(part[None] for part in grid))
        return _cut(rows[None], power[number][None], symmetric)

    def spread(rows, within, grid, most):
        q, errors = ops.rounding.spread(rows, within, grid.scale[0], grid.zero[0], most=most)
        return q.astype(jnp.uint8), errors

    # A device with kernels computes with fewer digits already: there nothing depends on the last of them.
    factor = gptq.upper_factor(moments) if kernels else _factor(moments)
    how = {"rounded": spread} if kernels else {}
    q, scale, zero = gptq.compensated(weight, factor, group, LEVELS, cut, **how)
    return Rounded(q.astype(jnp.float32), scale, zero)


def _factor(moments):
    """As `gptq.upper_factor`, by the inverse itself: the last bits differ.

    One integer that differs for them changes the moments of all maps after it, so the folders that the figures in
    `awq` are of could not be made again.
    """
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(moments), True), jnp.eye(len(moments)))
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def settled(weight, found: Rounded, moments, rounds: int = ROUNDS, kernels=False) -> Rounded:
    """Rounds of: the best scales for these integers, the best integers for these scales.  Never makes it worse."""
    group = len(weight) // len(found.scale)

    def one_round(_, found):
        return _better_integers(weight, _better_scales(weight, found, moments, group), moments, group, kernels)

    return _better_scales(weight, jax.lax.fori_loop(0, rounds, one_round, found), moments, group)


def _better_scales(weight, found, moments, group):
    """Group by group the scale that makes the error least; the zero stays."""

    def one_group(index, state):
        lost, scales = state
        rows, own = _rows(moments, index, group)
        scale, zero = scales[index], found.zero[index]
        steps = jax.lax.dynamic_slice_in_dim(found.q, index * group, group) - zero[None]
        slope = jnp.sum(steps * (rows @ lost), 0)
        bend = jnp.sum(steps * (own @ steps), 0)
        better = held_by_float16(scale + jnp.where(bend > 0, slope / jnp.maximum(bend, 1e-30), 0))
        moved = better - scale
        gains = moved * slope - 0.5 * moved * moved * bend > 0  # rounded to float16 it may not
        better = jnp.where((better > 0) & jnp.isfinite(better) & gains, better, scale)
        return _lost(lost, weight, steps * better[None], index), scales.at[index].set(better)

    _, scales = jax.lax.fori_loop(0, len(found.scale), one_group, (weight - found.values(), found.scale))
    return found._replace(scale=scales)


def _better_integers(weight, found, moments, group, kernels):
    """Input by input the integer that makes the error least."""

    def one_group(index, state):
        lost, q = state
        rows, own = _rows(moments, index, group)
        scale, zero = found.scale[index], found.zero[index]
        pull = rows @ lost  # [g, N]

        def one_input(i, state):
            q, pull = state
            now = (q[i] - zero) * scale
            integer = nearest(now + pull[i] / own[i, i], scale, zero, LEVELS)
            moved = (integer - q[i]) * scale
            return q.at[i].set(integer), pull - own[:, i, None] * moved[None]

        part = jax.lax.dynamic_slice_in_dim(q, index * group, group)
        if kernels:
            part = ops.rounding.descend(part, pull, own, scale, zero, most=LEVELS)
        else:
            part, _ = jax.lax.fori_loop(0, group, one_input, (part, pull))
        q = jax.lax.dynamic_update_slice_in_dim(q, part, index * group, 0)
        return _lost(lost, weight, (part - zero[None]) * scale[None], index), q

    _, q = jax.lax.fori_loop(0, len(found.scale), one_group, (weight - found.values(), found.q))
    return found._replace(q=q)


def _lost(lost, weight, values, index):
    """What is lost, with other values in a group."""
    group = len(values)
    rows = jax.lax.dynamic_slice_in_dim(weight, index * group, group)
    return jax.lax.dynamic_update_slice_in_dim(lost, rows - values, index * group, 0)


@jax.jit
def error(weight, values, moments):
    """The mean squared error of all outputs together, and what their mean square is."""
    lost = weight - values
    return jnp.sum(lost * (moments @ lost)), jnp.sum(weight * (moments @ weight))


def _rows(moments, index, group):
    rows = jax.lax.dynamic_slice_in_dim(moments, index * group, group)  # [g, K]
    return rows, jax.lax.dynamic_slice_in_dim(rows, index * group, group, 1)


def _grouped(weight, group):
    return weight.reshape(-1, group, weight.shape[1])


def _range(grouped):
    """The ends of each group's values, 0 among them."""
    return jnp.minimum(grouped.min(1), 0), jnp.maximum(grouped.max(1), 0)


def _grid(low, high, symmetric) -> Grid:
    """Scales and zeros for ranges."""
    if symmetric:
        scale = held_by_float16(jnp.maximum(jnp.maximum(-low, high), 1e-5) / 7)
        return Grid(scale, jnp.full_like(scale, 8))
    scale = held_by_float16(jnp.maximum(high - low, 1e-5) / LEVELS)
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, LEVELS))


def _rounded(weight, grid: Grid) -> Rounded:
    """Rounds to the nearest values of a grid."""
    q = grid.nearest(_grouped(weight, len(weight) // len(grid.scale)), LEVELS)
    return Rounded(q.reshape(weight.shape), *grid)


def _cut(grouped, power, symmetric) -> Grid:
    """The best cut ranges of [K/g, g, N] whose inputs have `power` [K/g, g]."""
    low, high = _range(grouped)
    pairs = jnp.array(_pairs(symmetric))
    return best_grid(grouped, power, LEVELS, lambda shares: _grid(low * shares[0], high * shares[1], symmetric), pairs)


def _pairs(symmetric):
    """The shares of a range's ends that are tried."""
    return [(a, b) for a in CUTS for b in CUTS if (a == b if symmetric else abs(a - b) < APART)]
