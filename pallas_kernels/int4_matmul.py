"""Matrices of 4-bit integers times activations: W4A16.

An element of the matrix is (q - zero) * scale, with q of 0 to 15; scale and zero belong to `group` consecutive inputs
of one output.  D inputs, F outputs, T tokens.
"""

import jax
import jax.numpy as jnp

NIBBLES = 8  # of an int32


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
