"""Matrices of 8-bit integers or float8_e4m3fn times activations: W8A8, and W8A16 where the device or model want it.

An element of the matrix [F, D] is (q - zero) * scale; scale and zero belong to `group` consecutive inputs of one
output.  With `activations`, x is rounded to the same type first: by the largest of a token, of a token and a group
where there are several, or by a scale known beforehand.  T tokens, D inputs, F outputs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import FP8, grouped_matmul, grouped_matmul_reference
from pallas_kernels.triton_call import device

MOST = {"int8": 127.0, "fp8": 448.0}  # largest magnitude of an element
TYPES = {"int8": jnp.int8, "fp8": FP8}
LEAST_TOKENS = 16  # that cuBLASLt multiplies in 8 bits; with fewer XLA would write the weights out in 16
FP8_CAPABILITY = 89  # Ada


def quantize(x, kind, *, group=None, known=None):
    """x [T, D] as (integers or fp8 [T, D] in float32, float32[T, D / group]): their product is close to x.

    known: a scale that was measured beforehand, in place of the largest magnitude over MOST.
    """
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, group or x.shape[1])
    if known is None:
        scale = jnp.maximum(jnp.abs(grouped).max(-1, keepdims=True), 1e-10) / MOST[kind]
    else:
        scale = jnp.broadcast_to(known.astype(jnp.float32), (*grouped.shape[:2], 1))
    q = jnp.clip(grouped / scale, -MOST[kind], MOST[kind])
    q = jnp.round(q) if kind == "int8" else q.astype(FP8).astype(jnp.float32)
    return q.reshape(x.shape), scale[..., 0]


def eight_bit_matmul_reference(x, weight, scale, zero=None, known=None, *, group, activations=None, dtype=None):
    """x [T, D] times a matrix, to [T, F], computed in float32, given in `dtype` (that of x unless said).

    weight [F, D] int8, fp8, or the same numbers in a larger type; scale, zero [D / group, F]; activations None, "int8"
    or "fp8"; known: the scale of activations, or None.
    """
    D, q, dtype = x.shape[1], weight.astype(jnp.float32), dtype or x.dtype
    if zero is None and group == D:  # scales of whole outputs come after the sum
        x_scale = None
        if activations:
            x, x_scale = quantize(x, activations, known=known)
        out = _dot(x.astype(jnp.float32), q, jnp.float32) * scale.astype(jnp.float32)
        return (out if x_scale is None else out * x_scale).astype(dtype)
    if activations:
        x, x_scale = quantize(x, activations, group=group, known=known)
        x = x * jnp.repeat(x_scale, group, 1)
    if zero is not None:
        q = q - jnp.repeat(zero.T.astype(jnp.float32), group, 1)
    return _dot(x.astype(jnp.float32), q * jnp.repeat(scale.T.astype(jnp.float32), group, 1), dtype)


def _dot(x, weight, dtype):
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def multiplies(kind) -> bool:
    """Whether the GPU compiled for multiplies numbers of this kind without making them wider first."""
    return kind == "int8" or device()[1] >= FP8_CAPABILITY


@functools.partial(jax.jit, static_argnames=("group", "activations", "dtype"))
def eight_bit_matmul(x, weight, scale, zero=None, known=None, *, group, activations=None, dtype=None):
    """The same on a GPU; weight int8 or fp8.

    Scales of whole outputs are XLA's matter, which calls cuBLASLt; scales of groups, and weights that are wider than
    what the device multiplies, that of `grouped_matmul`.
    """
    (T, D), dtype = x.shape, jnp.dtype(dtype or x.dtype)
    if activations and not multiplies(activations):
        activations = None
    if zero is None and group == D and activations:
        x = jnp.pad(x, ((0, max(0, LEAST_TOKENS - T)), (0, 0)))
        q, x_scale = quantize(x, activations, known=known)
        # A sum in bfloat16 saves writing it in float32: what follows only scales it.
        narrow = activations == "fp8" and dtype == jnp.bfloat16
        of = jnp.int32 if activations == "int8" else jnp.bfloat16 if narrow else jnp.float32
        out = _dot(q.astype(TYPES[activations]), weight, of).astype(jnp.float32)
        return (out * x_scale * scale.astype(jnp.float32))[:T].astype(dtype)
    x_scale = None
    if activations:
        q, x_scale = quantize(x, activations, group=group, known=known)
        x = q.astype(TYPES[activations])
    scale, zero = (a if a is None else a[:, None] for a in (scale, zero))
    return grouped_matmul(
        x, weight[None], scale=scale, zero=zero, x_scale=x_scale, group=group, transposed=True, dtype=dtype
    )


def grouped_eight_bit_reference(x, weight, scale, sizes, zero=None, known=None, *, group, activations=None):
    """As `grouped_matmul_reference`, of weight [E, F, D] and scale, zero [D / group, E, F]; x rounded as above."""
    dtype = x.dtype
    if activations:
        x, x_scale = quantize(x, activations, group=group, known=known)
        x = x * jnp.repeat(x_scale, group, 1)
    weight = weight.astype(jnp.float32)
    return grouped_matmul_reference(
        x.astype(jnp.float32), weight, sizes, scale=scale, zero=zero, group=group, transposed=True, dtype=dtype
    )


def grouped_eight_bit(x, weight, scale, sizes, zero=None, known=None, *, group, activations=None):
    """The same on a GPU."""
    x_scale, dtype = None, x.dtype
    if activations and multiplies(activations):
        q, x_scale = quantize(x, activations, group=group, known=known)
        x = q.astype(TYPES[activations])
    return grouped_matmul(
        x, weight, sizes, scale=scale, zero=zero, x_scale=x_scale, group=group, transposed=True, dtype=dtype
    )
