"""Attention over a paged cache for a step that mixes prompt chunks and single tokens.

T tokens of the step, R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head,
H head dim.  The tokens of a row are consecutive; tokens that belong to no row are padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_decode import BLOCK, MASKED, gather_pages, paged_decode_reference

TILE = 64  # consecutive tokens of one row that the reference handles at once


def paged_prefill_reference(
    q, k_pool, v_pool, layer: int, pages, first, count, start, *, scale: float, window: int | None = None
):
    """Causal attention of every row's new tokens to the row's cached keys, the new ones included.

    q [T, K, G, H]; k_pool, v_pool [L, N, S, K, H], already holding the new tokens; pages int32[R, P]; row r has the
    tokens first[r] .. first[r] + count[r] - 1 of q, at positions start[r], start[r] + 1, ...; count 0 for a row without
    a request.  With a window a token sees itself and the `window - 1` before it.  Returns [T, K, G, H] in q's dtype;
    padding tokens are zero.  Rows of one token go through the decode reference, the others tile by tile, so neither
    work nor memory grows with T x context or with the longest row.
    """
    T = q.shape[0]
    tile = min(TILE, T)
    single = count == 1
    lone = q.at[jnp.where(single, first, 0)].get(mode="promise_in_bounds")
    lone = paged_decode_reference(
        lone, k_pool, v_pool, layer, pages, jnp.where(single, start + 1, 0), scale=scale, window=window
    )
    out = jnp.zeros((T + tile, *q.shape[1:]), q.dtype)  # a row's last tile may reach over the end
    out = out.at[jnp.where(single, first, T + tile)].set(lone, mode="drop")
    padded = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))
    tiles = jnp.where(single, 0, (count + tile - 1) // tile)
    before = jnp.cumsum(tiles)

    def one(i, out):
        row = jnp.searchsorted(before, i, side="right", method="compare_all")
        skipped = (i - before[row] + tiles[row]) * tile
        at = first[row] + skipped
        attended = _tile(
            lax.dynamic_slice_in_dim(padded, at, tile), k_pool, v_pool, layer, pages[row], start[row] + skipped,
            jnp.minimum(count[row] - skipped, tile), scale, window,
        )  # fmt: skip
        mine = (jnp.arange(tile) < count[row] - skipped)[:, None, None, None]
        kept = lax.dynamic_slice_in_dim(out, at, tile)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, attended, kept), at, 0)

    return lax.fori_loop(0, before[-1], one, out)[:T]


def _tile(q, k_pool, v_pool, layer, pages, start, tokens, scale, window):
    """Attention of q [X, K, G, H], the tokens of one row from position `start`; those after `tokens` give junk."""
    X, K, G, H = q.shape
    S = k_pool.shape[2]
    B = max(1, BLOCK // S)
    W = B * S
    position = jnp.repeat(start + jnp.arange(X), G)[:, None]  # [X*G, 1]
    oldest = 0 if window is None else jnp.maximum(start - window + 1, 0)
    q = (q.astype(jnp.float32) * scale).transpose(1, 0, 2, 3).reshape(K, X * G, H)

    def turn(j, carry):
        top, total, sums = carry
        block = jnp.take(pages, j * B + jnp.arange(B), mode="clip")
        k = gather_pages(k_pool, layer, block).astype(jnp.float32).reshape(W, K, H)
        v = gather_pages(v_pool, layer, block).astype(jnp.float32).reshape(W, K, H)
        key = j * W + jnp.arange(W)
        v = jnp.where((key < start + tokens)[:, None, None], v, 0.0)  # an unwritten page may hold anything, even NaN
        seen = key <= position  # [X*G, W]
        if window is not None:
            seen &= key > position - window
        scores = jnp.where(seen, jnp.einsum("kxh,wkh->kxw", q, k, precision="highest"), MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weight = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        part = jnp.einsum("kxw,wkh->kxh", weight, v, precision="highest")
        return new_top, total * fade + weight.sum(-1), sums * fade[..., None] + part

    empty = jnp.full((K, X * G), MASKED), jnp.zeros((K, X * G)), jnp.zeros((K, X * G, H))
    _, total, sums = lax.fori_loop(oldest // W, (start + tokens + W - 1) // W, turn, empty)
    out = (sums / jnp.maximum(total, 1e-30)[..., None]).reshape(K, X, G, H)
    return out.transpose(1, 0, 2, 3).astype(q.dtype)
