"""Matrices, one an expert, times the tokens that were sent to it: what a mixture of experts does.

Tokens stand expert by expert; how many each has is known on the device only, so a program finds its expert itself.
Elements of the matrices may have 16 bits, or 8 with a scale (and a zero) for every group of inputs of an output; with
one matrix and no sizes it is the matmul for those.  M tokens, E experts, D inputs, F outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call

FP8 = jnp.dtype(jnp.float8_e4m3fn)


def grouped_matmul_reference(x, weight, sizes, *, scale=None, zero=None, group=None, transposed=False, dtype=None):
    """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the matrix of each; to [M, F].

    weight [E, D, F], or transposed [E, F, D]; sizes int32[E]; scale and zero [D / group, E, F].  Accumulated in
    float32, given in `dtype` (that of x unless said).
    """
    if transposed:
        weight = jnp.swapaxes(weight, 1, 2)
    if scale is not None:
        weight = weight.astype(jnp.float32)
        if zero is not None:
            weight = weight - _spread(zero, group)
        weight = (weight * _spread(scale, group)).astype(x.dtype)
    out = jax.lax.ragged_dot(x, weight.astype(x.dtype), sizes, preferred_element_type=jnp.float32)
    return out.astype(dtype or x.dtype)


def _spread(a, group):
    """[D / group, E, F] as float32[E, D, F]."""
    return jnp.repeat(jnp.swapaxes(a, 0, 1), group, 1).astype(jnp.float32)


@jit
def expert_tile(sizes_ptr, tile, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr,
          COUNT: tl.constexpr):  # fmt: skip
    """The expert of the tile-th block of tokens of the experts from FIRST on, its first token, and the expert's end.

    EXPERTS or more where there is no such block.
    """
    e = tl.arange(0, PADDED)
    size = tl.load(sizes_ptr + e, mask=e < EXPERTS, other=0)
    tiles = tl.where((e >= FIRST) & (e < FIRST + COUNT), (size + BLOCK - 1) // BLOCK, 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    start = tl.sum(tl.where(e < expert, size, 0), 0)
    own = tl.sum(tl.where(e == expert, size, 0), 0)
    return expert, start + (tile - before) * BLOCK, start + own


@jit
def _half(bits):
    """float16 of the bits of float8_e4m3fn: exact, NaN aside."""
    wide = bits.to(tl.uint16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0


@jit
def _grouped(x_ptr, w_ptr, sizes_ptr, scale_ptr, zero_ptr, x_scale_ptr, M, out_ptr, D: tl.constexpr, F: tl.constexpr,
             EXPERTS: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
             TRANSPOSED: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr,
             X_SCALED: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """A block of tokens of one expert and of outputs.  Grid: blocks of outputs, blocks of tokens.

    GROUP 0: scales, if SCALED, are of whole columns.  BITS: the weight is given as the bits of fp8.
    """
    if EXPERTS > 1:
        expert, first, last = expert_tile(sizes_ptr, tl.program_id(1), BLOCK_M, EXPERTS, PADDED, FIRST, COUNT)
        if expert >= EXPERTS:
            return
    else:
        expert, first, last = FIRST, tl.program_id(1) * BLOCK_M, M
    row, column = first + tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_D)
    here, wanted = row < last, column < F
    mine = tl.cast(expert - FIRST, tl.int64)
    x_at = x_ptr + row[:, None] * D + k[None, :]
    if TRANSPOSED:
        w_at, step = w_ptr + mine * (D * F) + column[None, :] * D + k[:, None], BLOCK_D
    else:
        w_at, step = w_ptr + mine * (D * F) + k[:, None] * F + column[None, :], BLOCK_D * F
    at = expert * F + column  # of scales, which all experts' outputs share a row of
    integers: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.int32 if integers and GROUP == 0 else tl.float32)
    for start in range(0, D, BLOCK_D):
        x_here, w_here = here[:, None], wanted[None, :]
        if not WHOLE:
            x_here, w_here = x_here & (start + k < D)[None, :], w_here & (start + k < D)[:, None]
        x, w = tl.load(x_at, mask=x_here, other=0.0), tl.load(w_at, mask=w_here, other=0.0)
        x_at += BLOCK_D
        w_at += step
        if BITS:
            w = _half(w)
        if GROUP == 0:
            acc = tl.dot(x, w.to(x.dtype), acc, out_dtype=acc.dtype)
        else:
            of = start // GROUP
            w = w.to(x.dtype)
            if ZERO:
                w -= tl.load(zero_ptr + of * (EXPERTS * F) + at, mask=wanted, other=0).to(x.dtype)[None, :]
            part = tl.dot(x, w, out_dtype=tl.int32 if integers else tl.float32).to(tl.float32)
            if X_SCALED:
                part *= tl.load(x_scale_ptr + row * (D // GROUP) + of, mask=here, other=0)[:, None]
            acc += part * tl.load(scale_ptr + of * (EXPERTS * F) + at, mask=wanted, other=0).to(tl.float32)[None, :]
    acc = acc.to(tl.float32)
    if SCALED and GROUP == 0:
        acc *= tl.load(scale_ptr + at, mask=wanted, other=0).to(tl.float32)[None, :]
        if X_SCALED:
            acc *= tl.load(x_scale_ptr + row, mask=here, other=0)[:, None]
    to = out_ptr + row.to(tl.int64)[:, None] * F + column[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & wanted[None, :])


def blocks(tokens, experts, inputs, outputs, x_itemsize, itemsize, group):
    """(BLOCK_M, BLOCK_F, BLOCK_D, warps, stages) for so many tokens in all; not measured yet.

    At most 96 KiB of shared memory, which every GPU from Ampere on has.
    """
    block_m = min(128, max(16, power_of_two(cdiv(tokens, experts))))
    block_f = 128 if block_m >= 64 else 64 if experts > 1 or outputs >= 8192 else 32
    block_d = math.gcd(128 if x_itemsize == 1 or block_m < 64 else 64, group or 128)  # no group is cut
    if inputs % block_d:
        block_d = min(block_d, 64)
    stage = block_m * block_d * x_itemsize + block_f * block_d * itemsize
    wide = block_f * block_d * 2 if itemsize < x_itemsize else 0  # of one block, made as wide as the tokens
    return block_m, block_f, block_d, 8 if block_m == 128 else 4, max(2, min(5, ((96 << 10) - wide) // stage))


@functools.partial(jax.jit, static_argnames=("group", "transposed", "dtype", "first", "experts", "sizing"))
def grouped_matmul(x, weight, sizes=None, *, scale=None, zero=None, x_scale=None, group=None, transposed=False,
                   dtype=None, out=None, first=0, experts=None, sizing=None):  # fmt: skip
    """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the matrix of each; to [M, F].

    weight [E, D, F], or transposed [E, F, D], of x's type, or int8 or fp8 with scale [D / group, E, F] and zero of the
    same shape; group None: one scale an output.  x may be int8 or fp8 as the weight is, with x_scale float32
    [M, D / group].  sizes int32[E]; None where E is 1.  With `first`, the weight is of some of `experts` only; tokens
    of others keep what `out` has for them.
    """
    (M, D), count, F = x.shape, weight.shape[0], weight.shape[1 if transposed else 2]
    experts = experts or count
    group = 0 if group is None or (group == D and zero is None) else group
    bits = weight.dtype == FP8 and x.dtype != FP8
    if bits:
        weight = jax.lax.bitcast_convert_type(weight, jnp.uint8)
    sizing = sizing or blocks(M, experts, D, F, x.dtype.itemsize, weight.dtype.itemsize, group)
    block_m, block_f, block_d, warps, stages = sizing
    tiles = cdiv(M, block_m) if experts == 1 else min(M, cdiv(M, block_m) + count)
    inputs = [x, weight, *(x if a is None else a for a in (sizes, scale, zero, x_scale)), M]
    new = [jax.ShapeDtypeStruct((M, F), dtype or x.dtype)] if out is None else []
    (out,) = triton_call(
        _grouped, *inputs, *([] if out is None else [out]), out=new, grid=(cdiv(F, block_f), tiles),
        in_place=() if new else (len(inputs),), warps=warps, stages=stages, D=D, F=F, EXPERTS=experts,
        PADDED=power_of_two(experts), FIRST=first, COUNT=count, TRANSPOSED=transposed,
        GROUP=group, SCALED=scale is not None, ZERO=zero is not None, X_SCALED=x_scale is not None, BITS=bool(bits),
        WHOLE=D % block_d == 0, BLOCK_M=block_m, BLOCK_F=block_f, BLOCK_D=block_d,
    )  # fmt: skip
    return out
