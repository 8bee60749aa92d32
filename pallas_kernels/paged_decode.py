"""Decode attention over a paged cache: one query token a row.

R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.

The pools of all layers are one array, and `layer` is a Python integer: a layer is never sliced out, which would copy it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # finite, so that a block without a single visible key gives no NaN
BLOCK = 128  # tokens a turn of the reference's loop


def gather_pages(pool, layer: int, pages):
    """Pages [..., B] of one layer as [..., B*S, K*H], without touching the rest of the pool [L, N, S, K, H]."""
    L, N, S, K, H = pool.shape
    rows = pool.reshape(L * N, S * K * H).at[pages + layer * N].get(mode="promise_in_bounds")
    return rows.reshape(*pages.shape[:-1], pages.shape[-1] * S, K * H)


def paged_decode_reference(q, k_pool, v_pool, layer: int, pages, length, *, scale: float, window: int | None = None):
    """Attention of one token a row, the last one of its `length`, to the row's cached keys.

    q [R, K, G, H]; k_pool, v_pool [L, N, S, K, H], already holding this token; pages int32[R, P]; length int32[R], 0 for
    a row without a request.  With a window a token sees itself and the `window - 1` before it.  Returns [R, K, G, H] in
    q's dtype; rows of length 0 are zero.  Memory is bounded by a block of 128 tokens a row, time by the longest row.
    """
    R, K, G, H = q.shape
    S, P = k_pool.shape[2], pages.shape[1]
    B = max(1, BLOCK // S)
    W = B * S
    # The heads as one matrix: q stands on the diagonal of a [K*G, K*H] matrix.  The zeros cost less than bringing
    # the keys into head-major order would.
    diagonal = jnp.eye(K, dtype=jnp.float32)[:, None, :, None]
    wide = (q.astype(jnp.float32)[:, :, :, None, :] * (scale * diagonal)).reshape(R, K * G, K * H)
    oldest = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0)
    first = jnp.min(jnp.where(length > 0, oldest, jnp.max(length))) // W

    def turn(j, carry):
        top, total, sums = carry
        block = jnp.take(pages, j * B + jnp.arange(B), axis=1, mode="clip")
        k = gather_pages(k_pool, layer, block).astype(jnp.float32)
        v = gather_pages(v_pool, layer, block).astype(jnp.float32)
        position = j * W + jnp.arange(W)
        seen = (position < length[:, None]) & (position >= oldest[:, None])  # [R, W]
        v = jnp.where(seen[:, :, None], v, 0.0)  # an unwritten page may hold anything, even NaN
        scores = jnp.einsum("rxy,rwy->rxw", wide, k, precision="highest")
        scores = jnp.where(seen[:, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weight = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        part = jnp.einsum("rxw,rwy->rxy", weight, v, precision="highest").reshape(R, K, G, K, H)
        part = (part * diagonal).sum(3).reshape(R, K * G, H)
        return new_top, total * fade + weight.sum(-1), sums * fade[..., None] + part

    empty = jnp.full((R, K * G), MASKED), jnp.zeros((R, K * G)), jnp.zeros((R, K * G, H))
    _, total, sums = lax.fori_loop(first, (jnp.max(length) + W - 1) // W, turn, empty)
    out = jnp.where((length > 0)[:, None, None], sums / jnp.maximum(total, 1e-30)[..., None], 0.0)
    return out.reshape(R, K, G, H).astype(q.dtype)
