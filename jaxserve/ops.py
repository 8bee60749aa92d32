"""The one door to the kernels: reference on CPU, kernel on GPU, each in a shard_map so that it sees its own heads only.

T tokens of the step, R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G queries a kv head,
H head dim.
"""

import logging
import math
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels import await_masks as waiting
from pallas_kernels import rounding as rounding  # for jaxserve.lite

POOL = P(None, None, None, "tp", None)  # [L, N, S, K, H]
QUANTIZED_POOL = P(None, None, "tp")  # [L, N, K, ...]: the arrays of a pk.QuantizedPool
HEADS = P(None, "tp")  # [T, K, ...]
# Tokens up to which `fused_matmul` is quicker than XLA's product and what it makes of the rest: measured on an H200,
# whole steps of a 1.8B model (0.79 of the time with one token, 0.96 with two), gated also products of an 8B model.
FEW, FEW_GATED = 4, 16
FEW_INT4 = 8  # the same of `int4_fused`, against `int4_matmul`: 0.54 of the time with one token, 0.71 with eight
log = logging.getLogger("jaxserve")


@cache
def kernels():
    """Whether kernels are used; where a GPU can't, says why once."""
    if jax.default_backend() == "cpu":
        return False
    if reason := pk.available():
        log.warning("slow: the reference is used in place of the GPU kernels, because %s", reason)
    return not reason


def prepare():
    """Readies this process for programs with kernels in them that another process compiled."""
    if jax.default_backend() != "cpu":
        pk.prepare()


def _split(function, ins, outs):
    return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)


def kv_refuses(kind):
    """Why the device can't keep keys and values as `kind` (see `kv_pool`), as the end of a sentence; or None."""
    if kind == "fp8" and kernels() and (capability := pk.triton_call.device()[1]) < 89:
        return f"fp8 needs compute capability 8.9, and this GPU has {capability / 10}"
    return None


def kv_pool(shape, dtype, kind, mesh):
    """What holds keys or values [L, N, S, K, H], of ShapeDtypeStructs.

    kind: None for an array of `dtype`; int8, int4 or fp8 for codes, with a scale and a zero for each token and kv head.
    """
    if kind is None:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, POOL))
    where = NamedSharding(mesh, QUANTIZED_POOL)
    codes, parameters = (jax.ShapeDtypeStruct(*part, sharding=where) for part in pk.pool_shapes(shape, kind))
    return pk.QuantizedPool(codes, parameters, kind)  # type: ignore[arg-type]


def kv_bytes(head_dim, dtype, kind):
    """Bytes that a key, or a value, of one token and kv head takes in a pool."""
    if kind is None:
        return head_dim * jnp.dtype(dtype).itemsize
    parts = pk.pool_shapes((1, 1, 1, 1, head_dim), kind)
    return sum(math.prod(shape) * jnp.dtype(of).itemsize for shape, of in parts)


def _pool_spec(pool):
    return QUANTIZED_POOL if isinstance(pool, pk.QuantizedPool) else POOL


def rope_kv_write(k_pool, v_pool, qkv, cos, sin, layer, slot, q_norm=None, k_norm=None, eps=0.0):
    """Rotates queries and keys of qkv [T, K, G+2, H], and stores keys and values in the slots [T] of a layer's pools.

    The pools change in place.  cos, sin [T, H/2]; q_norm, k_norm [H] where queries and keys are normalised before.
    Returns the queries [T, K, G, H] and the pools.
    """
    write = pk.rope_kv_write if kernels() else pk.rope_kv_write_reference

    def local(k_pool, v_pool, qkv, cos, sin, slot, q_norm, k_norm):
        return write(k_pool, v_pool, qkv, cos, sin, layer, slot, q_norm=q_norm, k_norm=k_norm, eps=eps)

    pool = _pool_spec(k_pool)
    run = _split(local, (pool, pool, HEADS, P(), P(), P(), P(), P()), (HEADS, pool, pool))
    return run(k_pool, v_pool, qkv, cos, sin, slot, q_norm, k_norm)


