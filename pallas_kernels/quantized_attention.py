"""The kernels of `paged_decode` and `paged_prefill` for QuantizedPools: codes are what they read, and multiply.

With keys c * s + z, q.k = s * (q.c) + z * sum(q).  With values c * s + z, a key's weight is multiplied by s before its
product with c, and z goes into a sum of its own.  Queries are the narrow side of the products (8 columns), and keys and
elements the 16 rows: instructions are what limits it, for prompts, too (with 128 queries as the rows of the products
an H200 took up to twice as long as with 16 as the columns).
Letters as in paged_decode.py; a head has words of VALUES values each (see kv_quant.py).

To prompts, too, codes are brought to the tensor cores, by Triton on every GPU.  The alternative, to write the pages of
a step's prompts out in 16 bits and run the kernels for those (hopper_prefill.py takes 0.7 of Triton's time), needs
memory for all pages that these rows see: prefixes that many rows share, or long ones that were there before, make that
larger than any bound, so that this kernel would have to be there as well.  What there is to gain is a third of the
attention to prompts, which is a tenth of the time of a step of 4096 tokens of a 1.8B model.
"""

from pallas_kernels.kv_quant import column, scale_and_zero, unit, values
from pallas_kernels.pieces import finish, first_pages, next_pages, pages_of, piece_at
from pallas_kernels.tiles import tile_at
from pallas_kernels.triton_call import jit, tl


@jit
def power(x, ASM: tl.constexpr):
    """2 ** x; what would be a denormal is 0."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@jit
def _narrow(x, dtype: tl.constexpr, ASM: tl.constexpr):
    """x as dtype; two float16 at once, which Triton would make one by one."""
    if ASM and dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    else:
        return x.to(dtype)


@jit
def _queries(q_ptr, place, mine, w, KIND: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr):
    """The queries that begin at `place`, the columns of VALUES matrices, what a product of them and `values` is to be
    multiplied by, and float32 sums over each query.

    They are float32 or become float16: all divided by a power of two, so that they are neither too large nor too small.
    """
    WIDE: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    dtype: tl.constexpr = tl.float32 if WIDE else tl.float16
    wide = ()
    total = tl.zeros([place.shape[0]], tl.float32)
    most = tl.zeros([place.shape[0]], tl.float32)
    for j in tl.static_range(VALUES):
        at = place[None, :] + column(w, j, KIND, H)[:, None]
        wide = wide + (tl.load(q_ptr + at, mask=mine, other=0.0).to(tl.float32),)  # noqa: RUF005  Triton knows no stars
        total += tl.sum(wide[j], 0)
        most = tl.maximum(most, tl.max(tl.abs(wide[j]), 0))
    if WIDE:
        return wide, 1.0, total
    else:
        most = tl.maximum(tl.max(most, 0), 1.0e-30).to(tl.int32, bitcast=True) & 0x7F800000
        most = most.to(tl.float32, bitcast=True) * (unit(0, KIND, dtype) / 256.0)
        q = ()
        for j in tl.static_range(VALUES):
            q = q + ((wide[j] * (unit(j, KIND, dtype) / most)).to(dtype),)  # noqa: RUF005
        return q, most, total


@jit
def _none(QUERIES: tl.constexpr, WIDE: tl.constexpr, VALUES: tl.constexpr):
    """A running softmax of no keys: the largest score, sum of weights, what zeros add to every element, sums."""
    sums = ()
    for _ in tl.static_range(VALUES):
        sums = sums + (tl.zeros([WIDE, QUERIES], tl.float32),)  # noqa: RUF005
    zeros = tl.zeros([QUERIES], tl.float32)
    return tl.full([QUERIES], -1.0e30, tl.float32), zeros, zeros, sums


@jit
def _slots(page, at, head, K: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """Where keys at .. at + BLOCK - 1 of one head are, int64: the first one where a page has them all."""
    page = page.to(tl.int64) * K + head
    if S % BLOCK == 0:
        return page * S + at % S
    else:
        return page * S + (at + tl.arange(0, BLOCK)) % S


@jit
def _words(
    ptr, slot, w, loaded,
    MASK: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The words of the keys in `slot`, which are the axis KEYS."""
    key = slot
    if WHOLE:
        ptr += slot * W
        key = tl.arange(0, BLOCK)
    place = tl.expand_dims(key * W, 1 - KEYS) + tl.expand_dims(w, KEYS)
    there = tl.expand_dims(w < W, KEYS)
    if MASK:
        there &= tl.expand_dims(loaded, 1 - KEYS)
        return tl.load(ptr + place, mask=there, other=0)
    elif w.shape[0] != W:
        return tl.load(ptr + place, mask=there, other=0)
    else:
        return tl.load(ptr + place)


