"""Mixture of experts: every token goes through the few feed-forward layers that a router picks.

T tokens, D width, E experts, X experts a token, F expert width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class MoE:
    """Softmax router, top-X experts (Shazeer et al., 2017; Jiang et al., 2024: Mixtral)."""

    router: Any  # D -> E
    gate_up: Any  # E of D -> [2, F]
    down: Any  # E of F -> D

    def __call__(self, cfg, x):
        """x [T, D] to [T, D]."""
        scores = jax.nn.softmax(self.router.dot(x, jnp.float32), -1)  # [T, E]
        share, expert = jax.lax.top_k(scores, cfg.experts_per_token)  # [T, X]
        if cfg.norm_topk:
            share = share / share.sum(-1, keepdims=True)
        order = jnp.argsort(expert.reshape(-1), stable=True)  # the tokens of an expert side by side
        sizes = jnp.bincount(expert.reshape(-1), length=cfg.experts).astype(jnp.int32)
        rows = x[order // cfg.experts_per_token]  # [T*X, D]
        both = self.gate_up.grouped_dot(rows, sizes, rows=False)  # [T*X, 2, F]
        out = self.down.grouped_dot(jax.nn.silu(both[:, 0]) * both[:, 1], sizes, rows=True)
        back = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(*share.shape, -1)
        return jnp.einsum("txd,tx->td", back, share.astype(x.dtype))
