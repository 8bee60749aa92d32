"""The kernel of `paged_decode` for a QuantizedPool: codes are what it reads, and what it multiplies.

With keys c * s + z, q.k = s * (q.c) + z * sum(q).  With values c * s + z, a key's weight is multiplied by s before its
product with c, and z goes into a sum of its own.
Letters as in paged_decode.py; a head has W words of PARTS values (see kv_quant.py).
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
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    W: tl.constexpr = H // VALUES
    g = tl.arange(0, GP)
    w = tl.arange(0, HP // VALUES)
    mine = (g < G)[:, None] & (w < W)[None, :]
    heads = head * G + g
    q = ()
    q_sum = tl.zeros([GP], tl.float32)
    sums = ()
    for j in tl.static_range(VALUES):
        at_query = (token * (K * G) + heads)[:, None] * H + column(w, j, KIND, H)[None, :]
        q = q + (tl.load(q_ptr + at_query, mask=mine, other=0.0),)  # noqa: RUF005  Triton knows no stars
        q_sum += tl.sum(q[j].to(tl.float32), 1)
        sums = sums + (tl.zeros([GP, HP // VALUES], tl.float32),)  # noqa: RUF005
    top = tl.full([GP], -1.0e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    base = tl.zeros([GP], tl.float32)  # what the zeros add to every element
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
        place = (slot * W)[:, None] + w[None, :]
        cached = seen[:, None] & (w < W)[None, :]
        page = pages_of(pages, at + BLOCK, end, S, BLOCK)
        k_scale, k_zero = scale_and_zero(tl.load(k_parameters_ptr + slot, mask=seen, other=0))
        v_scale, v_zero = scale_and_zero(tl.load(v_parameters_ptr + slot, mask=seen, other=0))
        k = tl.trans(tl.load(k_words + place, mask=cached, other=0))
        v = tl.load(v_words + place, mask=cached, other=0)
        scores = tl.zeros([GP, BLOCK], tl.float32)
        for j in tl.static_range(VALUES):
            scores = tl.dot(q[j], values(k, j, KIND, dtype, ASM), scores, input_precision=PRECISION)
        k_scale *= SCALE * 1.4426950408889634
        k_zero = k_zero * (SCALE * 1.4426950408889634) - OFFSET * k_scale
        scores = tl.where(seen[None, :], scores * k_scale[None, :] + q_sum[:, None] * k_zero[None, :], -1.0e30)
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
        sums = added
        top = new_top
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
