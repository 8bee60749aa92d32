"""The small parts that decoders share: normalisation, a product with what stands around it, the feed-forward layer.

T tokens of the step, D width, F feed-forward width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


def rms_norm(x, weight, eps):
    """x over the root of its mean square along the last axis (Zhang and Sennrich, 2019), in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype) * jnp.broadcast_to(
        weight, x.shape
    )


def product(weight, x, *, norm=None, eps=0.0, gated=False, residual=None):
    """weight.dot(x), after `rms_norm` of x [T, D] by `norm` [D], gated: silu(first) * second of its [T, 2, F], and
    added to `residual`; in one kernel where the weight has one for such an x.
    """
    if fuses(weight, x, gated=gated, residual=residual):
        return weight.fused(x, norm=norm, eps=eps, gated=gated, residual=residual)
    x = x if norm is None else rms_norm(x, norm, eps)
    if gated and hasattr(weight, "gated") and (y := weight.gated(x)) is not None:
        return y if residual is None else residual + y
    y = weight.dot(x)
    if gated:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y if residual is None else residual + y


def fuses(weight, x, *, gated=False, residual=None):
    """Whether `product` of such an x is one kernel; of x the type and the number of tokens matter."""
    # Kinds of weights without such kernels have no `fuses`.
    return hasattr(weight, "fuses") and weight.fuses(x, gated=gated, residual=residual)


@struct.dataclass
class GatedMLP:
    """down(silu(gate x) * up x)  (Shazeer, 2020: SwiGLU)."""

    gate_up: Any  # D -> [2, F]: both in one matrix, so that one matmul reads them
    down: Any  # F -> D

    def __call__(self, cfg, norm, x):
        """x [T, D] and what this makes of it, normalised."""
        inner = product(self.gate_up, x, norm=norm, eps=cfg.eps, gated=True)  # [T, F]
        return product(self.down, inner, residual=x)

    def fuses(self, x):
        """Whether each product is one kernel."""
        return fuses(self.gate_up, x, gated=True) and fuses(self.down, x, residual=x)
