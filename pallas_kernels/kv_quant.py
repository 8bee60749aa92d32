"""Quantized keys and values: how numbers become codes, and how codes lie in the pages of the cache.

The key of one token and kv head has a scale and a zero, float16, and its value has them; codes are made with the
rounded ones.  int8 and int4 are asymmetric as in LMDeploy's TurboMind: scale = (max - min) / (2**bits - 1), zero = min,
code = round((x - zero) / scale), x = code * scale + zero.  fp8 (e4m3) has no zero: its largest number stands for the
largest absolute value.

L layers, N pages, S tokens a page, K kv heads, H head dim, C bytes of codes: H, or H / 2 for int4, where byte i has
elements i (low nibble) and i + H/2: the halves of a head are what kernels rotate and multiply.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

BITS = {"int8": 8, "int4": 4, "fp8": 8}
PARAMETERS = 4  # bytes of a scale and a zero
E4M3_MAX = 448.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "parameters"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class QuantizedPool:
    """What takes the place of a pool [L, N, S, K, H]; what a page has of one head lies together."""

    codes: jax.Array  # uint8[L, N, K, S, C]
    parameters: jax.Array  # int32[L, N, K, S]  two float16: the scale, and in the upper half the zero
    kind: str  # a key of BITS

    @property
    def shape(self):
        """L, N, S, K, H"""
        L, N, K, S, C = self.codes.shape
        return L, N, S, K, C * 8 // BITS[self.kind]


def pool_shapes(shape, kind):
    """The arrays of a QuantizedPool that takes the place of [L, N, S, K, H], as (shape, type) pairs."""
    L, N, S, K, H = shape
    return ((L, N, K, S, H * BITS[kind] // 8), jnp.uint8), ((L, N, K, S), jnp.int32)


def quantize(x, kind):
    """Codes uint8[..., C] and parameters int32[...] of x [..., H]."""
    x = x.astype(jnp.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    top = E4M3_MAX if kind == "fp8" else 2.0 ** BITS[kind] - 1
    if kind == "fp8":
        scale, zero = jnp.maximum(high, -low) / top, jnp.zeros_like(low)
    else:
        scale, zero = (high - low) / top, low
    parameters = jnp.concatenate([scale, zero], -1).astype(jnp.float16)
    scale, zero = _scale_and_zero(parameters)
    steps = (x - zero) / jnp.where(scale > 0, scale, 1.0)
    if kind == "fp8":
        codes = lax.bitcast_convert_type(jnp.clip(steps, -top, top).astype(jnp.float8_e4m3fn), jnp.uint8)
    else:
        codes = jnp.clip(jnp.floor(steps + 0.5), 0, top).astype(jnp.uint8)
    if kind == "int4":
        low, high = jnp.split(codes, 2, axis=-1)
        codes = low | (high << 4)
    return codes, lax.bitcast_convert_type(parameters, jnp.int32)


def dequantize(codes, parameters, kind):
    """float32[..., H] of codes uint8[..., C] and parameters int32[...]: exact, and NaN where the numbers were."""
    scale, zero = _scale_and_zero(lax.bitcast_convert_type(parameters, jnp.float16))
    if kind == "fp8":
        codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    elif kind == "int4":
        codes = jnp.concatenate([codes & 15, codes >> 4], -1)
    return codes.astype(jnp.float32) * scale + zero


def _scale_and_zero(parameters):
    """float32[..., 1] each, of float16[..., 2]."""
    wide = parameters.astype(jnp.float32)
    return wide[..., :1], wide[..., 1:]
