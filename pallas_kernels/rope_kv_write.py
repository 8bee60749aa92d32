"""Between projection and attention in one pass: norms of queries and keys, rotation, keys and values into the cache.

T tokens of the step, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.kv_quant import QuantizedPool, kernel_arguments, spread, spread_block, spread_signs, top_code
from pallas_kernels.kv_write import kv_write_reference
from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call


def rope_kv_write_reference(
    k_pool, v_pool, qkv, cos, sin, layer: int, slot, *, q_norm=None, k_norm=None, eps: float = 0.0
):
    """Rotates queries and keys, and writes keys and values to slot[t] = page * S + offset of one layer of the pools.

    k_pool, v_pool [L, N, S, K, H] or QuantizedPools; qkv [T, K, G+2, H]: a group's queries, its key, its value; cos,
    sin float32[T, H/2]: a head's first and second half are the coordinates of H/2 planes; slot int32[T], of page 0 for
    padding.  With q_norm and k_norm, [H], queries and keys are first divided by the root of their mean square (plus
    eps) and multiplied by these.  For keys of int4 both are `spread` in the end.  Returns the queries [T, K, G, H] and
    the new pools, in place where these are donated.
    """
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1]

    def norm(x, weight):
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
        return wide.astype(x.dtype) * weight.astype(x.dtype).reshape(1, 1, 1, -1)

    def rotate(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[:, None, None], sin[:, None, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s], -1).astype(x.dtype)

    if q_norm is not None:
        q, k = norm(q, q_norm), norm(k, k_norm)
    q, k = rotate(q), rotate(k)[:, :, 0]
    if spreads(k_pool):
        q, k = spread(q).astype(q.dtype), spread(k)
    return q, *kv_write_reference(k_pool, v_pool, k, v, layer, slot)


def spreads(pool):
    """Whether queries and keys go through `spread`: where keys have few codes."""
    return isinstance(pool, QuantizedPool) and pool.kind == "int4"


@jit
def _turned(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, token, head, g, h,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """First and second halves of a token's queries, key and value of one kv head: normalised, rotated, rounded."""
    HALF: tl.constexpr = H // 2
    mine = (g < G + 2) & (h < HALF)
    turned = g < G + 1  # the value stays as it is
    cos = tl.load(cos_ptr + token * HALF + h, mask=h < HALF, other=1.0)
    sin = tl.load(sin_ptr + token * HALF + h, mask=h < HALF, other=0.0)
    place = ((token * K + head) * (G + 2) + g) * H + h
    a = tl.load(qkv_ptr + place, mask=mine, other=0.0)
    b = tl.load(qkv_ptr + place + HALF, mask=mine, other=0.0)
    dtype = a.dtype
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if NORM:
        root = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / H + EPS)[:, None]
        weights = tl.where(g < G, q_norm_ptr, k_norm_ptr)
        wa = tl.load(weights + h, mask=mine, other=0.0).to(dtype).to(tl.float32)
        wb = tl.load(weights + h + HALF, mask=mine, other=0.0).to(dtype).to(tl.float32)
        # rounded where the definition rounds
        a = tl.where(turned, ((a * root).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32), a)
        b = tl.where(turned, ((b * root).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32), b)
    first = tl.where(turned, a * cos - b * sin, a).to(dtype)
    second = tl.where(turned, b * cos + a * sin, b).to(dtype)
    return first, second