def paged_attention(q, k_pool, v_pool, layer, spans, window=None):
    """Every token attends to its own row, up to its own position.  q [T, K, G, H] to the same shape."""
    known = {"layer": layer, "scale": q.shape[-1] ** -0.5, "window": window}
    pool = _pool_spec(k_pool)
    if spans.decode:
        attend = pk.paged_decode if kernels() else pk.paged_decode_reference
        run = _split(lambda q, k, v, pages, length: attend(q, k, v, pages=pages, length=length, **known),
                     (HEADS, pool, pool, P(), P()), HEADS)  # fmt: skip
        return run(q, k_pool, v_pool, spans.pages, spans.length)
    prefill = pk.paged_prefill if kernels() else pk.paged_prefill_reference

    def ragged(q, k, v, pages, first, count, start):
        return prefill(q, k, v, pages=pages, first=first, count=count, start=start, **known)

    run = _split(ragged, (HEADS, pool, pool, P(), P(), P(), P()), HEADS)
    return run(q, k_pool, v_pool, spans.pages, spans.first, spans.count, spans.start)


def grouped_matmul(x, weight, sizes, *, rows):
    """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the matrix of each; to [M, *out].

    weight [E, D, *out], split by its inputs (rows) or by its last axis; sizes int32[E]: the tokens of each expert.
    """
    multiply = pk.grouped_matmul if kernels() else pk.grouped_matmul_reference

    def local(x, weight, sizes):
        out = multiply(x, weight.reshape(*weight.shape[:2], -1), sizes).reshape(-1, *weight.shape[2:])
        return jax.lax.psum(out, "tp") if rows else out

    between = (None,) * (weight.ndim - 3)
    split = ("tp", *between, None) if rows else (None, *between, "tp")
    run = _split(local, (P(None, split[0]), P(None, *split), P()), P(None, *split[1:]))
    return run(x, weight, sizes)


