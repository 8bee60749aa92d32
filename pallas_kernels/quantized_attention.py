"""The kernels of `paged_decode` and `paged_prefill` for QuantizedPools: codes are what they read, and multiply.

With keys c * s + z, q.k = s * (q.c) + z * sum(q).  With values c * s + z, a key's weight is multiplied by s before its
product with c, and z goes into a sum of its own.
Letters as in paged_decode.py; a head has words of VALUES values each (see kv_quant.py).

To prompts, too, codes are brought to the tensor cores, by Triton on every GPU.  The alternative, to write the pages of
a step's prompts out in 16 bits and run the kernels for those (hopper_prefill.py takes 0.7 of Triton's time), needs
memory for all pages that these rows see: prefixes that many rows share, or long ones that were there before, make that
larger than any bound, so that this kernel would have to be there as well.  What there is to gain is a third of the
attention to prompts, which is a tenth of the time of a step of 4096 tokens of a 1.8B model.
"""

from pallas_kernels.kv_quant import column, scale_and_zero, values
from pallas_kernels.pieces import combine, pages_of
from pallas_kernels.triton_call import jit, tl


@jit
def power(x, ASM: tl.constexpr):
    """2 ** x; what would be a denormal is 0."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.exp2(x)


@jit
def _queries(q_ptr, place, mine, w, KIND: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    """Rows of queries that begin at `place`, as VALUES matrices, and float32 sums over each row."""
    q = ()
    total = tl.zeros([place.shape[0]], tl.float32)
    for j in tl.static_range(VALUES):
        q = q + (tl.load(q_ptr + place[:, None] + column(w, j, KIND, H)[None, :], mask=mine, other=0.0),)  # noqa: RUF005
        total += tl.sum(q[j].to(tl.float32), 1)
    return q, total


@jit
def _none(ROWS: tl.constexpr, WIDE: tl.constexpr, VALUES: tl.constexpr):
    """A running softmax of no keys: the largest score, sum of weights, what zeros add to every element, sums."""
    sums = ()
    for _ in tl.static_range(VALUES):
        sums = sums + (tl.zeros([ROWS, WIDE], tl.float32),)  # noqa: RUF005  Triton knows no stars
    return tl.full([ROWS], -1.0e30, tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), sums


@jit
def _turn(
    q, q_sum, slot, w, loaded, seen, top, total, base, sums, k_words, k_parameters_ptr, v_words, v_parameters_ptr,
    MASK: tl.constexpr, SCALE: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    VALUES: tl.constexpr, OFFSET: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds the keys in `slot` to a running softmax.

    With MASK, only those that are `loaded` [BLOCK] are read, and only those that are `seen` [.., BLOCK] count.  SCALE
    includes the base of the exponential, 2.
    """
    dtype: tl.constexpr = q[0].dtype
    place = (slot * W)[:, None] + w[None, :]
    if MASK:
        cached = loaded[:, None] & (w < W)[None, :]
        k_parameters = tl.load(k_parameters_ptr + slot, mask=loaded, other=0)
        v_parameters = tl.load(v_parameters_ptr + slot, mask=loaded, other=0)
        k = tl.load(k_words + place, mask=cached, other=0)
        v = tl.load(v_words + place, mask=cached, other=0)
    else:
        k_parameters = tl.load(k_parameters_ptr + slot)
        v_parameters = tl.load(v_parameters_ptr + slot)
        k = tl.load(k_words + place, mask=(w < W)[None, :], other=0)
        v = tl.load(v_words + place, mask=(w < W)[None, :], other=0)
    k_scale, k_zero = scale_and_zero(k_parameters)
    v_scale, v_zero = scale_and_zero(v_parameters)
    k = tl.trans(k)
    scores = tl.zeros([q_sum.shape[0], slot.shape[0]], tl.float32)
    for j in tl.static_range(VALUES):
        scores = tl.dot(q[j], values(k, j, KIND, dtype, ASM), scores, input_precision=PRECISION)
    k_scale *= SCALE
    k_zero = k_zero * SCALE - OFFSET * k_scale
    scores = scores * k_scale[None, :] + q_sum[:, None] * k_zero[None, :]
    if MASK:
        scores = tl.where(seen, scores, -1.0e30)
    new_top = tl.maximum(top, tl.max(scores, 1))
    weight = power(scores - new_top[:, None], ASM)
    fade = power(top - new_top, ASM)
    total = total * fade + tl.sum(weight, 1)
    narrow = (weight * (v_scale * BOOST)[None, :]).to(dtype)
    extra = weight * (v_zero * BOOST)[None, :]
    if OFFSET != 0:
        extra -= narrow.to(tl.float32) * OFFSET
    base = base * fade + tl.sum(extra, 1)
    added = ()
    for j in tl.static_range(VALUES):
        part = sums[j] * fade[:, None]
        part = tl.dot(narrow, values(v, j, KIND, dtype, ASM), part, input_precision=PRECISION)
        added = added + (part,)  # noqa: RUF005
    return new_top, total, base, added


