"""Grouped-query attention over the paged cache.

T tokens of the step, D width, K kv heads, G queries a kv head, H head dim.
"""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class GQA:
    """Attention in which G query heads share a key and value head (Ainslie et al., 2023)."""

    qkv: Any  # D -> [K, G+2, H]: a group's queries, its key, its value; one split of K splits all three
    o: Any  # K*G*H -> D
    q_norm: jax.Array | None = None  # [H], of the families that normalise queries and keys
    k_norm: jax.Array | None = None  # [H]

    def __call__(self, cfg, layer, window, x, cos, sin, cache, spans):
        """x [T, D] and the rotations [T, H/2] to [T, D] and the cache with this step's keys and values."""
        qkv = self.qkv.dot(x)  # [T, K, G+2, H]
        norms = self.q_norm, self.k_norm
        out, cache = cache.attend(layer, qkv, cos, sin, spans, norms, cfg.eps, window)
        return self.o.dot(out.reshape(x.shape[0], -1)), cache
