"""Weights of float8_e4m3fn, with a scale for each tensor, output or block."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve import ops


@struct.dataclass
class Fp8:
    """A linear map [D, *out] whose elements are q * scale, used like a `Dense`; or E of them.

    Activations are rounded to fp8 too, where the device multiplies it: each token (each group of a token, where weights
    have groups) by its own largest magnitude, or by a scale that was measured beforehand (Micikevicius et al., 2022).
    """

    weight: jax.Array  # float8_e4m3fn[*out, D], or the same numbers in a larger type
    scale: jax.Array  # [D/group, *out]
    known: jax.Array | None = None  # [], the scale of activations
    bias: jax.Array | None = None  # [*out]
    group: int = struct.field(pytree_node=False, default=128)
    axes: tuple = struct.field(pytree_node=False, default=(None, None))  # mesh axis, or None, of each of [D, *out]
    activations: str | None = struct.field(pytree_node=False, default="fp8")  # None: they stay as they are

    def _how(self):
        return {"group": self.group, "axes": self.axes, "activations": self.activations}

    def dot(self, x, dtype=None):
        """x [..., D] to [..., *out], accumulated in float32, given in `dtype` (that of x unless said)."""
        flat = x.reshape(-1, x.shape[-1])
        out = ops.eight_bit_matmul(flat, self.weight, self.scale, None, self.known, dtype=dtype, **self._how())
        out = out.reshape(*x.shape[:-1], *out.shape[1:])
        return out if self.bias is None else out + jnp.broadcast_to(self.bias, out.shape)

    def grouped_dot(self, x, sizes, rows):
        """As `Dense.grouped_dot`."""
        return ops.eight_bit_grouped(x, self.weight, self.scale, None, self.known, sizes, **self._how())
