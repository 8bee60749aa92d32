"""The KV cache: pages of keys and values of all layers, allocated once, and the place of a step's tokens in them.

T tokens of the step, R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G queries a kv head,
H head dim.  Page 0 takes the writes of padding, so nothing downstream needs a mask for it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve import ops

KINDS = {0: None, 4: "int4", 8: "int8", 16: "fp8"}  # by quant_policy; None: the type of the activations


@struct.dataclass
class Spans:
    """Which tokens of a step belong to which row, and where each row's pages are."""

    first: jax.Array  # int32[R]  index in T of the row's first token
    start: jax.Array  # int32[R]  its position in the request
    count: jax.Array  # int32[R]  tokens of the row; 0 in unused rows
    pages: jax.Array  # int32[R, P]
    rope_len: jax.Array  # int32[R]  length for which the row's rotations are computed (dynamic NTK)
    row: jax.Array  # int32[T]
    position: jax.Array  # int32[T]  -1 in padding
    decode: bool = struct.field(pytree_node=False)  # token t is row t's only one

    @classmethod
    def locate(cls, tokens, start, count, pages, rope_len):
        """Rows lie in T one behind the other, in order.  `tokens` = T; T == R means one token a row."""
        rows = start.shape[0]
        decode = tokens == rows
        first = jnp.arange(rows, dtype=jnp.int32) if decode else jnp.cumsum(count) - count
        index = jnp.arange(tokens, dtype=jnp.int32)
        row = (
            index
            if decode
            else jnp.clip(
                jnp.searchsorted(first + count, index, side="right", method="compare_all"), 0, rows - 1
            ).astype(jnp.int32)
        )
        offset = index - first[row]
        position = jnp.where((offset >= 0) & (offset < count[row]), start[row] + offset, -1)
        return cls(first, start, count, pages, rope_len, row, position, decode)

    @property
    def length(self):
        """int32[R]: keys that the row's last token sees; 0 in unused rows."""
        return jnp.where(self.count > 0, self.start + self.count, 0)

    def slot(self, page_size):
        """int32[T]: where each token's key goes, page * S + offset."""
        page = self.pages[self.row, jnp.maximum(self.position, 0) // page_size]
        return jnp.where(self.position < 0, 0, page * page_size + self.position % page_size)


@struct.dataclass
class PagedKV:
    """Keys and values, as they were computed or quantized: the type of a pool decides (see ops.kv_pool).

    A pool is for all layers: a call pays for each argument.
    """

    k: Any  # [L, N, S, K, H]
    v: Any

    @classmethod
    def shape(cls, cfg, pages, page_size, mesh, dtype, kind=None):
        """An empty cache, of ShapeDtypeStructs.  kind: a value of KINDS."""
        one = ops.kv_pool((cfg.layers, pages, page_size, cfg.kv_heads, cfg.head_dim), dtype, kind, mesh)
        return cls(one, one)

    @staticmethod
    def bytes_per_token(cfg, dtype, kind=None):
        """Bytes of one token's keys and values in all layers."""
        return 2 * cfg.layers * cfg.kv_heads * ops.kv_bytes(cfg.head_dim, dtype, kind)

    def attend(self, layer, qkv, cos, sin, spans, norms, eps, window=None):
        """Attention of this step's queries, after its keys and values are stored.

        qkv [T, K, G+2, H], not yet turned by cos and sin [T, H/2]; norms: weights [H] of queries and of keys,
        or None and None.  Returns [T, K, G, H] and the new cache.
        """
        slot = spans.slot(self.k.shape[2])
        known = dict(zip(("q_norm", "k_norm"), norms), eps=eps)
        q, k_pool, v_pool = ops.rope_kv_write(self.k, self.v, qkv, cos, sin, layer, slot, **known)
        return ops.paged_attention(q, k_pool, v_pool, layer, spans, window), PagedKV(k_pool, v_pool)
