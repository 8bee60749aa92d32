"""Decode attention over a paged cache: one query token a row.

R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.

The pools of all layers are one array; a layer is never sliced out of it, which would copy the layer.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.kv_quant import QuantizedPool, dequantize
from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call

MASKED = -1e30  # finite, so that a block without a single visible key gives no NaN
BLOCK = 128  # tokens a turn of the reference's loop


def gather_pages(pool, layer: int, pages):
    """Pages [..., B] of one layer as float32[..., B*S, K*H], without touching the rest of the pool [L, N, S, K, H]."""
    L, N, S, K, H = pool.shape
    if isinstance(pool, QuantizedPool):
        arrays = (
            x.reshape(L * N, *x.shape[2:]).at[pages + layer * N].get(mode="promise_in_bounds")
            for x in (pool.codes, pool.parameters)
        )
        x = jnp.moveaxis(dequantize(*arrays, pool.kind), -3, -2)  # [..., B, S, K, H]
        return x.reshape(*pages.shape[:-1], pages.shape[-1] * S, K * H)
    rows = pool.reshape(L * N, S * K * H).at[pages + layer * N].get(mode="promise_in_bounds")
    return rows.reshape(*pages.shape[:-1], pages.shape[-1] * S, K * H).astype(jnp.float32)


def paged_decode_reference(q, k_pool, v_pool, layer: int, pages, length, *, scale: float, window: int | None = None):
    """Attention of one token a row, the last one of its `length`, to the row's cached keys.

    q [R, K, G, H]; k_pool, v_pool [L, N, S, K, H] or QuantizedPools, already holding this token; pages int32[R, P];
    length int32[R], 0 for a row without a request.  With a window a token sees itself and the `window - 1` before it.
    Returns [R, K, G, H] in q's dtype; rows of length 0 are zero.  Memory is bounded by a block of 128 tokens a row,
    time by the longest row.
    """
    R, K, G, H = q.shape
    S = k_pool.shape[2]
    B = max(1, BLOCK // S)
    W = B * S
    # The heads as one matrix: q stands on the diagonal of a [K*G, K*H] matrix.  The zeros cost less than bringing
    # the keys into head-major order would.
    diagonal = jnp.eye(K, dtype=jnp.float32)[None, :, None, :, None]
    wide = (q.astype(jnp.float32)[:, :, :, None, :] * (scale * diagonal)).reshape(R, K * G, K * H)
    oldest = jnp.zeros_like(length) if window is None else jnp.maximum(length - window, 0)
    first = jnp.min(jnp.where(length > 0, oldest, jnp.max(length))) // W

    def turn(j, carry):
        top, total, sums = carry
        block = jnp.take(pages, j * B + jnp.arange(B), axis=1, mode="clip")
        k, v = (gather_pages(pool, layer, block) for pool in (k_pool, v_pool))
        position = (j * W + jnp.arange(W))[None]
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


# The kernel.  The rows' keys are cut into pieces of about equal length, so that a batch of any mixture of lengths
# fills the GPU; every piece of a row that has several leaves a partial sum, and the last one to be done adds those up.


@jit
def pages_of(pages_ptr, at, end, S: tl.constexpr, BLOCK: tl.constexpr):
    """The pages of the keys at .. at + BLOCK - 1, none of them beyond end - 1: a scalar where one page has them all.

    Loops ask for it a turn ahead: the pipelining of Triton then sees keys and values alone and keeps more of them on
    the way.
    """
    if S % BLOCK == 0:
        return tl.load(pages_ptr + tl.minimum(at, end - 1) // S)
    else:
        return tl.load(pages_ptr + tl.minimum(at + tl.arange(0, BLOCK), end - 1) // S)


@jit
def _combine(
    first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, GC: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds up the pieces of one row for one kv head, PARTS at a time.

    Loads pass by the L1 cache (.cg), which knows nothing of what other programs stored.
    """
    g = tl.arange(0, GC)
    h = tl.arange(0, HP)
    heads = head * G + g
    top = tl.full([GC], -1.0e30, tl.float32)
    total = tl.zeros([GC], tl.float32)
    sums = tl.zeros([GC, HP], tl.float32)
    for at in tl.range(0, pieces, PARTS):
        piece = at + tl.arange(0, PARTS)
        partial = (first + piece)[:, None] * (K * G) + heads[None, :]
        here = (piece < pieces)[:, None] & (g < G)[None, :]
        inner = here[:, :, None] & (h < H)[None, None, :]
        tops = tl.load(tops_ptr + partial, mask=here, other=-1.0e30, cache_modifier=".cg")
        totals = tl.load(totals_ptr + partial, mask=here, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            sums_ptr + partial[:, :, None] * H + h[None, None, :], mask=inner, other=0.0, cache_modifier=".cg"
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        weight = tl.exp2(tops - new_top[None, :])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(totals * weight, 0)
        sums = sums * fade[:, None] + tl.sum(parts * weight[:, :, None], 0)
        top = new_top
    out = sums / tl.maximum(total, 1.0e-30)[:, None]
    place = (token * (K * G) + heads)[:, None] * H + h[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=(g < G)[:, None] & (h < H)[None, :])


@jit
def _attend(
    q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, first_page_ptr, P, out_ptr, sums_ptr, tops_ptr, totals_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    GP: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GC: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One piece of one row for one kv head: grid (K, pieces)."""
    head = tl.program_id(0)
    piece = tl.program_id(1)
    work = work_ptr + piece * (7 + K)
    row = tl.load(work)
    if row < 0:
        return
    token = tl.load(work + 1)
    first_page = tl.load(first_page_ptr)
    begin = tl.load(work + 2)
    end = tl.load(work + 3)
    oldest = tl.load(work + 4)
    first = tl.load(work + 5)
    pieces = tl.load(work + 6)
    g = tl.arange(0, GP)
    h = tl.arange(0, HP)
    mine = (g < G)[:, None] & (h < H)[None, :]
    heads = head * G + g
    q = tl.load(q_ptr + (token * (K * G) + heads)[:, None] * H + h[None, :], mask=mine, other=0.0)
    top = tl.full([GP], -1.0e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, HP], tl.float32)
    pages = pages_ptr + row * P
    page = pages_of(pages, begin, tl.maximum(end, 1), S, BLOCK)
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK)
        seen = position < end
        if WINDOW:
            seen &= position >= oldest
        slot = (first_page + page).to(tl.int64) * S + position % S
        place = (slot * (K * H) + head * H)[:, None] + h[None, :]
        cached = seen[:, None] & (h < H)[None, :]
        page = pages_of(pages, at + BLOCK, end, S, BLOCK)
        k = tl.load(k_ptr + place, mask=cached, other=0.0)
        v = tl.load(v_ptr + place, mask=cached, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        sums = sums * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    if pieces == 1:
        out = sums / tl.maximum(total, 1.0e-30)[:, None]  # a row of length 0 has sums of 0
        place = (token * (K * G) + heads)[:, None] * H + h[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        partial = piece * (K * G) + heads
        tl.store(sums_ptr + partial[:, None] * H + h[None, :], sums, mask=mine)
        tl.store(tops_ptr + partial, top, mask=g < G)
        tl.store(totals_ptr + partial, total, mask=g < G)
        tl.debug_barrier()  # all threads have stored before one of them counts
        done = work_ptr + first * (7 + K) + 7 + head
        if tl.atomic_add(done, 1) == pieces - 1:
            tl.store(done, 0)  # as the next launch wants it
            _combine(first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr, K, G, H, HP, GC, PARTS)


@jit
def cdiv_(a, b):
    return (a + b - 1) // b


@jit
def _cut(
    length_ptr, token_ptr, R, most, pieces, work_ptr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Cuts every row's visible keys into pieces of about total / pieces, at least SMALLEST and a multiple of BLOCK.

    Writes the pieces, int32[most, WIDTH]: row (-1: none), token, first key, end, oldest visible key, the row's first
    piece, its number of pieces, and zeros: at a row's first piece a launch counts in them, for each head, the pieces
    that are done, and leaves them zero.  Rows whose token is -1 have no piece.  Grid: most / PART.
    """
    r = tl.arange(0, ROWS)
    length = tl.load(length_ptr + r, mask=r < R, other=0)
    span = length
    if WINDOW:
        span -= tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    here = tl.load(token_ptr + r, mask=r < R, other=-1) >= 0
    share = tl.maximum(cdiv_(tl.sum(tl.where(here, span, 0), 0), pieces), SMALLEST)
    share = cdiv_(share, BLOCK) * BLOCK
    splits = tl.where(here, tl.maximum(cdiv_(span, share), 1), 0)
    after = tl.cumsum(splits, 0)
    piece = tl.program_id(0) * PART + tl.arange(0, PART)
    passed = after[None, :] <= piece[:, None]
    first = tl.max(tl.where(passed, after[None, :], 0), 1)
    used = piece < tl.sum(splits, 0)
    row = tl.where(used, tl.sum(passed.to(tl.int32), 1), 0)
    length = tl.load(length_ptr + row)
    oldest = tl.zeros_like(length)
    if WINDOW:
        oldest = tl.maximum(length - WINDOW, 0)
    begin = oldest // BLOCK * BLOCK
    start = begin + (piece - first) * share
    work = work_ptr + piece * WIDTH
    stored = piece < most
    tl.store(work, tl.where(used, row, -1), mask=stored)
    tl.store(work + 1, tl.load(token_ptr + row), mask=stored)
    tl.store(work + 2, start, mask=stored)
    tl.store(work + 3, tl.minimum(start + share, length), mask=stored)
    tl.store(work + 4, oldest, mask=stored)
    tl.store(work + 5, first, mask=stored)
    tl.store(work + 6, tl.maximum(cdiv_(length - begin, share), 1), mask=stored)
    head = 7 + tl.arange(0, PADDED)[None, :]
    tl.store(work[:, None] + head, tl.zeros([PART, PADDED], tl.int32), mask=stored[:, None] & (head < WIDTH))


def listed(R, most):
    """Constants and grid of a kernel that lists `most` pieces of R rows: a program looks at PART of them."""
    rows = max(32, power_of_two(R))
    part = min(64, max(4, 8192 // rows))
    return {"ROWS": rows, "PART": part}, (cdiv(most, part),)


def cut(length, token, window, block, smallest, pieces, most, heads):
    """What `_cut` writes.  The same in every layer of a step, where XLA computes it once."""
    constants, grid = listed(length.shape[0], most)
    (work,) = triton_call(
        _cut, length, token, length.shape[0], most, pieces,
        out=[jax.ShapeDtypeStruct((most, 7 + heads), jnp.int32)], grid=grid, warps=4, stages=1, WINDOW=window or 0,
        BLOCK=block, SMALLEST=smallest, WIDTH=7 + heads, PADDED=power_of_two(heads), **constants,
    )  # fmt: skip
    return work


def paged_decode(
    q, k_pool, v_pool, layer: int, pages, length, *, scale: float, window: int | None = None, token=None, out=None
):
    """`paged_decode_reference` as a Triton kernel.

    With `token`, int32[R], row r's query is q[token[r]] (-1: the row is left out) and its result goes there; with
    `out`, [T, K, G, H], the results go into that array, in place, and the rest of it stays.
    """
    K, G, H = q.shape[1:]
    N, S = k_pool.shape[1:3]
    R, P = pages.shape
    if k_pool.dtype != q.dtype:
        raise ValueError(f"the kernel needs queries and cache of one dtype, not {q.dtype} and {k_pool.dtype}")
    size = tuning.lookup("paged_decode", q.dtype, H)
    token = jnp.arange(R, dtype=jnp.int32) if token is None else token
    pieces = max(1, size["programs"] // K)
    most = min(pieces + R, R * cdiv(P * S, size["smallest"]))
    work = cut(length, token, window, size["block"], size["smallest"], pieces, most, K)
    held = most if most > R else 0  # else no row has two pieces
    group, padded = power_of_two(G), power_of_two(H)
    partial = [jax.ShapeDtypeStruct((max(1, held * K * G * n),), jnp.float32) for n in (H, 1, 1)]
    inputs = (q, k_pool, v_pool, pages, work, jnp.full(1, layer * N, jnp.int32), P)
    fresh = out is None
    made = [jax.ShapeDtypeStruct(q.shape, q.dtype), *partial] if fresh else partial
    results = triton_call(
        _attend, *inputs, *(() if fresh else (out,)), out=made, in_place=() if fresh else (len(inputs),),
        grid=(K, most), warps=size["warps"], stages=size["stages"], SCALE=scale, WINDOW=window or 0, S=S, K=K, G=G, H=H,
        GP=max(16, group), HP=padded, BLOCK=size["block"], STAGES=size["stages"],
        PRECISION="ieee" if q.dtype == jnp.float32 else "tf32", GC=group, PARTS=max(1, 4096 // (group * padded)),
    )  # fmt: skip
    return results[0] if fresh else results[-1]
