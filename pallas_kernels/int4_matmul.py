"""Matrices of 4-bit integers times activations: W4A16.

An element of the matrix is (q - zero) * scale, with q of 0 to 15; scale and zero belong to `group` consecutive inputs
of one output.  D inputs, F outputs, T tokens.

Two ways, by the number of tokens: mma of integers (int4_few.py) and wgmma (hopper_int4.py); where there is no wgmma,
and for outputs that it does not take, a matmul of XLA's on the values, written out first.  All read the same tiles.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from pallas_kernels.int4_few import int4_few
from pallas_kernels.int4_mma import int4_by_values, int4_values
from pallas_kernels.mosaic import lowers
from pallas_kernels.triton_call import device

NIBBLES = 8  # of an int32
SKINNY = 8  # most tokens for which loads are all that counts
SKINNY_ELSEWHERE = 32  # the same where there is no wgmma
PIECE = 256 << 20  # bytes of values at a time: the results of several pieces have to be put side by side afterwards
EXPERTS_SKINNY, EXPERTS_SKINNY_ELSEWHERE = 2, 24  # likewise, tokens of an expert on average


def int4_pack(q, *, group):
    """q uint8[D, *out] of 0 to 15, as int32[D/8, *out]: what `int4_matmul_reference` reads.

    Nibble j of the i-th int32 of a group is the group's input j * group / 8 + i, so that neighbours stay neighbours.
    """
    out = q.shape[1:]
    q = q.reshape(-1, NIBBLES, group // NIBBLES, *out).astype(jnp.uint32)
    packed = sum(q[:, j] << jnp.uint32(4 * j) for j in range(NIBBLES))
    return jax.lax.bitcast_convert_type(packed, jnp.int32).reshape(-1, *out)


def int4_dequantize(packed, scale, zero, *, group, dtype):
    """The matrix [D, F] of packed int32[D/8, F], scale [D/group, F], zero uint8[D/group, F]; computed in float32."""
    F = packed.shape[1]
    words = packed.reshape(-1, 1, group // NIBBLES, F)
    q = jnp.concatenate([(words >> (4 * j)) & 15 for j in range(NIBBLES)], 1).reshape(-1, group, F)
    w = (q.astype(jnp.float32) - zero[:, None].astype(jnp.float32)) * scale[:, None].astype(jnp.float32)
    return w.astype(dtype).reshape(-1, F)


def int4_matmul_reference(x, packed, scale, zero, *, group, dtype=None):
    """x [T, D] times the matrix of `int4_dequantize`, accumulated in float32, given in `dtype` (that of x unless said).

    A group at a time: on a CPU the dequantized group stays in its cache, and takes no memory.
    """
    T, F, rows = x.shape[0], packed.shape[1], group // NIBBLES

    def add(i, acc):
        words = jax.lax.dynamic_slice_in_dim(packed, i * rows, rows)
        s, z = (jax.lax.dynamic_slice_in_dim(a, i, 1).astype(jnp.float32) for a in (scale, zero))
        w = jnp.concatenate([(((words >> (4 * j)) & 15).astype(jnp.float32) - z) * s for j in range(NIBBLES)])
        part = jax.lax.dynamic_slice_in_dim(x, i * group, group, 1)
        return acc + jnp.dot(part, w.astype(x.dtype), preferred_element_type=jnp.float32)

    acc = jax.lax.fori_loop(0, scale.shape[0], add, jnp.zeros((T, F), jnp.float32))
    return acc.astype(dtype or x.dtype)


def int4_matmul(x, tiles, scale, zero, *, group, dtype=None, gated=False):
    """x [T, D] times the matrix of `int4_tiles`, accumulated in float32, given in `dtype` (that of x unless said).

    gated: the matrix is [D, 2 * F], and silu(first) * second [T, F] of the products is given.
    x bfloat16 or float16; tiles int32[F / 16, D / 64, 128]; scale [D / group, F] of 16 bits; zero uint8[D / group, F];
    group 32, 64 or 128.
    """
    T, F = x.shape[0], scale.shape[1]
    arguments = {"group": group, "dtype": dtype}
    hopper = _hopper(x, F, scale, group)
    skinny = SKINNY if hopper else SKINNY_ELSEWHERE
    if skinny >= T:
        return int4_few(x, tiles, scale, zero, gated=gated, **arguments)
    if hopper:
        from pallas_kernels.hopper_int4 import int4_wgmma  # imports Mosaic, which takes half a second

        return int4_wgmma(x, tiles, scale, zero, gated=gated, **arguments)
    y = int4_by_values(x, tiles, scale, zero, at_once=PIECE, **arguments)
    return jax.nn.silu(y[:, : F // 2]) * y[:, F // 2 :] if gated else y


def _hopper(x, F, scale, group, *experts):
    """Whether the kernel for Hopper takes it."""
    types = x.dtype.name, scale.dtype.name
    return device()[1] == 90 and F % 128 == 0 and lowers("hopper_int4", "int4 matmuls are", *types, group, *experts)


def int4_grouped_reference(x, packed, scale, zero, sizes, *, group):
    """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the matrix of each; to [M, F].

    packed of `int4_pack`, int32[D/8, E, F]; scale, zero [D/group, E, F]; sizes int32[E].
    """
    flat = (a.reshape(a.shape[0], -1) for a in (packed, scale, zero))
    values = int4_dequantize(*flat, group=group, dtype=x.dtype).reshape(x.shape[1], *scale.shape[1:])
    return grouped_matmul_reference(x, jnp.swapaxes(values, 0, 1), sizes)


def int4_grouped(x, tiles, scale, zero, sizes, *, group):
    """The same on a GPU: tiles int32[E, F / 16, D / 64, 128] of `int4_tiles`."""
    (M, D), (_, E, F) = x.shape, scale.shape
    flat = [tiles.reshape(-1, *tiles.shape[2:]), *(a.reshape(a.shape[0], -1) for a in (scale, zero))]
    hopper = _hopper(x, F, scale, group, E)
    skinny = EXPERTS_SKINNY if hopper else EXPERTS_SKINNY_ELSEWHERE
    if skinny * E >= M:
        return int4_few(x, *flat, sizes, group=group)
    if hopper:
        from pallas_kernels.hopper_int4 import int4_experts

        return int4_experts(x, *flat, sizes, group=group)
    at_once = max(1, PIECE // (F * D * x.dtype.itemsize))
    out = None if at_once >= E else jnp.zeros((M, F), x.dtype)
    for first in range(0, E, at_once):
        count = min(at_once, E - first)
        values = int4_values(*flat, group=group, dtype=x.dtype, first=first * F, outputs=count * F)
        values = values.reshape(count, F, D)
        out = grouped_matmul(x, values, sizes, transposed=True, out=out, first=first, experts=E)
    return out
