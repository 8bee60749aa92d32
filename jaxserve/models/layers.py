"""The small parts that decoders share: normalisation and the gated feed-forward layer."""

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


@struct.dataclass
class GatedMLP:
    """down(silu(gate x) * up x)  (Shazeer, 2020: SwiGLU)."""

    gate_up: Any  # D -> [2, F]: both in one matrix, so that one matmul reads them
    down: Any  # F -> D

    def __call__(self, cfg, x):
        """x [T, D] to [T, D]."""
        both = self.gate_up.dot(x)  # [T, 2, F]
        return self.down.dot(jax.nn.silu(both[:, 0]) * both[:, 1])