@jit
def attend_codes(
    q_ptr, k_ptr, k_parameters_ptr, v_ptr, v_parameters_ptr, pages_ptr, work_ptr, first_page_ptr, P,
    out_ptr, sums_ptr, tops_ptr, totals_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    GP: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GC: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr, VALUES: tl.constexpr, OFFSET: tl.constexpr,
    BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One piece of one row for one kv head, as `_attend` of paged_decode.py: grid (K, pieces)."""
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
    W: tl.constexpr = H // VALUES
    g = tl.arange(0, GP)
    w = tl.arange(0, HP // VALUES)
    mine = (g < G)[:, None] & (w < W)[None, :]
    heads = head * G + g
    q, q_sum = _queries(q_ptr, (token * (K * G) + heads) * H, mine, w, KIND, VALUES, H, HP)
    top, total, base, sums = _none(GP, HP // VALUES, VALUES)
    k_words = k_ptr.to(tl.pointer_type(tl.uint16))
    v_words = v_ptr.to(tl.pointer_type(tl.uint16))
    pages = pages_ptr + row * P
    page = pages_of(pages, begin, tl.maximum(end, 1), S, BLOCK)
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK)
        seen = position < end
        if WINDOW:
            seen &= position >= oldest
        slot = ((first_page + page).to(tl.int64) * K + head) * S + position % S
        page = pages_of(pages, at + BLOCK, end, S, BLOCK)
        top, total, base, sums = _turn(
            q, q_sum, slot, w, seen, seen[None, :], top, total, base, sums, k_words, k_parameters_ptr, v_words,
            v_parameters_ptr, True, SCALE * 1.4426950408889634, W, PRECISION, KIND, VALUES, OFFSET, BOOST, ASM,
        )  # fmt: skip
    total *= BOOST
    if pieces == 1:
        share = 1.0 / tl.maximum(total, 1.0e-30)  # a row of length 0 has sums of 0
        for j in tl.static_range(VALUES):
            place = (token * (K * G) + heads)[:, None] * H + column(w, j, KIND, H)[None, :]
            out = (sums[j] + base[:, None]) * share[:, None]
            tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        partial = piece * (K * G) + heads
        for j in tl.static_range(VALUES):
            place = partial[:, None] * H + column(w, j, KIND, H)[None, :]
            tl.store(sums_ptr + place, sums[j] + base[:, None], mask=mine)
        tl.store(tops_ptr + partial, top, mask=g < G)
        tl.store(totals_ptr + partial, total, mask=g < G)
        tl.debug_barrier()  # all threads have stored before one of them counts
        done = work_ptr + first * (7 + K) + 7 + head
        if tl.atomic_add(done, 1) == pieces - 1:
            tl.store(done, 0)  # as the next launch wants it
            combine(first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr, K, G, H, HP, GC, PARTS)


@jit
def attend_tile_codes(
    q_ptr, k_ptr, k_parameters_ptr, v_ptr, v_parameters_ptr, pages_ptr, tiles_ptr, first_page_ptr, P, out_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    KIND: tl.constexpr, VALUES: tl.constexpr, OFFSET: tl.constexpr, BOOST: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile for one kv head, as `_attend_tile` of paged_prefill.py: grid (K, tiles)."""
    head = tl.program_id(0)
    tile = tiles_ptr + (tl.num_programs(1) - 1 - tl.program_id(1)) * 8  # the costly ones, at the end of a row, first
    row = tl.load(tile)
    token = tl.load(tile + 1)
    tokens = tl.load(tile + 2)
    position = tl.load(tile + 3)
    if tokens <= 0:
        return
    W: tl.constexpr = H // VALUES
    x = tl.arange(0, ROWS)
    w = tl.arange(0, HP // VALUES)
    first_page = tl.load(first_page_ptr)
    mine = (x // G < tokens)[:, None] & (w < W)[None, :]
    place = ((token + x // G) * (K * G) + head * G + x % G) * H
    if row < 0:
        for j in tl.static_range(VALUES):
            to = place[:, None] + column(w, j, KIND, H)[None, :]
            tl.store(out_ptr + to, tl.zeros([ROWS, HP // VALUES], out_ptr.dtype.element_ty), mask=mine)
        return
    q, q_sum = _queries(q_ptr, place, mine, w, KIND, VALUES, H, HP)
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
            slot = ((first_page + page).to(tl.int64) * K + head) * S + (at + tl.arange(0, BLOCK)) % S
            page = pages_of(pages, at + BLOCK, end, S, BLOCK)
            top, total, base, sums = _turn(
                q, q_sum, slot, w, True, True, top, total, base, sums, k_words, k_parameters_ptr, v_words,
                v_parameters_ptr, False, SCALE, W, PRECISION, KIND, VALUES, OFFSET, BOOST, ASM,
            )  # fmt: skip
        begin = full
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        key = at + tl.arange(0, BLOCK)
        slot = ((first_page + page).to(tl.int64) * K + head) * S + key % S
        page = pages_of(pages, at + BLOCK, end, S, BLOCK)
        seen = key[None, :] <= visible[:, None]
        if WINDOW:
            seen &= key[None, :] > visible[:, None] - WINDOW
        top, total, base, sums = _turn(
            q, q_sum, slot, w, (key < end) & (key >= oldest), seen, top, total, base, sums, k_words, k_parameters_ptr,
            v_words, v_parameters_ptr, True, SCALE, W, PRECISION, KIND, VALUES, OFFSET, BOOST, ASM,
        )  # fmt: skip
    share = 1.0 / tl.maximum(total * BOOST, 1.0e-30)
    for j in tl.static_range(VALUES):
        out = (sums[j] + base[:, None]) * share[:, None]
        to = place[:, None] + column(w, j, KIND, H)[None, :]
        tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=mine)
