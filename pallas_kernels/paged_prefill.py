"""Attention over a paged cache for a step that mixes prompt chunks and single tokens.

T tokens of the step, R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head,
H head dim.  The tokens of a row are consecutive; tokens that belong to no row are padding.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.kv_quant import QuantizedPool, kernel_arguments, kernel_constants
from pallas_kernels.mosaic import lowers
from pallas_kernels.paged_decode import BLOCK, MASKED, gather_pages, paged_decode, paged_decode_reference
from pallas_kernels.pieces import pages_of
from pallas_kernels.quantized_attention import attend_tile_codes
from pallas_kernels.tiles import tile_at, tiles
from pallas_kernels.triton_call import device, jit, power_of_two, tl, triton_call

COLUMNS = 8  # queries and heads of a product's narrow side
TILE = 64  # consecutive tokens of one row that the reference handles at once


def paged_prefill_reference(
    q, k_pool, v_pool, layer: int, pages, first, count, start, *, scale: float, window: int | None = None
):
    """Causal attention of every row's new tokens to the row's cached keys, the new ones included.

    q [T, K, G, H]; k_pool, v_pool [L, N, S, K, H] or QuantizedPools, already holding the new tokens; pages int32[R, P];
    row r has the tokens first[r] .. first[r] + count[r] - 1 of q, at positions start[r], start[r] + 1, ...; count 0 for
    a row without a request.  With a window a token sees itself and the `window - 1` before it.  Returns [T, K, G, H] in
    q's dtype; padding tokens are zero.  Rows of one token go through the decode reference, the others tile by tile, so
    neither work nor memory grows with T x context or with the longest row.
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
    scaled = (q.astype(jnp.float32) * scale).transpose(1, 0, 2, 3).reshape(K, X * G, H)

    def turn(j, carry):
        top, total, sums = carry
        block = jnp.take(pages, j * B + jnp.arange(B), mode="clip")
        k, v = (gather_pages(pool, layer, block).reshape(W, K, H) for pool in (k_pool, v_pool))
        key = (j * W + jnp.arange(W))[None]
        written = (key < start + tokens) & (key >= oldest)  # what is not may hold anything, even NaN
        v = jnp.where(written.reshape(W, 1, 1), v, 0.0)
        seen = key <= position  # [X*G, W]
        if window is not None:
            seen &= key > position - window
        scores = jnp.where(seen[None], jnp.einsum("kxh,wkh->kxw", scaled, k, precision="highest"), MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weight = jnp.exp(scores - new_top[..., None])
        fade = jnp.exp(top - new_top)
        part = jnp.einsum("kxw,wkh->kxh", weight, v, precision="highest")
        return new_top, total * fade + weight.sum(-1), sums * fade[..., None] + part

    empty = jnp.full((K, X * G), MASKED), jnp.zeros((K, X * G)), jnp.zeros((K, X * G, H))
    _, total, sums = lax.fori_loop(oldest // W, (start + tokens + W - 1) // W, turn, empty)
    out = (sums / jnp.maximum(total, 1e-30)[..., None]).reshape(K, X, G, H)
    return out.transpose(1, 0, 2, 3).astype(q.dtype)


# The kernel.  A tile is some consecutive tokens of one row with all query heads of one kv head; the tokens and heads
# of a tile are the rows of its matrices.


@jit
def _turn(
    at, q, page, top, total, sums, k_ptr, v_ptr, pages, first_page, h, visible, oldest, end,
    MASK: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys at .. at + BLOCK - 1 to the running softmax.  Without MASK all of them are visible to all rows."""
    position = at + tl.arange(0, BLOCK)
    slot = (first_page + page).to(tl.int64) * S + position % S
    place = (slot * (K * H))[:, None] + h[None, :]
    page = pages_of(pages, at + BLOCK, end, S, BLOCK)
    if MASK:
        cached = ((position < end) & (position >= oldest))[:, None] & (h < H)[None, :]
        k = tl.load(k_ptr + place, mask=cached, other=0.0)
        v = tl.load(v_ptr + place, mask=cached, other=0.0)
    elif h.shape[0] != H:
        k = tl.load(k_ptr + place, mask=(h < H)[None, :], other=0.0)
        v = tl.load(v_ptr + place, mask=(h < H)[None, :], other=0.0)
    else:
        k = tl.load(k_ptr + place)
        v = tl.load(v_ptr + place)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        seen = position[None, :] <= visible[:, None]
        if WINDOW:
            seen &= position[None, :] > visible[:, None] - WINDOW
        # Scaled before they are hidden: a fused multiply-subtract would not cancel where a block shows a row nothing.
        scores = tl.where(seen, scores * SCALE, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * SCALE)
        weight = tl.exp2(scores * SCALE - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weight, 1)
    sums = sums * fade[:, None]
    sums = tl.dot(weight.to(v.dtype), v, sums, input_precision=PRECISION)
    return page, new_top, total, sums


@jit
def _attend_tile(
    q_ptr, k_ptr, v_ptr, pages_ptr, tiles_ptr, first_page_ptr, P, out_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile for one kv head: grid (K, tiles).  SCALE includes the base of the exponential, 2."""
    head = tl.program_id(0)
    row, token, tokens, position = tile_at(tiles_ptr)
    if tokens <= 0:
        return
    x = tl.arange(0, ROWS)
    h = tl.arange(0, HP)
    first_page = tl.load(first_page_ptr)
    mine = (x // G < tokens)[:, None] & (h < H)[None, :]
    place = ((token + x // G) * (K * G) + head * G + x % G)[:, None] * H + h[None, :]
    if row < 0:
        tl.store(out_ptr + place, tl.zeros([ROWS, HP], out_ptr.dtype.element_ty), mask=mine)
        return
    q = tl.load(q_ptr + place, mask=mine, other=0.0)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HP], tl.float32)
    visible = position + x // G  # the newest key that a row sees
    end = position + tokens
    k_ptr += head * H
    v_ptr += head * H
    pages = pages_ptr + row * P
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(position - WINDOW + 1, 0)
    begin = oldest // BLOCK * BLOCK
    page = pages_of(pages, begin, end, S, BLOCK)
    if not WINDOW:
        full = (position + 1) // BLOCK * BLOCK  # the keys before it are visible to the whole tile
        for at in tl.range(0, full, BLOCK, num_stages=STAGES):
            page, top, total, sums = _turn(
                at, q, page, top, total, sums, k_ptr, v_ptr, pages, first_page, h, visible, oldest, end,
                False, SCALE, WINDOW, S, K, H, BLOCK, PRECISION,
            )  # fmt: skip
        begin = full
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        page, top, total, sums = _turn(
            at, q, page, top, total, sums, k_ptr, v_ptr, pages, first_page, h, visible, oldest, end,
            True, SCALE, WINDOW, S, K, H, BLOCK, PRECISION,
        )  # fmt: skip
    out = sums / tl.maximum(total, 1.0e-30)[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mine)


def paged_prefill(
    q, k_pool, v_pool, layer: int, pages, first, count, start, *, scale: float, window: int | None = None
):
    """`paged_prefill_reference` as kernels: tiles for the rows of several tokens, `paged_decode` for the others.

    To codes, steps of few tokens take one kernel, see `_together`.  The rows' tokens must fill q from its start;
    padding comes after them.
    """
    if not isinstance(k_pool, QuantizedPool) and k_pool.dtype != q.dtype:
        raise ValueError(f"the kernel needs queries and cache of one dtype, not {q.dtype} and {k_pool.dtype}")
    rows = (pages, first, count, start)
    if isinstance(k_pool, QuantizedPool) and not window:
        size = tuning.lookup(tuning.of_kind("paged_mixed", k_pool.kind), q.dtype, q.shape[3])
        if q.shape[0] <= size.get("tokens", 0):
            return _together(q, k_pool, v_pool, layer, *rows, scale=scale)
    if hopper(q, k_pool, window):
        from pallas_kernels.hopper_prefill import prefill_tiles

        out = prefill_tiles(q, k_pool, v_pool, layer, *rows, scale=scale)
    else:
        out = _prefill_tiles(q, k_pool, v_pool, layer, *rows, scale=scale, window=window)
    single = count == 1
    return paged_decode(
        q, k_pool, v_pool, layer, pages, jnp.where(single, start + 1, 0), scale=scale, window=window,
        token=jnp.where(single, first, -1), out=out,
    )  # fmt: skip


def _together(q, k_pool, v_pool, layer, pages, first, count, start, *, scale):
    """All rows by the kernel that decodes, in tiles of as many tokens as its queries have room for.

    Beside a decoding batch, prompts fill what its pieces leave free, where kernels of their own would each wait for
    their longest tile: on an H200, two prompts of 185 among 195 rows of 640 take nothing beside these, and took half as
    much again.  A tile's keys are read for half as many tokens: each million of pairs of token and key takes 15 to 20
    us more, which 2048 tokens of prompts up to 1024 stay below.
    """
    T, _, G, _ = q.shape
    tile = max(1, COLUMNS // G)
    found = tiles(first, count, start, T, tile, 1)
    return paged_decode(
        q, k_pool, v_pool, layer, pages, jnp.where(found[:, 0] < 0, 0, found[:, 4]), scale=scale,
        token=jnp.where(found[:, 2] > 0, found[:, 1], -1), tiles=found, tile=tile,
    )  # fmt: skip


def hopper(q, k_pool, window) -> bool:
    """Whether the kernel of hopper_prefill.py takes the rows of several tokens on the device compiled for."""
    (T, _, _, H), S = q.shape, k_pool.shape[2]
    if (
        isinstance(k_pool, QuantizedPool)
        or window
        or device()[1] != 90
        or q.dtype.itemsize != 2
        or H not in (64, 128)
        or S not in (16, 32, 64, 128)
    ):
        return False
    size = tuning.lookup("hopper_prefill", q.dtype, H)
    return (
        size["tokens"] <= T
        and size["block"] % S == 0
        and lowers("hopper_prefill", "attention to prompts is", q.shape[1:], q.dtype, S)
    )


def _prefill_tiles(q, k_pool, v_pool, layer, pages, first, count, start, *, scale, window):
    """The rows of several tokens and the padding, by the Triton kernel."""
    T, K, G, H = q.shape
    N, S = k_pool.shape[1:3]
    P = pages.shape[1]
    kind = k_pool.kind if isinstance(k_pool, QuantizedPool) else None
    pools = (k_pool, v_pool) if kind is None else (*kernel_arguments(k_pool), *kernel_arguments(v_pool))
    size = tuning.lookup(tuning.of_kind("paged_prefill", kind), q.dtype, H)
    constants = kernel_constants(kind, q.dtype) if kind else {}
    rows = max(size["rows"], power_of_two(G))
    tile = rows // G
    found = tiles(first, count, start, T, tile)
    (out,) = triton_call(
        attend_tile_codes if kind else _attend_tile, q, *pools, pages, found, jnp.full(1, layer * N, jnp.int32), P,
        out=[jax.ShapeDtypeStruct(q.shape, q.dtype)], grid=(K, found.shape[0]),
        warps=size["warps"], stages=size["stages"],
        SCALE=scale * 1.4426950408889634, WINDOW=window or 0, S=S, K=K, G=G, H=H,
        HP=max(power_of_two(H), 16 * constants.get("VALUES", 1)), ROWS=rows, BLOCK=size["block"],
        STAGES=size["stages"], PRECISION="ieee" if q.dtype == jnp.float32 else "tf32", **constants,
    )  # fmt: skip
    return out
