"""How a linear map becomes integers of 4 bits, so that its outputs change least.

The format leaves three things free: for every group of neighbouring inputs and every output a scale and a zero, and
which of the 16 integers each value becomes.  K inputs, N outputs, g inputs of a group; a map is float32[K, N], and
`moments` float32[K, K] is the mean of x x^T over the map's inputs x.  What is made small is the squared error of the
outputs, tr((W-V)^T moments (W-V)).

1. `clipped`: every group's range is cut where that makes the error least that its own inputs cause (Lin et al., 2023:
   AWQ, there for one cut of both ends).
2. `compensated`: inputs are rounded one after the other, and those still to come take up what the rounding left behind
   (Frantar et al., 2022: GPTQ); scales and zeros of a group are chosen by 1 when its turn comes.
3. `settled`: with the others fixed each scale has one best value, and so has each integer (Behdin et al., 2023:
   QuantEase); a few rounds of both.

Sample moments of few tokens say more than is true, so `damped` moments are what 2 and 3 are given.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.quant.int4 import nearest

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
        return _values(self.q, self.scale, self.zero)


def round_to_nearest(weight, group: int, symmetric: bool = False) -> Rounded:
    """What needs no calibration: a group's whole range is cut into 15 steps."""
    if symmetric:
        low, high = _range(_grouped(weight, group))
        scale, zero = _grid(low, high, True)
        return Rounded(_nearest(weight, scale, zero), scale, zero)
    q, scale, zero = nearest(weight, group)
    return Rounded(q.astype(jnp.float32), _half(scale), zero.astype(jnp.float32))


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
    scale, zero = _cut(_grouped(weight, group), power.reshape(-1, group, 1), symmetric)
    return Rounded(_nearest(weight, scale, zero), scale, zero)


@partial(jax.jit, static_argnames=("group", "symmetric", "rounds"))
def solved(weight, moments, group: int, symmetric: bool = False, rounds: int = ROUNDS) -> Rounded:
    """The best that is known here: `compensated`, then `settled`.  moments: damped, or the text is learned by heart."""
    return settled(weight, compensated(weight, moments, group, symmetric), moments, rounds)


