"""Weights kept in their own type."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Dense:
    """A linear map; its outputs may have several axes, so that a tensor-parallel split is a split of one of them."""

    weight: jax.Array  # [D, *out]
    bias: jax.Array | None = None  # [*out]

    def dot(self, x, dtype=None):
        """x [..., D] to [..., *out], accumulated in float32, given in `dtype` (that of x unless said)."""
        out = jnp.tensordot(x, self.weight, 1, preferred_element_type=dtype or x.dtype)
        return out if self.bias is None else out + jnp.broadcast_to(self.bias, out.shape)


@struct.dataclass
class Tied:
    """The output head of a model that shares it with the embedding."""

    weight: jax.Array  # [V, D]

    def dot(self, x, dtype=None):
        return jnp.einsum("...d,vd->...v", x, self.weight, preferred_element_type=dtype or x.dtype)
