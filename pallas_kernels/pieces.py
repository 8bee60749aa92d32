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
def first_pages(work, begin, S: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr):
    """The pages of a piece's first BLOCK keys, from the list: their address follows from the piece's number alone.

    SPARSE: as for `piece_at`.
    """
    if S % BLOCK == 0:
        return tl.load(work + 8, volatile=SPARSE)
    elif BLOCK % S == 0:
        return tl.load(work + 8 + tl.arange(0, BLOCK) // S, volatile=SPARSE)
    else:
        return tl.load(work + 8 + (begin % S + tl.arange(0, BLOCK)) // S, volatile=SPARSE)


@jit
def next_pages(work, pages_ptr, begin, at, end, S: tl.constexpr, BLOCK: tl.constexpr, LISTED: tl.constexpr):
    """`pages_of` for a piece that begins at `begin`: those that its list has come from there."""
    if S % BLOCK == 0:
        page = tl.minimum(at, end - 1) // S
    else:
        page = tl.minimum(at + tl.arange(0, BLOCK), end - 1) // S
    place = page - begin // S
    return tl.load(tl.where(place < LISTED, work + 8 + place, pages_ptr + page))


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
def piece_at(work, SPARSE: tl.constexpr):
    """Of a piece: page table's row (-1: none), token, first key, end, oldest visible key, the row's first piece, its
    number of pieces, number of the row (see _cut).

    SPARSE: the caller returns where there is none.  Volatile then: LLVM would move each load to where its result is
    used, behind that question, and every piece would wait for memory once more.
    """
    return (
        tl.load(work, volatile=SPARSE), tl.load(work + 1, volatile=SPARSE), tl.load(work + 2, volatile=SPARSE),
        tl.load(work + 3, volatile=SPARSE), tl.load(work + 4, volatile=SPARSE), tl.load(work + 5, volatile=SPARSE),
        tl.load(work + 6, volatile=SPARSE), tl.load(work + 7, volatile=SPARSE),
    )  # fmt: skip


@jit
def finish(
    work_ptr, partial, mine, top, total, first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, GC: tl.constexpr, PARTS: tl.constexpr,
    LISTED: tl.constexpr, GROUP: tl.constexpr = 0, tokens=1,
):  # fmt: skip
    """Leaves what a piece of several knows beside its sums, and adds all up where it is the row's last to be done.

    G columns; with GROUP those are of `tokens` tokens, GROUP heads each.
    """
    tl.store(tops_ptr + partial, top, mask=mine)
    tl.store(totals_ptr + partial, total, mask=mine)
    tl.debug_barrier()  # all threads have stored before one of them counts
    done = work_ptr + tl.num_programs(1) * (8 + LISTED) + first * K + head
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
    """The length of a row's pieces, all but the last, which are about equal and at most `share`.

    Unless there would be more than 64: adding up many takes longer than the reading that they share out.
    """
    share = tl.maximum(share, cdiv_(span, 64))
    return tl.maximum(cdiv_(cdiv_(span, tl.maximum(cdiv_(span, share), 1)), BLOCK), 1) * BLOCK


@jit
def _pieces(span, share, BLOCK: tl.constexpr):
    """How many pieces a row has."""
    return tl.maximum(cdiv_(span, _even(span, share, BLOCK)), 1)


@jit
def _cut(
    length_ptr, token_ptr, pages_ptr, tiles_ptr, R, P, most, pieces, work_ptr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, SMALLEST: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    LISTED: tl.constexpr, TILED: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, PADDED: tl.constexpr,
    TRIES: tl.constexpr,
):  # fmt: skip
    """Cuts every row's visible keys into pieces of at most about total / pieces, of SMALLEST, multiples of BLOCK.

    Rounding up gives up to R pieces more than asked for.  Where up to twice as long ones make that none, they are.
    Writes int32[most, 8 + LISTED]: the page table's row (-1: no piece), token, first key, end, oldest visible key, the
    row's first piece, its number of pieces, the row's number, and its first LISTED pages.  With TILED rows are tiles
    (see tiles.py), of which several have one row of pages.  Behind all that are most * K zeros: at a row's first piece
    a launch counts, for each head, the pieces that are done, and leaves zero.  Rows whose token is -1 have no piece.
    Grid: most / PART.
    """
    r = tl.arange(0, ROWS)
    length = tl.load(length_ptr + r, mask=r < R, other=0)
    span = length
    if WINDOW:
        span -= tl.maximum(length - WINDOW, 0) // BLOCK * BLOCK
    here = tl.load(token_ptr + r, mask=r < R, other=-1) >= 0
    share = tl.maximum(cdiv_(tl.sum(tl.where(here, span, 0), 0), pieces), SMALLEST)
    share = cdiv_(share, BLOCK) * BLOCK
    if TRIES > 1:
        longer = cdiv_(share + share // TRIES * tl.arange(0, TRIES), BLOCK) * BLOCK
        number = tl.where(here[:, None], _pieces(span[:, None], longer[None, :], BLOCK), 0)
        fits = tl.min(tl.where(tl.sum(number, 0) <= pieces, longer, 2147483647), 0)
        share = tl.where(fits < 2147483647, fits, share)
    splits = tl.where(here, _pieces(span, share, BLOCK), 0)
    after = tl.cumsum(splits, 0)
    piece = tl.program_id(0) * PART + tl.arange(0, PART)
    passed = after[None, :] <= piece[:, None]
    first = tl.max(tl.where(passed, after[None, :], 0), 1)
    used = piece < tl.sum(splits, 0)
    row = tl.where(used, tl.sum(passed.to(tl.int32), 1), 0)
    length = tl.load(length_ptr + row)
    table = row
    if TILED:
        table = tl.maximum(tl.load(tiles_ptr + row * 8), 0)
    oldest = tl.zeros_like(length)
    if WINDOW:
        oldest = tl.maximum(length - WINDOW, 0)
    begin = oldest // BLOCK * BLOCK
    share = _even(length - begin, share, BLOCK)
    start = begin + (piece - first) * share
    end = tl.minimum(start + share, length)
    work = work_ptr + piece * (8 + LISTED)
    stored = piece < most
    tl.store(work, tl.where(used, table, -1), mask=stored)
    tl.store(work + 1, tl.load(token_ptr + row), mask=stored)
    tl.store(work + 2, tl.where(used, start, 0), mask=stored)
    tl.store(work + 3, tl.where(used, end, 0), mask=stored)
    tl.store(work + 4, oldest, mask=stored)
    tl.store(work + 5, first, mask=stored)
    tl.store(work + 6, tl.where(used, tl.maximum(cdiv_(length - begin, share), 1), 1), mask=stored)
    tl.store(work + 7, row, mask=stored)
    place = tl.arange(0, LISTED)[None, :]
    page = tl.minimum((start // S)[:, None] + place, (tl.maximum(end - 1, 0) // S)[:, None])
    tl.store(work[:, None] + 8 + place, tl.load(pages_ptr + table[:, None] * P + page), mask=stored[:, None])
    head = tl.arange(0, PADDED)[None, :]
    done = work_ptr + most * (8 + LISTED) + (piece * K)[:, None] + head
    tl.store(done, tl.zeros([PART, PADDED], tl.int32), mask=stored[:, None] & (head < K))


def listed(R, most):
    """Constants and grid of a kernel that lists `most` pieces of R rows: a program looks at PART of them."""
    rows = max(32, power_of_two(R))
    part = min(64, max(4, 8192 // rows))
    return {"ROWS": rows, "PART": part}, (cdiv(most, part),)


def pages_listed(page_size, block):
    """Of how many pages a piece has a list: 8 or more, and those of the first two turns of `block` keys at least."""
    whole = page_size % block == 0 or block % page_size == 0
    return max(8, power_of_two(2 * cdiv(block, page_size) + (not whole)))


def cut(length, token, pages, window, page_size, block, smallest, pieces, most, heads, tiles=None):
    """What `_cut` writes.  The same in every layer of a step, where XLA computes it once."""
    constants, grid = listed(length.shape[0], most)
    pages_of_piece = pages_listed(page_size, block)
    (work,) = triton_call(
        _cut, length, token, pages, length if tiles is None else tiles, length.shape[0], pages.shape[1], most, pieces,
        out=[jax.ShapeDtypeStruct((most * (8 + pages_of_piece + heads),), jnp.int32)], grid=grid, warps=4, stages=1,
        WINDOW=window or 0, BLOCK=block, SMALLEST=smallest, S=page_size, K=heads, LISTED=pages_of_piece,
        TILED=tiles is not None, PADDED=power_of_two(heads), TRIES=min(16, max(1, 1024 // constants["ROWS"])),
        **constants,
    )  # fmt: skip
    return work
