"""The loops of rounding weights to integers of few bits, which take one input after the other.

A group of g inputs is one kernel; XLA would launch several for every input.  Columns (outputs) have nothing to do with
each other: a warp has COLUMNS of them, with all of the group's rows, in registers.  N outputs; everything is float32.
Each has the same operation in XLA beside it in `jaxserve/lite`, which is its definition.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import cdiv, jit, tl, triton_call

COLUMNS = 8  # a group's rows of so many bytes are a sector of memory


def takes(group: int) -> bool:
    """Whether the kernels take groups of so many inputs."""
    return group <= 128 and group & (group - 1) == 0


def cut(rows, power, pairs, *, symmetric: bool, most: int):
    """Scale and zero [N] of rows [g, N] in the range whose ends, cut by one of `pairs` [P, 2], round best.

    power [g]: of each input, the weight of its error.  Of equals the first; scales are what float16 holds.
    """
    group, columns = rows.shape
    out = [jax.ShapeDtypeStruct((columns,), jnp.float32)] * 2
    how = {"G": group, "N": columns, "BN": COLUMNS, "PAIRS": len(pairs), "SYMMETRIC": symmetric, "MOST": float(most)}
    return triton_call(_cut, rows, power, pairs, out=out, grid=(cdiv(columns, COLUMNS),), warps=1, stages=1, **how)


def spread(rows, factor, scale, zero, *, most: int):
    """q and errors [g, N] of rows [g, N] rounded one after the other, each error spread over those behind it.

    factor [g, g]: how, its diagonal what an error is divided by; scale, zero [N].
    """
    out = [jax.ShapeDtypeStruct(rows.shape, jnp.float32)] * 2
    how = {"G": rows.shape[0], "N": rows.shape[1], "BN": COLUMNS, "MOST": float(most)}
    inputs = rows, factor, scale, zero
    return triton_call(_spread, *inputs, out=out, grid=(cdiv(rows.shape[1], COLUMNS),), warps=1, stages=1, **how)


def descend(q, pull, own, scale, zero, *, most: int):
    """q [g, N] anew: one after the other the integer that makes the error least, the others staying.

    pull [g, N]: half of how fast the error falls with each value; own [g, g]: how fast each value changes that of
    others; scale, zero [N].
    """
    out = [jax.ShapeDtypeStruct(q.shape, jnp.float32)]
    how = {"G": q.shape[0], "N": q.shape[1], "BN": COLUMNS, "MOST": float(most)}
    inputs = q, pull, own, scale, zero
    return triton_call(_descend, *inputs, out=out, grid=(cdiv(q.shape[1], COLUMNS),), warps=1, stages=1, **how)[0]


@jit
def _round(x):
    """To the nearest whole number, of two the even one; right below 2^22, and large beyond."""
    return (x + 12582912.0) - 12582912.0


@jit
def _nearest(x, scale, zero, MOST: tl.constexpr):
    return tl.minimum(tl.maximum(_round(x / scale) + zero, 0.0), MOST)


@jit
def _cut(rows, power, pairs, scales, zeros, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr,
         SYMMETRIC: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    at, column = tl.arange(0, G), tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < N
    x = tl.load(rows + at[:, None] * N + column[None], mask=there[None], other=0.0)
    weight = tl.load(power + at)
    low, high = tl.minimum(tl.min(x, 0), 0.0), tl.maximum(tl.max(x, 0), 0.0)
    best, scale, zero = low * 0.0 + float("inf"), low * 0.0 + 1.0, low * 0.0
    for i in range(PAIRS):
        bottom, top = low * tl.load(pairs + 2 * i), high * tl.load(pairs + 2 * i + 1)
        if SYMMETRIC:
            step = tl.maximum(tl.maximum(-bottom, top), 1e-5) / 7.0
            step = step.to(tl.float16).to(tl.float32)
            nought = low * 0.0 + 8.0
        else:
            step = tl.maximum(top - bottom, 1e-5) / MOST
            step = step.to(tl.float16).to(tl.float32)
            nought = tl.minimum(tl.maximum(_round(-bottom / step), 0.0), MOST)
        apart = (_nearest(x, step[None], nought[None], MOST) - nought[None]) * step[None] - x
        lost = tl.sum(apart * apart * weight[:, None], 0)
        better = lost < best
        best = tl.where(better, lost, best)
        scale, zero = tl.where(better, step, scale), tl.where(better, nought, zero)
    tl.store(scales + column, scale, mask=there)
    tl.store(zeros + column, zero, mask=there)


@jit
def _spread(rows, factor, scales, zeros, q, errors, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
            MOST: tl.constexpr):  # fmt: skip
    at, column = tl.arange(0, G), tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < N
    x = tl.load(rows + at[:, None] * N + column[None], mask=there[None], other=0.0)
    scale, zero = tl.load(scales + column, mask=there, other=1.0), tl.load(zeros + column, mask=there, other=0.0)
    for i in range(G):
        row = tl.sum(tl.where((at == i)[:, None], x, 0.0), 0)
        chosen = _nearest(row, scale, zero, MOST)
        error = (row - (chosen - zero) * scale) / tl.load(factor + i * G + i)
        x -= tl.load(factor + i * G + at)[:, None] * error[None]
        tl.store(q + i * N + column, chosen, mask=there)
        tl.store(errors + i * N + column, error, mask=there)


@jit
def _descend(q, pull, own, scales, zeros, out, G: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, MOST: tl.constexpr):
    at, column = tl.arange(0, G), tl.program_id(0) * BN + tl.arange(0, BN)
    there = column < N
    x = tl.load(pull + at[:, None] * N + column[None], mask=there[None], other=0.0)
    scale, zero = tl.load(scales + column, mask=there, other=1.0), tl.load(zeros + column, mask=there, other=0.0)
    for i in range(G):
        slope = tl.sum(tl.where((at == i)[:, None], x, 0.0), 0)
        before = tl.load(q + i * N + column, mask=there, other=0.0)
        wanted = (before - zero) * scale + slope / tl.load(own + i * G + i)
        chosen = _nearest(wanted, scale, zero, MOST)
        x -= tl.load(own + i * G + at)[:, None] * ((chosen - before) * scale)[None]
        tl.store(out + i * N + column, chosen, mask=there)