def fuses(x, weight, axes, gated):
    """Whether `fused_matmul` is quicker than XLA's way, and can do it."""
    if not kernels() or x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        return False
    split = [n // _share(axis) for n, axis in zip(weight.shape, axes, strict=True)]
    fits = split[0] % pk.SKINNY_INPUTS == 0 and math.prod(split[1:]) // (1 + gated) % pk.SKINNY_OUTPUTS == 0
    return fits and x.shape[0] <= (FEW_GATED if gated else FEW)


def _share(axis):
    """Into how many parts the mesh cuts what lies along this axis of it."""
    return 1 if axis is None else jax.sharding.get_abstract_mesh().shape[axis]


def fused_matmul(x, weight, *, axes, **around):
    """x [T, D] times weight [D, *out], to [T, *out], in one kernel with what stands around it.

    axes: the mesh axis of each of [D, *out].  Of `around`: norm: None, or the weight [D] of the RMSNorm (eps) that x
    goes through before; gated: of [D, 2, F], to [T, F], silu(first) * second; residual: None, or what the result is
    added to.
    """

    def multiply(x, weight, *, gated, **more):
        y = pk.skinny_matmul(x, weight if gated else weight.reshape(weight.shape[0], -1), gated=gated, **more)
        return y if gated else y.reshape(x.shape[0], *weight.shape[1:])

    return _fused(multiply, x, (weight,), (axes,), axes, **around)


def gated_matmul(x, weight, *, axes):
    """silu(first) * second [T, F] of x [T, D] times weight [D, 2, F], in one kernel where that is quicker; or None.

    axes: the mesh axis of each of [D, 2, F].
    """
    if not kernels() or x.dtype != weight.dtype or _share(axes[0]) > 1:
        return None
    if not pk.gates(x.shape[0], x.shape[1], weight.shape[2] // _share(axes[2]), x.dtype):
        return None
    return _split(pk.gated_matmul, (P(), P(*axes)), P(None, axes[2]))(x, weight)


def int4_fuses(x, scale):
    """Whether `int4_fused` is quicker than `int4_matmul` and XLA around it, and can do it."""
    return kernels() and x.dtype.itemsize == scale.dtype.itemsize == 2 and x.shape[0] <= FEW_INT4


def int4_fused(x, packed, scale, zero, *, group, axes, **around):
    """As `fused_matmul`, of an int4 matrix; arguments as those of `int4_matmul`, and bias [*out] where nothing else is
    added to the result."""

    def multiply(x, packed, scale, zero, *, gated, **more):
        flat = (a.reshape(a.shape[0], -1) for a in (scale, zero))
        y = pk.int4_few(x, packed.reshape(-1, *packed.shape[-2:]), *flat, group=group, gated=gated, **more)
        return y if gated else y.reshape(x.shape[0], *scale.shape[1:])

    return _fused(multiply, x, (packed, scale, zero), (int4_axes(axes), axes, axes), axes, **around)


def _fused(multiply, x, weight, specs, axes, *, norm, eps, gated, residual, bias=None):
    """A product and what stands around it, by each device with its part of the weight: arrays, `specs` their axes."""
    out = axes[1:] if not gated else axes[2:]
    apart = _share(axes[0]) > 1  # each device has a part of the sums

    def local(x, weight, norm, residual):
        added = residual if bias is None else residual.reshape(-1)
        y = multiply(x, *weight, norm=norm, eps=eps, gated=gated, residual=None if apart else added)
        if not apart:
            return y
        y = jax.lax.psum(y, axes[0])
        return y if residual is None else residual + y

    added, where = (residual, P(None, *out)) if bias is None else (bias, P(*out))
    run = _split(local, (P(None, axes[0]), tuple(P(*of) for of in specs), P(), where), P(None, *out))
    return run(x, weight, norm, added)


def waits():
    """Whether the device can wait for masks: `await_masks`."""
    return kernels()


def await_masks(ticket, logits):
    """int32[R, W], masks that the host makes until logits [R, V] are there: see the kernel's file, `waiting`."""
    rows, words = logits.shape[0], -(-logits.shape[1] // 32)

    def local(ticket, logits):
        return waiting.await_masks(ticket, logits[:1, :1], rows=rows, words=words)

    return _split(local, (P(), P(None, "tp")), P())(ticket, logits)


def tell(ticket, tokens):
    """tokens int32[R], once they are where the host sees them."""
    return _split(waiting.tell, (P(), P()), P())(ticket, tokens)


def layout():
    """What this machine's layout of quantized weights is for, in words."""
    return "the kernels of a GPU, inputs in order" if kernels() else "the reference, which the CPU runs"


def int4_pack(q, *, group):
    """Nibbles q uint8[D, *out] as `int4_matmul` reads them on this device."""
    return pk.int4_tiles(q) if kernels() else pk.int4_pack(q, group=group)


def int4_shape(shape):
    """The shape of what `int4_pack` makes of nibbles of this shape."""
    inputs, *out = shape
    return (*out[:-1], out[-1] // 16, inputs // 64, 128) if kernels() else (inputs // 8, *out)


def int4_axes(axes):
    """The mesh axes of what `int4_pack` makes of nibbles with these."""
    return (*axes[1:], axes[0], None) if kernels() else tuple(axes)


def int4_scratch(packed):
    """Bytes that a product with a map of so many packed bytes may take for the map's values, while it lasts.

    A piece of them may be written while the one before is being read.
    """
    return min(4 * packed, 2 * pk.INT4_PIECE) if kernels() else 0


def int4_refuses(inputs, columns, group):
    """Why `int4_matmul` can't take a matrix of which a device has so many inputs and columns (of the last axis)."""
    if kernels() and (inputs % 64 or columns % 16 or group % 32):
        return (
            f"int4 weights with {inputs} inputs, {columns} columns and groups of {group} on a device; the kernels need "
            "multiples of 64, 16 and 32 (a smaller tp may help)"
        )
    if group % 8:
        return (
            f"int4 weights in groups of {group} inputs a device; they must be a multiple of 8 (a smaller tp may help)"
        )
    return None


def int4_matmul(x, packed, scale, zero, *, group, axes, dtype=None):
    """x [T, D] times an int4 matrix [D, *out], to [T, *out] in `dtype` (that of x unless said).

    packed: of `int4_pack`; scale, zero [D/group, *out]; axes: the mesh axis of each of [D, *out].
    """
    if kernels() and x.dtype.itemsize != 2:
        raise ValueError(f"int4 weights need dtype float16 or bfloat16 on a GPU, not {x.dtype.name}")
    multiply = pk.int4_matmul if kernels() else pk.int4_matmul_reference

    def local(x, packed, scale, zero):
        whole = packed.reshape(-1, *packed.shape[-2:]) if kernels() else packed.reshape(packed.shape[0], -1)
        flat = (a.reshape(a.shape[0], -1) for a in (scale, zero))
        out = multiply(x, whole, *flat, group=group, dtype=dtype).reshape(x.shape[0], *scale.shape[1:])
        return jax.lax.psum(out, axes[0]) if axes[0] else out

    ins = (P(None, axes[0]), P(*int4_axes(axes)), P(*axes), P(*axes))
    return _split(local, ins, P(None, *axes[1:]))(x, packed, scale, zero)


def int4_gated(x, packed, scale, zero, *, group, axes):
    """silu(first) * second [T, F] of the products of x [T, D] with an int4 matrix [D, 2, F], in one kernel; or None.

    Arguments as those of `int4_matmul`.
    """
    if not kernels() or x.dtype.itemsize != 2 or _share(axes[0]) > 1:
        return None

    def local(x, packed, scale, zero):
        flat = (a.reshape(a.shape[0], -1) for a in (scale, zero))
        return pk.int4_matmul(x, packed.reshape(-1, *packed.shape[-2:]), *flat, group=group, gated=True)

    return _split(local, (P(), P(*int4_axes(axes)), P(*axes), P(*axes)), P(None, axes[2]))(x, packed, scale, zero)


def int4_grouped(x, packed, scale, zero, sizes, *, group, axes):
    """As `grouped_matmul`, of int4 matrices [D, E, *out]; arguments as those of `int4_matmul`."""
    multiply = pk.int4_grouped if kernels() else pk.int4_grouped_reference

    def local(x, packed, scale, zero, sizes):
        G, E, *out = scale.shape
        whole = packed.reshape(E, -1, *packed.shape[-2:]) if kernels() else packed.reshape(packed.shape[0], E, -1)
        found = multiply(x, whole, scale.reshape(G, E, -1), zero.reshape(G, E, -1), sizes, group=group)
        found = found.reshape(-1, *out)
        return jax.lax.psum(found, axes[0]) if axes[0] else found

    ins = (P(None, axes[0]), P(*int4_axes(axes)), P(*axes), P(*axes), P())
    return _split(local, ins, P(None, *axes[2:]))(x, packed, scale, zero, sizes)


def eight_bit_axes(axes):
    """The mesh axes of a weight of `eight_bit_matmul`, from those of [D, *out]."""
    return (*axes[1:], axes[0])


def eight_bit_matmul(x, weight, scale, zero, known, *, group, axes, activations=None, dtype=None):
    """x [T, D] times an int8 or fp8 matrix [*out, D], to [T, *out] in `dtype` (that of x unless said).

    scale, zero (or None) [D/group, *out]; known: the scale of activations [], or None; activations: what x is rounded
    to first, None, "int8" or "fp8"; axes: the mesh axis of each of [D, *out].
    """
    multiply = pk.eight_bit_matmul if kernels() else pk.eight_bit_matmul_reference

    def local(x, weight, scale, zero, known):
        scale, zero = (a if a is None else a.reshape(a.shape[0], -1) for a in (scale, zero))
        whole = weight.reshape(-1, weight.shape[-1])
        out = multiply(x, whole, scale, zero, known, group=group, activations=activations, dtype=dtype)
        out = out.reshape(-1, *weight.shape[:-1])
        return jax.lax.psum(out, axes[0]) if axes[0] else out

    ins = (P(None, axes[0]), P(*eight_bit_axes(axes)), P(*axes), P(*axes), P())
    return _split(local, ins, P(None, *axes[1:]))(x, weight, scale, zero, known)


def eight_bit_grouped(x, weight, scale, zero, known, sizes, *, group, axes, activations=None):
    """As `grouped_matmul`, of int8 or fp8 matrices [E, *out, D]; arguments as those of `eight_bit_matmul`."""
    multiply = pk.grouped_eight_bit if kernels() else pk.grouped_eight_bit_reference

    def local(x, weight, scale, zero, known, sizes):
        E, *out, D = weight.shape
        scale, zero = (a if a is None else a.reshape(a.shape[0], E, -1) for a in (scale, zero))
        found = multiply(
            x, weight.reshape(E, -1, D), scale, sizes, zero, known, group=group, activations=activations
        ).reshape(-1, *out)
        return jax.lax.psum(found, axes[0]) if axes[0] else found

    ins = (P(None, axes[0]), P(*eight_bit_axes(axes)), P(*axes), P(*axes), P(), P())
    return _split(local, ins, P(None, *axes[2:]))(x, weight, scale, zero, known, sizes)
