"""Decode attention over a paged cache: one query token a row.

R rows, P pages a row, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.

The pools of all layers are one array; a layer is never sliced out of it, which would copy the layer.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from pallas_kernels.kv_quant import QuantizedPool, dequantize, kernel_arguments, kernel_constants
from pallas_kernels.pieces import cut, finish, first_pages, next_pages, pages_listed, piece_at
from pallas_kernels.quantized_attention import attend_codes
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
def _attend(
    q_ptr, k_ptr, v_ptr, pages_ptr, work_ptr, first_page_ptr, P, out_ptr, sums_ptr, tops_ptr, totals_ptr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, S: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    GP: tl.constexpr, HP: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    GC: tl.constexpr, PARTS: tl.constexpr, LISTED: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """One piece of one row for one kv head: grid (K, pieces).

    SPARSE: many programs have none, and return early; else each would fill shared memory with zeros.  Asking costs the
    others 3 %: see `piece_at`.
    """
    head = tl.program_id(0)
    piece = tl.program_id(1)
    work = work_ptr + piece * (8 + LISTED)
    row, token, begin, end, oldest, first, pieces, _ = piece_at(work, SPARSE)
    page = first_pages(work, begin, S, BLOCK, SPARSE)
    first_page = tl.load(first_page_ptr, volatile=SPARSE)
    if SPARSE:  # noqa: SIM102  # known when it is compiled
        if row < 0:
            return
    g = tl.arange(0, GP)
    h = tl.arange(0, HP)
    mine = (g < G)[:, None] & (h < H)[None, :] & (row >= 0)
    heads = head * G + g
    q = tl.load(q_ptr + (token * (K * G) + heads)[:, None] * H + h[None, :], mask=mine, other=0.0)
    top = tl.full([GP], -1.0e30, tl.float32)
    total = tl.zeros([GP], tl.float32)
    sums = tl.zeros([GP, HP], tl.float32)
    pages = pages_ptr + row * P
    for at in tl.range(begin, end, BLOCK, num_stages=STAGES):
        position = at + tl.arange(0, BLOCK)
        seen = position < end
        if WINDOW:
            seen &= position >= oldest
        slot = (first_page + page).to(tl.int64) * S + position % S
        place = (slot * (K * H) + head * H)[:, None] + h[None, :]
        cached = seen[:, None] & (h < H)[None, :]
        page = next_pages(work, pages, begin, at + BLOCK, end, S, BLOCK, LISTED)
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
        finish(
            work_ptr, partial, g < G, top, total, first, pieces, token, head, out_ptr, sums_ptr, tops_ptr, totals_ptr,
            K, G, H, HP, GC, PARTS, LISTED,
        )  # fmt: skip


def paged_decode(
    q, k_pool, v_pool, layer: int, pages, length, *, scale: float, window: int | None = None, token=None, out=None,
    tiles=None, tile=0,
):  # fmt: skip
    """`paged_decode_reference` as a Triton kernel.

    With `token`, int32[R], row r's query is q[token[r]] (-1: the row is left out) and its result goes there; with
    `out`, [T, K, G, H], the results go into that array, in place, and the rest of it stays.  With `tiles`, which
    tiles.py makes of `tile` tokens, these are what length and token are of; only for QuantizedPools without a window.
    """
    K, G, H = q.shape[1:]
    N, S = k_pool.shape[1:3]
    R, P = length.shape[0], pages.shape[1]
    kind = k_pool.kind if isinstance(k_pool, QuantizedPool) else None
    if kind is None and k_pool.dtype != q.dtype:
        raise ValueError(f"the kernel needs queries and cache of one dtype, not {q.dtype} and {k_pool.dtype}")
    size = tuning.lookup(tuning.of_kind("paged_mixed" if tile else "paged_decode", kind), q.dtype, H)
    token = jnp.arange(R, dtype=jnp.int32) if token is None else token
    pieces = max(1, size["programs"] // K)
    most = min(pieces + R, R * cdiv(P * S, size["smallest"]))
    work = cut(length, token, pages, window, S, size["block"], size["smallest"], pieces, most, K, tiles)
    held = most if most > R else 0  # else no row has two pieces
    constants = kernel_constants(kind, q.dtype) | {"TILE": tile} if kind else {}
    columns = max(1, tile) * G
    group, padded = power_of_two(columns), max(power_of_two(H), 16 * constants.get("VALUES", 1))
    smallest = 8 if kind else 16  # what tensor cores take: queries are columns there, rows here
    partial = [jax.ShapeDtypeStruct((max(1, held * K * columns * n),), jnp.float32) for n in (H, 1, 1)]
    pools = (k_pool, v_pool) if kind is None else (*kernel_arguments(k_pool), *kernel_arguments(v_pool))
    inputs = (q, *pools, pages, work, jnp.full(1, layer * N, jnp.int32), P)
    if kind:
        inputs += (tiles if tile else work,)
    fresh = out is None
    made = [jax.ShapeDtypeStruct(q.shape, q.dtype), *partial] if fresh else partial
    results = triton_call(
        attend_codes if kind else _attend, *inputs, *(() if fresh else (out,)), out=made,
        in_place=() if fresh else (len(inputs),), grid=(K, most), warps=size["warps"], stages=size["stages"],
        registers=size.get("registers"), SCALE=scale, WINDOW=window or 0, S=S, K=K, G=G, H=H,
        GP=max(smallest, group), HP=padded, BLOCK=size["block"], STAGES=size["stages"],
        PRECISION="ieee" if q.dtype == jnp.float32 else "tf32", GC=group,
        PARTS=max(1, min(size.get("parts", 4096), 2048 * size["warps"]) // (group * padded)),  # as registers hold
        LISTED=pages_listed(S, size["block"]), SPARSE=not fresh, **constants,
    )  # fmt: skip
    return results[0] if fresh else results[-1]