@jit
def _rope_write(
    k_pool, v_pool, qkv_ptr, cos_ptr, sin_ptr, slot_ptr, q_norm_ptr, k_norm_ptr, first_slot_ptr, q_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, GP: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """One token's queries, key and value of one kv head: grid (T, K)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    g = tl.arange(0, GP)[:, None]
    h = tl.arange(0, HP)[None, :]
    HALF: tl.constexpr = H // 2
    mine = (g < G + 2) & (h < HALF)
    slot = (tl.load(first_slot_ptr) + tl.load(slot_ptr + token)).to(tl.int64)
    first, second = _turned(qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, token, head, g, h, K, G, H, NORM, EPS)
    q_place = ((token * K + head) * G + g) * H + h
    is_query = mine & (g < G)
    tl.store(q_ptr + q_place, first, mask=is_query)
    tl.store(q_ptr + q_place + HALF, second, mask=is_query)
    cache_place = (slot * K + head) * H + h + tl.zeros_like(g)
    is_key = mine & (g == G)
    tl.store(k_pool + cache_place, first, mask=is_key)
    tl.store(k_pool + cache_place + HALF, second, mask=is_key)
    is_value = mine & (g == G + 1)
    tl.store(v_pool + cache_place, first, mask=is_value)
    tl.store(v_pool + cache_place + HALF, second, mask=is_value)


@jit
def _codes(first, second, inside, TOP: tl.constexpr, KIND: tl.constexpr):
    """Codes of both halves of each row, uint8, and its parameters, int32: `quantize`."""
    low = tl.minimum(
        tl.min(tl.where(inside, first, float("inf")), 1), tl.min(tl.where(inside, second, float("inf")), 1)
    )[:, None]
    high = tl.maximum(
        tl.max(tl.where(inside, first, float("-inf")), 1), tl.max(tl.where(inside, second, float("-inf")), 1)
    )[:, None]
    if KIND == "fp8":
        scale = tl.div_rn(tl.maximum(high, -low), tl.full(high.shape, TOP, tl.float32)).to(tl.float16)
        zero = tl.zeros_like(scale)
    else:
        scale = tl.div_rn(high - low, tl.full(high.shape, TOP, tl.float32)).to(tl.float16)
        zero = low.to(tl.float16)
    parameters = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (
        zero.to(tl.int16, bitcast=True).to(tl.int32) << 16
    )
    scale = scale.to(tl.float32)
    zero = zero.to(tl.float32)
    inverse = tl.div_rn(tl.full(high.shape, 1.0, tl.float32), tl.where(scale > 0, scale, 1.0))
    first = (first - zero) * inverse
    second = (second - zero) * inverse
    if KIND == "fp8":
        first = tl.minimum(tl.maximum(first, -TOP), TOP).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        second = tl.minimum(tl.maximum(second, -TOP), TOP).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        first = tl.minimum(tl.maximum(first + 0.5, 0.0), TOP).to(tl.int32).to(tl.uint8)  # which rounds down
        second = tl.minimum(tl.maximum(second + 0.5, 0.0), TOP).to(tl.int32).to(tl.uint8)
    return first, second, parameters


@jit
def _rope_write_codes(
    k_pool, k_parameters, v_pool, v_parameters, qkv_ptr, cos_ptr, sin_ptr, slot_ptr, q_norm_ptr, k_norm_ptr,
    signs_ptr, first_page_ptr, T, q_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, GP: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr, TOP: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens' queries, keys and values of one kv head, which are quantized: grid (T / TOKENS, K).

    ROWS: those of several tokens, GP each.  SPREAD: the block of `spread`, or 0; signs: of it, [HP, HP].
    """
    head = tl.program_id(1)
    x = tl.arange(0, ROWS)
    h = tl.arange(0, HP)[None, :]
    HALF: tl.constexpr = H // 2
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    if SPREAD:
        signs = tl.load(signs_ptr + tl.arange(0, HP)[:, None] * HP + h)
    first_page = tl.load(first_page_ptr)
    begin = tl.program_id(0) * TOKENS
    for at in tl.range(begin, tl.minimum(begin + TOKENS, T), ROWS // GP):
        token = tl.minimum(at + x // GP, T - 1)
        g = tl.where(at + x // GP < T, x % GP, GP)[:, None]
        slot = tl.load(slot_ptr + token)[:, None]
        token = token[:, None]
        first, second = _turned(
            qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, token, head, g, h, K, G, H, NORM, EPS
        )  # fmt: skip
        if SPREAD:
            a = tl.dot(first, signs, input_precision="ieee")
            b = tl.dot(second, signs, input_precision="ieee")
            ROOT: tl.constexpr = (2 * SPREAD) ** -0.5
            first = tl.where(g < G + 1, (a + b) * ROOT, first.to(tl.float32))
            second = tl.where(g < G + 1, (a - b) * ROOT, second.to(tl.float32))
        q_place = ((token * K + head) * G + g) * H + h
        is_query = (g < G) & (h < HALF)
        tl.store(q_ptr + q_place, first.to(dtype), mask=is_query)
        tl.store(q_ptr + q_place + HALF, second.to(dtype), mask=is_query)
        low, high, parameters = _codes(first.to(tl.float32), second.to(tl.float32), h < HALF, TOP, KIND)
        place = ((first_page + slot // S).to(tl.int64) * K + head) * S + slot % S
        tl.store(k_parameters + place, parameters, mask=g == G)
        tl.store(v_parameters + place, parameters, mask=g == G + 1)
        is_key = (g == G) & (h < HALF)
        is_value = (g == G + 1) & (h < HALF)
        if KIND == "int4":
            tl.store(k_pool + place * HALF + h, low | (high << 4), mask=is_key)
            tl.store(v_pool + place * HALF + h, low | (high << 4), mask=is_value)
        else:
            tl.store(k_pool + place * H + h, low, mask=is_key)
            tl.store(k_pool + place * H + h + HALF, high, mask=is_key)
            tl.store(v_pool + place * H + h, low, mask=is_value)
            tl.store(v_pool + place * H + h + HALF, high, mask=is_value)


def rope_kv_write(k_pool, v_pool, qkv, cos, sin, layer: int, slot, *, q_norm=None, k_norm=None, eps: float = 0.0):
    """`rope_kv_write_reference` as one Triton kernel."""
    T, K, heads, H = qkv.shape
    N, S = k_pool.shape[1:3]
    size = tuning.lookup("rope_kv_write", qkv.dtype, H)
    norms = (cos, cos) if q_norm is None else (q_norm, k_norm)  # without norms nothing is read there
    queries = jax.ShapeDtypeStruct((T, K, heads - 2, H), qkv.dtype)
    known = {"K": K, "G": heads - 2, "H": H, "NORM": q_norm is not None, "EPS": eps}
    if not isinstance(k_pool, QuantizedPool):
        return triton_call(
            _rope_write, k_pool, v_pool, qkv, cos, sin, slot, *norms, jnp.full(1, layer * (N * S), jnp.int32),
            out=[queries], in_place=(0, 1), grid=(T, K), warps=size["warps"], stages=1,
            GP=power_of_two(heads), HP=power_of_two(H // 2), **known,
        )  # fmt: skip
    kind, block = k_pool.kind, spread_block(H // 2) if spreads(k_pool) else 0
    group = power_of_two(heads)
    rows = max(16, group)  # of a product at least, where there is one
    each = rows // group
    tokens = each * cdiv(min(16, cdiv(T, 512)) if block else 1, each)  # that share a Hadamard matrix
    least = 16 if block else 1  # of a product's sides
    padded = max(least, power_of_two(H // 2))
    signs = jnp.asarray(spread_signs(H // 2, padded), qkv.dtype) if block else cos
    q, *arrays = triton_call(
        _rope_write_codes, *kernel_arguments(k_pool), *kernel_arguments(v_pool), qkv, cos, sin, slot, *norms, signs,
        jnp.full(1, layer * N, jnp.int32), T, out=[queries], in_place=(0, 1, 2, 3), grid=(cdiv(T, tokens), K),
        warps=size["warps"], stages=1, GP=group, HP=padded, S=S, KIND=kind,
        TOP=top_code(kind), TOKENS=tokens, ROWS=rows, SPREAD=block, **known,
    )  # fmt: skip
    return q, QuantizedPool(*arrays[:2], kind), QuantizedPool(*arrays[2:], kind)
