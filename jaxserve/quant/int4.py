"""Weights of 4 bits, with a scale and a zero point for every group of inputs: what AWQ and GPTQ checkpoints hold.

How the nibbles lie in memory is up to `ops.int4_pack`, which knows the device.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve import ops


@struct.dataclass
class Int4:
    """A linear map [D, *out] whose elements are (q - zero) * scale, q of 0 to 15, used like a `Dense`; or E of them."""

    packed: jax.Array  # of `ops.int4_pack`
    scale: jax.Array  # [D/group, *out]
    zero: jax.Array  # uint8[D/group, *out]
    bias: jax.Array | None = None  # [*out]
    group: int = struct.field(pytree_node=False, default=128)
    axes: tuple = struct.field(pytree_node=False, default=(None, None))  # mesh axis, or None, of each of [D, *out]
    order: jax.Array | None = None  # int32[D]: in which the inputs are taken

    def dot(self, x, dtype=None):
        """x [..., D] to [..., *out], accumulated in float32, given in `dtype` (that of x unless said)."""
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if self.order is None else flat[:, self.order]
        out = ops.int4_matmul(flat, self.packed, self.scale, self.zero, group=self.group, axes=self.axes, dtype=dtype)
        out = out.reshape(*x.shape[:-1], *out.shape[1:])
        return out if self.bias is None else out + jnp.broadcast_to(self.bias, out.shape)

    def gated(self, x):
        """silu(first) * second of `dot` [T, 2, F] of x [T, D], where a kernel makes it; elsewhere None."""
        if self.bias is not None:
            return None
        x = x if self.order is None else x[:, self.order]
        return ops.int4_gated(x, self.packed, self.scale, self.zero, group=self.group, axes=self.axes)

    def fuses(self, x, *, gated=False, residual=None):
        """As `Dense.fuses`."""
        plain = not gated and residual is None
        return self.order is None and (plain or self.bias is None) and ops.int4_fuses(x, self.scale)

    def fused(self, x, **around):
        """As `Dense.fused`."""
        held = {"group": self.group, "axes": self.axes, "bias": self.bias}
        return ops.int4_fused(x, self.packed, self.scale, self.zero, **held, **around)

    def grouped_dot(self, x, sizes, rows):
        """As `Dense.grouped_dot`."""
        x = x if self.order is None else x[:, self.order]
        return ops.int4_grouped(x, self.packed, self.scale, self.zero, sizes, group=self.group, axes=self.axes)


def group_of(stored, inputs):
    """The group that is held for a stored one, where a device has `inputs` of the inputs.

    Larger groups are cut, their scales repeated: 128 is the most that the kernels take.
    """
    return math.gcd(stored, inputs, 128)


def nearest(weight, group):
    """(q uint8[D, *out], scale [D/group, *out], zero uint8[D/group, *out]) of a weight [D, *out], rounded to nearest.

    Asymmetric, as AutoAWQ does it: the range of a group, with 0 in it, is cut into 15 steps.
    """
    grouped = weight.astype(jnp.float32).reshape(-1, group, *weight.shape[1:])
    low, high = jnp.minimum(grouped.min(1), 0), jnp.maximum(grouped.max(1), 0)
    scale = jnp.maximum(high - low, 1e-5) / 15
    zero = jnp.clip(jnp.round(-low / scale), 0, 15)
    q = jnp.clip(jnp.round(grouped / scale[:, None]) + zero[:, None], 0, 15)
    return q.reshape(weight.shape).astype(jnp.uint8), scale.astype(weight.dtype), zero.astype(jnp.uint8)


def quantize(dense, group, axes=None):
    """An Int4 of a `Dense`, rounded to nearest."""
    q, scale, zero = nearest(dense.weight, group)
    axes = axes or (None,) * dense.weight.ndim
    return Int4(ops.int4_pack(q, group=group), scale, zero, bias=dense.bias, group=group, axes=axes)
