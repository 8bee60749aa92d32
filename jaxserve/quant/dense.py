"""Weights kept in their own type."""

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve import ops


@struct.dataclass
class Dense:
    """A linear map; its outputs may have several axes, so that a tensor-parallel split is a split of one of them."""

    weight: jax.Array  # [D, *out]
    bias: jax.Array | None = None  # [*out]
    axes: tuple | None = struct.field(pytree_node=False, default=None)  # mesh axis, or None, of each; None: not known

    def dot(self, x, dtype=None):
        """x [..., D] to [..., *out], accumulated in float32, given in `dtype` (that of x unless said)."""
        out = jnp.tensordot(x, self.weight, 1, preferred_element_type=dtype or x.dtype)
        return out if self.bias is None else out + jnp.broadcast_to(self.bias, out.shape)

    def gated(self, x):
        """silu(first) * second of `dot` [T, 2, F] of x [T, D], where a kernel makes it sooner; elsewhere None."""
        return None if self.bias is not None or self.axes is None else ops.gated_matmul(x, self.weight, axes=self.axes)

    def fuses(self, x, *, gated=False, residual=None):
        """Whether `fused` can do it and is quicker than XLA's way; of x the type and the number of tokens matter."""
        return self.bias is None and self.axes is not None and ops.fuses(x, self.weight, self.axes, gated)

    def fused(self, x, **around):
        """`dot` of x [T, D] and what stands around it (see `ops.fused_matmul`), where `fuses` says so."""
        return ops.fused_matmul(x, self.weight, axes=self.axes, **around)

    def grouped_dot(self, x, sizes, rows):
        """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the map [E, D, *out], to [M, *out].

        sizes int32[E]: how many each has; rows: the mesh splits the inputs, not the last axis.
        """
        return ops.grouped_matmul(x, self.weight, sizes, rows=rows)


@struct.dataclass
class Tied:
    """The output head of a model that shares it with the embedding."""

    weight: jax.Array  # [V, D]

    def dot(self, x, dtype=None):
        return jnp.einsum("...d,vd->...v", x, self.weight, preferred_element_type=dtype or x.dtype)
