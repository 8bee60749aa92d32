"""The one door to the kernels: reference on CPU, kernel on GPU, each in a shard_map so that it sees its own heads only.

T tokens of the step, R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G queries a kv head,
H head dim.
"""

import logging
from functools import cache

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk

POOL = P(None, None, None, "tp", None)  # [L, N, S, K, H]
HEADS = P(None, "tp")  # [T, K, ...]
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


def rope_kv_write(k_pool, v_pool, qkv, cos, sin, layer, slot, q_norm=None, k_norm=None, eps=0.0):
    """Rotates queries and keys of qkv [T, K, G+2, H], and stores keys and values in the slots [T] of a layer's pools.

    The pools change in place.  cos, sin [T, H/2]; q_norm, k_norm [H] where queries and keys are normalised before.
    Returns the queries [T, K, G, H] and the pools.
    """
    write = pk.rope_kv_write if kernels() else pk.rope_kv_write_reference

    def local(k_pool, v_pool, qkv, cos, sin, slot, q_norm, k_norm):
        return write(k_pool, v_pool, qkv, cos, sin, layer, slot, q_norm=q_norm, k_norm=k_norm, eps=eps)

    run = _split(local, (POOL, POOL, HEADS, P(), P(), P(), P(), P()), (HEADS, POOL, POOL))
    return run(k_pool, v_pool, qkv, cos, sin, slot, q_norm, k_norm)


def paged_attention(q, k_pool, v_pool, layer, spans, window=None):
    """Every token attends to its own row, up to its own position.  q [T, K, G, H] to the same shape."""
    known = {"layer": layer, "scale": q.shape[-1] ** -0.5, "window": window}
    if spans.decode:
        attend = pk.paged_decode if kernels() else pk.paged_decode_reference
        run = _split(lambda q, k, v, pages, length: attend(q, k, v, pages=pages, length=length, **known),
                     (HEADS, POOL, POOL, P(), P()), HEADS)  # fmt: skip
        return run(q, k_pool, v_pool, spans.pages, spans.length)
    attend = pk.paged_prefill if kernels() else pk.paged_prefill_reference

    def ragged(q, k, v, pages, first, count, start):
        return attend(q, k, v, pages=pages, first=first, count=count, start=start, **known)

    run = _split(ragged, (HEADS, POOL, POOL, P(), P(), P(), P()), HEADS)
    return run(q, k_pool, v_pool, spans.pages, spans.first, spans.count, spans.start)


def expert_mlp(x, gate_up, down, sizes):
    """Gated feed-forward layers of E experts.

    x [M, D]: the tokens of expert 0, then those of expert 1, ...; sizes int32[E]: how many each has;
    gate_up [E, D, 2, F]; down [E, F, D].  Returns [M, D].
    """

    def local(x, gate_up, down, sizes):
        both = jax.lax.ragged_dot(x, gate_up.reshape(*gate_up.shape[:2], -1), sizes)
        gate, up = jnp.split(both, 2, axis=-1)
        return jax.lax.psum(jax.lax.ragged_dot(jax.nn.silu(gate) * up, down, sizes), "tp")

    specs = (P(), P(None, None, None, "tp"), P(None, "tp", None), P())
    return _split(local, specs, P())(x, gate_up, down, sizes)


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