@jit
def _turn(
    q, q_sum, reach, slot, w, loaded, seen, top, total, base, sums, k_words, k_parameters_ptr, v_words,
    v_parameters_ptr,
    MASK: tl.constexpr, WHOLE: tl.constexpr, SCALE: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, KIND: tl.constexpr, VALUES: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds the keys in `slot`, the rows of the scores, to a running softmax.

    With MASK, only those that are `loaded` [BLOCK] are read, and only those that are `seen` count.  SCALE includes the
    base of the exponential, 2.
    """
    dtype: tl.constexpr = q[0].dtype
    where = slot
    if WHOLE:
        where = slot + tl.arange(0, BLOCK)
    if MASK:
        k_parameters = tl.load(k_parameters_ptr + where, mask=loaded, other=0)
        v_parameters = tl.load(v_parameters_ptr + where, mask=loaded, other=0)
    else:
        k_parameters = tl.load(k_parameters_ptr + where)
        v_parameters = tl.load(v_parameters_ptr + where)
    k = _words(k_words, slot, w, loaded, MASK, WHOLE, W, BLOCK, 0)
    v = _words(v_words, slot, w, loaded, MASK, WHOLE, W, BLOCK, 1)
    k_scale, k_zero = scale_and_zero(k_parameters, ASM)
    v_scale, v_zero = scale_and_zero(v_parameters, ASM)
    scores = tl.zeros([BLOCK, q_sum.shape[0]], tl.float32)
    for j in tl.static_range(VALUES):
        scores = tl.dot(values(k, j, KIND, dtype, ASM), q[j], scores, input_precision=PRECISION)
    k_scale *= reach * SCALE
    k_zero *= SCALE
    scores = scores * k_scale[:, None] + q_sum[None, :] * k_zero[:, None]
    if MASK:
        scores = tl.where(seen, scores, -1.0e30)
    new_top = tl.maximum(top, tl.max(scores, 0))
    weight = power(scores - new_top[None, :], ASM)
    fade = power(top - new_top, ASM)
    total = total * fade + tl.sum(weight, 0)
    narrow = _narrow(weight * (v_scale * BOOST)[:, None], dtype, ASM)
    base = base * fade + tl.sum(weight * v_zero[:, None], 0)
    added = ()
    for j in tl.static_range(VALUES):
        part = sums[j] * fade[None, :]
        part = tl.dot(values(v, j, KIND, dtype, ASM), narrow, part, input_precision=PRECISION)
        added = added + (part,)  # noqa: RUF005
    return new_top, total, base, added


@jit
def attend_codes(
    q_ptr, k_ptr, k_parameters_ptr, v_ptr, v_parameters_ptr, pages_ptr, work_ptr, first_page_ptr, P, tiles_ptr,
    out_ptr, sums_ptr, tops_ptr, totals_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    GP: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GC: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr, SPARSE: tl.constexpr,
    TILE: tl.constexpr, KIND: tl.constexpr, VALUES: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One piece of one row for one kv head, as `_attend` of paged_decode.py: grid (K, pieces).

    With TILE the rows are tiles of so many tokens, each of which sees the keys up to its own.
    """
    head = tl.program_id(0)
    piece = tl.program_id(1)
    work = work_ptr + piece * (8 + LISTED)
    row, token, begin, end, oldest, first, pieces, number = piece_at(work, SPARSE)
    page = first_pages(work, begin, S, BLOCK, SPARSE)
    first_page = tl.load(first_page_ptr, volatile=SPARSE)
    if SPARSE:  # noqa: SIM102  # known when it is compiled
        if row < 0:
            return
    W: tl.constexpr = H // VALUES
    COLUMNS: tl.constexpr = TILE * G if TILE else G
    g = tl.arange(0, GP)
    w = tl.arange(0, HP // VALUES)
    tokens = 1
    position = end
    if TILE:
        tile = tiles_ptr + number * 8
        tokens = tl.load(tile + 2)
        position = tl.load(tile + 3)
    here = (g < COLUMNS) & (g < tokens * G) & (row >= 0)
    mine = here[None, :] & (w < W)[:, None]
    heads = (token + g // G) * (K * G) + head * G + g % G
    q, reach, q_sum = _queries(q_ptr, heads * H, mine, w, KIND, VALUES, H)
    top, total, base, sums = _none(GP, HP // VALUES, VALUES)
    k_words = k_ptr.to(tl.pointer_type(tl.uint16))
    v_words = v_ptr.to(tl.pointer_type(tl.uint16))
    pages = pages_ptr + row * P
    dtype: tl.constexpr = q[0].dtype
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        key = tl.arange(0, BLOCK)
        loaded = key < end - at
        if WINDOW:
            loaded &= key >= oldest - at
        seen = loaded[:, None]
        if TILE:
            seen &= key[:, None] <= (position - at + g // G)[None, :]
        slot = _slots(first_page + page, at, head, K, S, BLOCK)
        page = next_pages(work, pages, begin, at + BLOCK, end, S, BLOCK, LISTED)
        top, total, base, sums = _turn(
            q, q_sum, reach, slot, w, loaded, seen, top, total, base, sums, k_words, k_parameters_ptr, v_words,
            v_parameters_ptr, True, S % BLOCK == 0, SCALE * 1.4426950408889634, W, BLOCK, PRECISION, KIND, VALUES,
            BOOST, ASM,
        )  # fmt: skip
    if pieces == 1:
        share = 1.0 / tl.maximum(total, 1.0e-30)  # a row of length 0 has sums of 0
        for j in tl.static_range(VALUES):
            place = heads[None, :] * H + column(w, j, KIND, H)[:, None]
            out = (sums[j] * (unit(j, KIND, dtype) / BOOST) + base[None, :]) * share[None, :]
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        partial = (piece * K + head) * COLUMNS + g
        for j in tl.static_range(VALUES):
            place = partial[None, :] * H + column(w, j, KIND, H)[:, None]
            tl.store(sums_ptr + place, sums[j] * (unit(j, KIND, dtype) / BOOST) + base[None, :], mask=mine)
        finish(
            work_ptr, partial, here, top, total, first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
            K, COLUMNS, H, HP, GC, PARTS, LISTED, G, tokens,
        )  # fmt: skip


@jit
def attend_tile_codes(
    q_ptr, k_ptr, k_parameters_ptr, v_ptr, v_parameters_ptr, pages_ptr, tiles_ptr, first_page_ptr, P, out_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, VALUES: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile for one kv head, as `_attend_tile` of paged_prefill.py: grid (K, tiles)."""
    head = tl.program_id(0)
    row, token, tokens, position = tile_at(tiles_ptr)
    if tokens <= 0:
        return
    W: tl.constexpr = H // VALUES
    x = tl.arange(0, ROWS)
    w = tl.arange(0, HP // VALUES)
    first_page = tl.load(first_page_ptr)
    mine = (x // G < tokens)[None, :] & (w < W)[:, None]
    place = ((token + x // G) * (K * G) + head * G + x % G) * H
    if row < 0:
        for j in tl.static_range(VALUES):
            to = place[None, :] + column(w, j, KIND, H)[:, None]
            tl.store(out_ptr + to, tl.zeros_like(to).to(out_ptr.dtype.element_ty), mask=mine)
        return
    q, reach, q_sum = _queries(q_ptr, place, mine, w, KIND, VALUES, H)
    top, total, base, sums = _none(ROWS, HP // VALUES, VALUES)
    k_words = k_ptr.to(tl.pointer_type(tl.uint16))
    v_words = v_ptr.to(tl.pointer_type(tl.uint16))
    visible = position + x // G  # the newest key that a row sees
    end = position + tokens
    pages = pages_ptr + row * P
    oldest = 0
    if WINDOW:
        oldest = tl.maximum(position - WINDOW + 1, 0)
    begin = oldest // BLOCK * BLOCK
    page = pages_of(pages, begin, end, S, BLOCK)
    if not WINDOW:
        full = (position + 1) // BLOCK * BLOCK  # the keys before it are visible to the whole tile
        for at in tl.range(0, full, BLOCK, num_stages=STAGES):
            slot = _slots(first_page + page, at, head, K, S, BLOCK)
            page = pages_of(pages, at + BLOCK, end, S, BLOCK)
            top, total, base, sums = _turn(
                q, q_sum, reach, slot, w, True, True, top, total, base, sums, k_words, k_parameters_ptr, v_words,
                v_parameters_ptr, False, S % BLOCK == 0, SCALE, W, BLOCK, PRECISION, KIND, VALUES, BOOST, ASM,
            )  # fmt: skip
        begin = full
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        key = at + tl.arange(0, BLOCK)
        slot = _slots(first_page + page, at, head, K, S, BLOCK)
        page = pages_of(pages, at + BLOCK, end, S, BLOCK)
        seen = key[:, None] <= visible[None, :]
        if WINDOW:
            seen &= key[:, None] > (visible - WINDOW)[None, :]
        top, total, base, sums = _turn(
            q, q_sum, reach, slot, w, (key < end) & (key >= oldest), seen, top, total, base, sums, k_words,
            k_parameters_ptr, v_words, v_parameters_ptr, True, S % BLOCK == 0, SCALE, W, BLOCK, PRECISION, KIND, VALUES,
            BOOST, ASM,
        )  # fmt: skip
    dtype: tl.constexpr = q[0].dtype
    share = 1.0 / tl.maximum(total, 1.0e-30)
    for j in tl.static_range(VALUES):
        out = (sums[j] * (unit(j, KIND, dtype) / BOOST) + base[None, :]) * share[None, :]
        to = place[None, :] + column(w, j, KIND, H)[:, None]
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=mine)
