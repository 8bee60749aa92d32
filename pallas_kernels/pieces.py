"""Rows' keys cut into pieces of about equal length, so that a batch of any mixture of lengths fills a GPU.

R rows, S tokens a page, K kv heads, G query heads a kv head, H head dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call


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
    GROUP: tl.constexpr, tokens,
):  # fmt: skip
    """Adds up the pieces of one row for one kv head, PARTS at a time.

    Loads pass by the L1 cache (.cg), which knows nothing of what other programs stored.
    """
    g = tl.arange(0, GC)
    h = tl.arange(0, HP)
    heads = head * G + g
    mine = (g < G) & (g < tokens * GROUP)
    top = tl.full([GC], -1.0e30, tl.float32)
    total = tl.zeros([GC], tl.float32)
    sums = tl.zeros([GC, HP], tl.float32)
    for at in tl.range(0, pieces, PARTS):
        piece = at + tl.arange(0, PARTS)
        partial = (first + piece)[:, None] * (K * G) + heads[None, :]
        here = (piece < pieces)[:, None] & mine[None, :]
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
    spot = (token + g // GROUP) * (K * GROUP) + head * GROUP + g % GROUP
    tl.store(out_ptr + spot[:, None] * H + h[None, :], out.to(out_ptr.dtype.element_ty), mask=mine[:, None] & (h < H))


@jit
def piece_at(work):
    """Of a piece: token, first key, end, oldest visible key, the row's first piece, its number of pieces (see _cut)."""
    return (tl.load(work + 1), tl.load(work + 2), tl.load(work + 3), tl.load(work + 4), tl.load(work + 5),
            tl.load(work + 6))  # fmt: skip


@jit
def finish(
    work_ptr, partial, mine, top, total, first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, GC: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr = 0, tokens=1,
):  # fmt: skip
    """Leaves what a piece of several knows beside its sums, and adds all up where it is the row's last to be done.

    G columns; with GROUP those are of `tokens` tokens, GROUP heads each.
    """
    tl.store(tops_ptr + partial, top, mask=mine)
    tl.store(totals_ptr + partial, total, mask=mine)
    tl.debug_barrier()  # all threads have stored before one of them counts
    done = work_ptr + first * (7 + K) + 7 + head
    if tl.atomic_add(done, 1) == pieces - 1:
        tl.store(done, 0)  # as the next launch wants it
        _combine(
            first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr, K, G, H, HP, GC, PARTS,
            GROUP if GROUP else G, tokens,
        )  # fmt: skip


@jit
def cdiv_(a, b):
    return (a + b - 1) // b


@jit
def _even(span, share, BLOCK: tl.constexpr):
    """The length of a row's pieces, all but the last, which are about equal and at most `share`."""
    return tl.maximum(cdiv_(cdiv_(span, tl.maximum(cdiv_(span, share), 1)), BLOCK), 1) * BLOCK


@jit
def _cut(
    length_ptr, token_ptr, R, most, pieces, work_ptr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Cuts every row's visible keys into pieces of at most about total / pieces, of SMALLEST, multiples of BLOCK.

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
    splits = tl.where(here, tl.maximum(cdiv_(span, _even(span, share, BLOCK)), 1), 0)
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
    share = _even(length - begin, share, BLOCK)
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
