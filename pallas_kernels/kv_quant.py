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
import numpy as np
from jax import lax

from pallas_kernels.triton_call import interpreted, jit, tl

BITS = {"int8": 8, "int4": 4, "fp8": 8}
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


def spread(x):
    """x [..., H] times a Hadamard matrix, float32: the same for queries and keys, it leaves their products as they are.

    A few elements of keys are much larger than the rest, and 16 codes for all leave the others little; spread over the
    head they do no harm (QuaRot, Ashkboos et al., 2024).  Each half of a head is multiplied in blocks of the largest
    power of two that divides it, and the halves are then added and subtracted.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    half = first.shape[-1]
    signs = jnp.asarray(spread_signs(half, half), jnp.float32)
    first, second = (jnp.einsum("...i,ij->...j", x, signs, precision="highest") for x in (first, second))
    return jnp.concatenate([first + second, first - second], -1) * (2 * spread_block(half)) ** -0.5


def spread_block(half):
    """The largest power of two that divides half a head."""
    return half & -half


def spread_signs(half, size):
    """What `spread` multiplies half a head with, 1, -1 and 0, as the corner of a matrix [size, size]."""
    block = np.ones((1, 1))
    while len(block) < spread_block(half):
        block = np.block([[block, block], [block, -block]])
    signs = np.zeros((size, size))
    signs[:half, :half] = np.kron(np.eye(half // len(block)), block)
    return signs


def top_code(kind):
    """The largest value that a code has: of fp8 on both sides of 0, of the others from 0 on."""
    return E4M3_MAX if kind == "fp8" else 2.0 ** BITS[kind] - 1


def quantize(x, kind):
    """Codes uint8[..., C] and parameters int32[...] of x [..., H]."""
    x = x.astype(jnp.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    top = top_code(kind)
    if kind == "fp8":
        scale, zero = jnp.maximum(high, -low) / top, jnp.zeros_like(low)
    else:
        scale, zero = (high - low) / top, low
    parameters = jnp.concatenate([scale, zero], -1).astype(jnp.float16)
    scale, zero = _scale_and_zero(parameters)
    steps = (x - zero) * (1.0 / jnp.where(scale > 0, scale, 1.0))
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


# ---- For the kernels.  They read codes as words of 16 bits, each with VALUES values of a head: as shared memory can
# turn matrices of 16-bit elements and of no smaller ones, keys and values then go to the tensor cores as codes, and
# become float16 in the registers from which they are multiplied, two at once.  A code in the low bits of a float16 is
# that code times 2**-24, a number like others to tensor cores, so that a mask is all that most values need.  Units,
# scales and zeros do not touch the single element: they are applied to sums over it.

# What brings weights times scales away from float16's denormals, and not over its largest number whatever the values.
BOOST = {"int4": 4, "int8": 64, "fp8": 256}


def kernel_constants(kind, dtype):
    """What kernels must know of the codes that queries of `dtype` meet."""
    return {
        "KIND": kind,
        "VALUES": 16 // BITS[kind],  # of a word
        "BOOST": 1 if dtype == jnp.float32 else BOOST[kind],
        "ASM": not interpreted(),
    }


def kernel_arguments(pool):
    return pool.codes, pool.parameters


@jit
def column(word, J: tl.constexpr, KIND: tl.constexpr, H: tl.constexpr):
    """Which element of a head value J of a word is."""
    if KIND == "int4":
        return 2 * word + J // 2 + (J % 2) * (H // 2)
    else:
        return 2 * word + J


@jit
def scale_and_zero(parameters, ASM: tl.constexpr):
    """float32 each."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 s, z; mov.b32 {s, z}, $2; cvt.f32.f16 $0, s; cvt.f32.f16 $1, z; }", "=f,=f,r", [parameters],
            (tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    else:
        scale = (parameters & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        zero = (parameters >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return scale.to(tl.float32), zero.to(tl.float32)


@jit
def unit(J: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    """The code of value J of a word, divided by what `values` gives."""
    if dtype == tl.float32:
        return 1.0
    elif KIND == "fp8":
        return 256.0
    elif KIND == "int4" and J % 2:
        return 2.0**20
    else:
        return 2.0**24


@jit
def values(words, J: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Value J of each word over its `unit`, exactly, as dtype: float16 or float32.

    Without ASM in plain operations, which do not take two at once.
    """
    if ASM and dtype != tl.float32:
        if KIND == "int4":
            SHIFT: tl.constexpr = "shr.b32 t, $1, 8; and.b32 $0, t, " if J > 1 else "and.b32 $0, $1, "
            CODE: tl.constexpr = SHIFT + ("0x00F000F0;" if J % 2 else "0x000F000F;")
        elif KIND == "int8":
            CODE: tl.constexpr = "prmt.b32 $0, $1, 0, 0x4341;" if J else "and.b32 $0, $1, 0x00FF00FF;"
        else:
            CODE: tl.constexpr = (
                f"shl.b32 t, $1, {8 - 8 * J}; shr.b32 u, t, 1; and.b32 u, u, 0x3F803F80; "
                "lop3.b32 $0, t, 0x80008000, u, 0xEA;"
            )
        return tl.inline_asm_elementwise("{ .reg .b32 t, u; " + CODE + " }", "=r,r", [words], tl.float16, True, 2)
    if KIND == "fp8":
        code = words >> (8 * J)
        half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)  # the same number, but for the bias of the exponent
        number = half.to(tl.uint16).to(tl.float16, bitcast=True)
        return number if dtype == tl.float16 else number.to(tl.float32) * 256.0
    if KIND == "int8":
        code = (words >> (8 * J)) & 0xFF
    elif dtype == tl.float32:
        code = (words >> (4 * J)) & 0xF
    else:
        code = (words >> (J // 2 * 8)) & (0xF0 if J % 2 else 0xF)
    return code.to(tl.float32) if dtype == tl.float32 else code.to(tl.uint16).to(tl.float16, bitcast=True)
