"""Decode attention and what comes before it in one kernel: norms of queries and keys, rotation, the new key and value.

A kernel less costs 2 us less a layer.  Every program turns its own queries; the one with a row's last piece of keys
turns the new key as well, stores it, and takes it from registers.

R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.paged_decode import paged_decode_reference
from pallas_kernels.pieces import cut, finish, pages_of, piece_at
from pallas_kernels.rope_kv_write import rope_kv_write_reference
from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call


def rope_decode_reference(
    k_pool, v_pool, qkv, cos, sin, layer: int, *, pages, length, scale: float, window: int | None = None, q_norm=None,
    k_norm=None, eps: float = 0.0,
):  # fmt: skip
    """`rope_kv_write_reference` of one token a row, the last of its `length`, and `paged_decode_reference` after it.

    A row of length 0 writes nothing that anybody reads.  Returns [R, K, G, H] and the pools.
    """
    S, last = k_pool.shape[2], jnp.maximum(length - 1, 0)
    page = jnp.take_along_axis(pages, (last // S)[:, None], 1)[:, 0]
    slot = jnp.where(length > 0, page * S + last % S, 0)
    norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": eps}
    q, k_pool, v_pool = rope_kv_write_reference(k_pool, v_pool, qkv, cos, sin, layer, slot, **norms)
    known = {"pages": pages, "length": length, "scale": scale, "window": window}
    return paged_decode_reference(q, k_pool, v_pool, layer, **known), k_pool, v_pool


@jit
def _turned(base, mine, cos, sin, norm_ptr, h, H: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Heads [rows, HP] that begin at `base`, [rows, 1]: normalised, rotated, and rounded as the definition rounds."""
    other = tl.where(h < H // 2, h + H // 2, h - H // 2)
    a = tl.load(base + h, mask=mine, other=0.0)
    b = tl.load(base + other, mask=mine, other=0.0)
    dtype = a.dtype
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        root = tl.rsqrt(tl.sum(a * a, 1) / H + EPS)[:, None]
        wa = tl.load(norm_ptr + h, mask=h < H, other=0.0).to(dtype).to(tl.float32)
        wb = tl.load(norm_ptr + other, mask=h < H, other=0.0).to(dtype).to(tl.float32)
        a = ((a * root).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32)
        b = ((b * root).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32)
    return (a * cos + b * tl.where(h < H // 2, -sin, sin)).to(dtype)


@jit
def _rope_decode(
    k_ptr, v_ptr, qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, pages_ptr, work_ptr, first_page_ptr, P, out_ptr,
    sums_ptr, tops_ptr, totals_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    GP: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GC: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One piece of one row for one kv head: grid (K, pieces)."""
    head = tl.program_id(0)
    piece = tl.program_id(1)
    work = work_ptr + piece * (7 + K)
    row = tl.load(work)
    if row < 0:
        return
    _, begin, end, oldest, first, pieces = piece_at(work)
    first_page = tl.load(first_page_ptr)
    g = tl.arange(0, GP)
    h = tl.arange(0, HP)
    mine = (g < G)[:, None] & (h < H)[None, :]
    HALF: tl.constexpr = H // 2
    plane = row * HALF + h % HALF
    cos = tl.load(cos_ptr + plane)[None, :]
    sin = tl.load(sin_ptr + plane)[None, :]
    base = qkv_ptr + (row * K + head) * (G + 2) * H
    q = _turned(base + g[:, None] * H, mine, cos, sin, q_norm_ptr, h[None, :], H, NORM, EPS)
    pages = pages_ptr + row * P
    # The row's last key and value are this step's.
    newest = (piece - first == pieces - 1) & (end > 0)
    one = (h < H)[None, :] & newest
    new_k = _turned(base + G * H + tl.zeros([1, 1], tl.int32), one, cos, sin, k_norm_ptr, h[None, :], H, NORM, EPS)
    new_v = tl.load(base + (G + 1) * H + h[None, :], mask=one, other=0.0)
    last = tl.maximum(end - 1, 0)
    free = (first_page + tl.load(pages + last // S)).to(tl.int64) * S + last % S  # slot
    to = free * (K * H) + head * H + h[None, :]
    tl.store(k_ptr + to, new_k, mask=one)
    tl.store(v_ptr + to, new_v, mask=one)
    end -= newest.to(tl.int32)
    top = tl.full([GP], -1.0e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, HP], tl.float32)
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
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * (SCALE * 1.4426950408889634)
    score = tl.where(newest, score, -1.0e30)
    most = tl.maximum(top, score)
    share = tl.where(newest, tl.exp2(score - most), 0.0)
    fading = tl.exp2(top - most)
    total = total * fading + share
    sums = sums * fading[:, None] + share.to(new_v.dtype).to(tl.float32)[:, None] * new_v.to(tl.float32)
    heads = head * G + g
    if pieces == 1:
        out = sums / tl.maximum(total, 1.0e-30)[:, None]  # a row of length 0 has sums of 0
        spot = (row * (K * G) + heads)[:, None] * H + h[None, :]
        tl.store(out_ptr + spot, out.to(out_ptr.dtype.element_ty), mask=mine)
    else:
        partial = piece * (K * G) + heads
        tl.store(sums_ptr + partial[:, None] * H + h[None, :], sums, mask=mine)
        finish(
            work_ptr, partial, g < G, most, total, first, pieces, row, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
            K, G, H, HP, GC, PARTS,
        )  # fmt: skip


def rope_decode(
    k_pool, v_pool, qkv, cos, sin, layer: int, *, pages, length, scale: float, window: int | None = None, q_norm=None,
    k_norm=None, eps: float = 0.0,
):  # fmt: skip
    """`rope_decode_reference` as one Triton kernel, for pools [L, N, S, K, H] of the type of qkv."""
    R, K, heads, H = qkv.shape
    G, (N, S), P = heads - 2, k_pool.shape[1:3], pages.shape[1]
    if k_pool.dtype != qkv.dtype:
        raise ValueError(f"the kernel needs queries and cache of one dtype, not {qkv.dtype} and {k_pool.dtype}")
    size = tuning.lookup("paged_decode", qkv.dtype, H)
    pieces = max(1, size["programs"] // K)
    most = min(pieces + R, R * cdiv(P * S, size["smallest"]))
    work = cut(length, jnp.arange(R, dtype=jnp.int32), window, size["block"], size["smallest"], pieces, most, K)
    held = most if most > R else 0  # else no row has two pieces
    group, padded = power_of_two(G), max(power_of_two(H), 16)
    norms = (cos, cos) if q_norm is None else (q_norm, k_norm)  # without norms nothing is read there
    out = [jax.ShapeDtypeStruct((R, K, G, H), qkv.dtype)]
    out += [jax.ShapeDtypeStruct((max(1, held * K * G * n),), jnp.float32) for n in (H, 1, 1)]
    found, _, _, _, k_pool, v_pool = triton_call(
        _rope_decode, k_pool, v_pool, qkv, cos, sin, *norms, pages, work, jnp.full(1, layer * N, jnp.int32), P, out=out,
        in_place=(0, 1), grid=(K, most), warps=size["warps"], stages=size["stages"], SCALE=scale, WINDOW=window or 0,
        S=S, K=K, G=G, H=H, GP=max(16, group), HP=padded, BLOCK=size["block"], STAGES=size["stages"],
        PRECISION="ieee" if qkv.dtype == jnp.float32 else "tf32", GC=group,
        PARTS=max(1, min(4096, 2048 * size["warps"]) // (group * padded)), NORM=q_norm is not None, EPS=eps,
    )  # fmt: skip
    return found, k_pool, v_pool