def compensated(weight, moments, group: int, symmetric: bool = False) -> Rounded:
    """GPTQ with a search for each group's range."""
    inputs = len(weight)
    lower = jnp.linalg.cholesky(moments)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(inputs))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T  # upper^T upper is the inverse
    power, place = jnp.diag(moments), jnp.arange(inputs)

    def one_group(index, state):
        left, q, scales, zeros = state
        first = index * group
        rows = jax.lax.dynamic_slice_in_dim(left, first, group)
        ahead = jax.lax.dynamic_slice_in_dim(upper, first, group)  # [g, K]
        own = jax.lax.dynamic_slice_in_dim(ahead, first, group, 1)  # [g, g]
        scale, zero = _cut(rows[None], jax.lax.dynamic_slice_in_dim(power, first, group)[None, :, None], symmetric)
        scale, zero = scale[0], zero[0]

        def one_input(i, state):
            rows, lost, picked = state
            integer = _pick(rows[i], scale, zero)
            error = (rows[i] - (integer - zero) * scale) / own[i, i]
            later = jnp.where(jnp.arange(group) > i, own[i], 0)
            return rows - later[:, None] * error[None], lost.at[i].set(error), picked.at[i].set(integer)

        empty = jnp.zeros_like(rows)
        _, lost, picked = jax.lax.fori_loop(0, group, one_input, (rows, empty, empty))
        left = left - jnp.where(place[:, None] >= first + group, ahead.T @ lost, 0)
        q = jax.lax.dynamic_update_slice_in_dim(q, picked, first, 0)
        return left, q, scales.at[index].set(scale), zeros.at[index].set(zero)

    groups = jnp.zeros((inputs // group, weight.shape[1]), weight.dtype)
    start = weight, jnp.zeros_like(weight), groups, groups
    return Rounded(*jax.lax.fori_loop(0, inputs // group, one_group, start)[1:])


def settled(weight, found: Rounded, moments, rounds: int = ROUNDS) -> Rounded:
    """Rounds of: the best scales for these integers, the best integers for these scales.  Never makes it worse."""
    group = len(weight) // len(found.scale)

    def one_round(_, found):
        return _better_integers(weight, _better_scales(weight, found, moments, group), moments, group)

    return _better_scales(weight, jax.lax.fori_loop(0, rounds, one_round, found), moments, group)


def _better_scales(weight, found, moments, group):
    """Group by group the scale that makes the error least; the zero stays."""

    def one_group(index, state):
        values, scales = state
        rows, own = _rows(moments, index, group)
        scale, zero = scales[index], found.zero[index]
        steps = jax.lax.dynamic_slice_in_dim(found.q, index * group, group) - zero[None]
        slope = jnp.sum(steps * (rows @ (weight - values)), 0)
        bend = jnp.sum(steps * (own @ steps), 0)
        better = _half(scale + jnp.where(bend > 0, slope / jnp.maximum(bend, 1e-30), 0))
        moved = better - scale
        gains = moved * slope - 0.5 * moved * moved * bend > 0  # rounded to float16 it may not
        better = jnp.where((better > 0) & jnp.isfinite(better) & gains, better, scale)
        values = jax.lax.dynamic_update_slice_in_dim(values, steps * better[None], index * group, 0)
        return values, scales.at[index].set(better)

    _, scales = jax.lax.fori_loop(0, len(found.scale), one_group, (found.values(), found.scale))
    return found._replace(scale=scales)


def _better_integers(weight, found, moments, group):
    """Input by input the integer that makes the error least."""

    def one_group(index, state):
        values, q = state
        rows, own = _rows(moments, index, group)
        scale, zero = found.scale[index], found.zero[index]
        pull = rows @ (weight - values)  # [g, N]

        def one_input(i, state):
            q, pull = state
            now = (q[i] - zero) * scale
            integer = _pick(now + pull[i] / own[i, i], scale, zero)
            moved = (integer - q[i]) * scale
            return q.at[i].set(integer), pull - own[:, i, None] * moved[None]

        part = jax.lax.dynamic_slice_in_dim(q, index * group, group)
        part, _ = jax.lax.fori_loop(0, group, one_input, (part, pull))
        q = jax.lax.dynamic_update_slice_in_dim(q, part, index * group, 0)
        return jax.lax.dynamic_update_slice_in_dim(values, (part - zero[None]) * scale[None], index * group, 0), q

    _, q = jax.lax.fori_loop(0, len(found.scale), one_group, (found.values(), found.q))
    return found._replace(q=q)


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


def _half(x):
    return x.astype(jnp.float16).astype(jnp.float32)


def _grid(low, high, symmetric):
    """Scales and zeros for ranges."""
    if symmetric:
        scale = _half(jnp.maximum(jnp.maximum(-low, high), 1e-5) / 7)
        return scale, jnp.full_like(scale, 8)
    scale = _half(jnp.maximum(high - low, 1e-5) / LEVELS)
    return scale, jnp.clip(jnp.round(-low / scale), 0, LEVELS)


def _pick(value, scale, zero):
    return jnp.clip(jnp.round(value / scale) + zero, 0, LEVELS)


def _nearest(weight, scale, zero):
    group = len(weight) // len(scale)
    return _pick(_grouped(weight, group), scale[:, None], zero[:, None]).reshape(weight.shape)


def _values(q, scale, zero):
    group = len(q) // len(scale)
    return ((_grouped(q, group) - zero[:, None]) * scale[:, None]).reshape(q.shape)


def _cut(grouped, power, symmetric):
    """(scale, zero), each [K/g, N], of the best cut ranges of [K/g, g, N] whose inputs have `power` [K/g, g, 1]."""
    low, high = _range(grouped)
    pairs = [(a, b) for a in CUTS for b in CUTS if (a == b if symmetric else abs(a - b) < APART)]
    tried = jnp.array(pairs, jnp.float32)

    def one(index, state):
        least, scale, zero = state
        new = _grid(low * tried[index, 0], high * tried[index, 1], symmetric)
        steps = (_pick(grouped, new[0][:, None], new[1][:, None]) - new[1][:, None]) * new[0][:, None]
        lost = jnp.sum(jnp.square(steps - grouped) * power, 1)
        better = lost < least
        return jnp.where(better, lost, least), jnp.where(better, new[0], scale), jnp.where(better, new[1], zero)

    state = jnp.full(low.shape, jnp.inf), *_grid(low, high, symmetric)
    return jax.lax.fori_loop(0, len(pairs), one, state)[1:]
