"""Mixture of experts: every token goes through the few feed-forward layers that a router picks.

T tokens, D width, E experts, X experts a token, F expert width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve.models.layers import rms_norm


@struct.dataclass
class MoE:
    """Softmax router, top-X experts (Shazeer et al., 2017; Jiang et al., 2024: Mixtral)."""

    router: Any  # D -> E
    gate_up: Any  # E of D -> [2, F]
    down: Any  # E of F -> D

    def __call__(self, cfg, norm, x):
        """x [T, D] and what the experts make of it, normalised."""
        return x + self.mix(cfg, rms_norm(x, norm, cfg.eps))

    def fuses(self, x):
        """Whether each product is one kernel: the router's is not."""
        return False

    def mix(self, cfg, x):
        """What the experts make of normalised x [T, D], to [T, D]."""
        share, order, sizes = self.route(cfg, x)
        rows = x[order // cfg.experts_per_token]  # [T*X, D]
        out = self.down.grouped_dot(self.inner(rows, sizes), sizes, rows=True)
        back = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(*share.shape, -1)
        return jnp.einsum("txd,tx->td", back, share.astype(x.dtype))

    def route(self, cfg, x):
        """The shares [T, X] of each token's experts, the order [T*X] in which an expert's tokens are side by side, and
        how many each expert has, int32[E]."""
        scores = jax.nn.softmax(self.router.dot(x, jnp.float32), -1)  # [T, E]
        share, expert = jax.lax.top_k(scores, cfg.experts_per_token)  # [T, X]
        if cfg.norm_topk:
            share = share / share.sum(-1, keepdims=True)
        order = jnp.argsort(expert.reshape(-1), stable=True)
        return share, order, jnp.bincount(expert.reshape(-1), length=cfg.experts).astype(jnp.int32)

    def inner(self, rows, sizes):
        """What comes into `down`, [T*X, F], of the tokens of expert 0, then those of expert 1, ..."""
        both = self.gate_up.grouped_dot(rows, sizes, rows=False)  # [T*X, 2, F]
        return jax.nn.silu(both[:, 0]) * both[:, 1]
