"""Weights of 8-bit integers: SmoothQuant and compressed-tensors (W8A8), GPTQ of 8 bits (W8A16)."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve import ops


@struct.dataclass
class Int8:
    """A linear map [D, *out] whose elements are (q - zero) * scale, used like a `Dense`; or E of them.

    Where activations are quantized too, each token is rounded to int8 by its own largest magnitude (Xiao et al., 2023:
    SmoothQuant), or by a scale that was measured beforehand.
    """

    weight: jax.Array  # int8[*out, D], or the same integers in a floating type
    scale: jax.Array  # [D/group, *out]
    zero: jax.Array | None = None  # int16[D/group, *out]
    known: jax.Array | None = None  # [], the scale of activations
    bias: jax.Array | None = None  # [*out]
    group: int = struct.field(pytree_node=False, default=128)
    axes: tuple = struct.field(pytree_node=False, default=(None, None))  # mesh axis, or None, of each of [D, *out]
    activations: str | None = struct.field(pytree_node=False, default=None)  # "int8", or None: they stay as they are
    order: jax.Array | None = None  # int32[D]: in which the inputs are taken

    def _how(self):
        return {"group": self.group, "axes": self.axes, "activations": self.activations}

    def dot(self, x, dtype=None):
        """x [..., D] to [..., *out], accumulated in int32 or float32, given in `dtype` (that of x unless said)."""
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if self.order is None else flat[:, self.order]
        out = ops.eight_bit_matmul(flat, self.weight, self.scale, self.zero, self.known, dtype=dtype, **self._how())
        out = out.reshape(*x.shape[:-1], *out.shape[1:])
        return out if self.bias is None else out + jnp.broadcast_to(self.bias, out.shape)

    def grouped_dot(self, x, sizes, rows):
        """As `Dense.grouped_dot`."""
        x = x if self.order is None else x[:, self.order]
        return ops.eight_bit_grouped(x, self.weight, self.scale, self.zero, self.known, sizes, **self._how())
