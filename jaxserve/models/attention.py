"""Grouped-query attention over the paged cache.

T tokens of the step, D width, K kv heads, G queries a kv head, H head dim.
"""

from typing import Any

import jax
from flax import struct

from jaxserve.models.layers import fuses, product


@struct.dataclass
class GQA:
    """Attention in which G query heads share a key and value head (Ainslie et al., 2023)."""

    qkv: Any  # D -> [K, G+2, H]: a group's queries, its key, its value; one split of K splits all three
    o: Any  # K*G*H -> D
    q_norm: jax.Array | None = None  # [H], of the families that normalise queries and keys
    k_norm: jax.Array | None = None  # [H]

    def __call__(self, cfg, layer, window, norm, x, cos, sin, cache, spans):
        """x [T, D] and attention of it, normalised, by rotations [T, H/2]; and the cache with the keys and values."""
        qkv = product(self.qkv, x, norm=norm, eps=cfg.eps)  # [T, K, G+2, H]
        norms = self.q_norm, self.k_norm
        out, cache = cache.attend(layer, qkv, cos, sin, spans, norms, cfg.eps, window)
        return product(self.o, out.reshape(x.shape[0], -1), residual=x), cache

    def fuses(self, x):
        """Whether each product is one kernel."""
        return fuses(self.qkv, x) and fuses(self.o, x, residual=x)
