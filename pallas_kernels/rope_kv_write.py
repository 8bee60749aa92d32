"""Between projection and attention in one pass: norms of queries and keys, rotation, keys and values into the cache.

T tokens of the step, S tokens a page, N pages, L layers, K kv heads, G query heads a kv head, H head dim.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.kv_write import kv_write_reference
from pallas_kernels.triton_call import jit, power_of_two, tl, triton_call


def rope_kv_write_reference(
    k_pool, v_pool, qkv, cos, sin, layer: int, slot, *, q_norm=None, k_norm=None, eps: float = 0.0
):
    """Rotates queries and keys, and writes keys and values to slot[t] = page * S + offset of one layer of the pools.

    k_pool, v_pool [L, N, S, K, H] or QuantizedPools; qkv [T, K, G+2, H]: a group's queries, its key, its value; cos,
    sin float32[T, H/2]: a head's first and second half are the coordinates of H/2 planes; slot int32[T], of page 0 for
    padding.  With q_norm and k_norm, [H], queries and keys are first divided by the root of their mean square (plus
    eps) and multiplied by these.  Returns the queries [T, K, G, H] and the new pools, in place where these are donated.
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
    return rotate(q), *kv_write_reference(k_pool, v_pool, rotate(k)[:, :, 0], v, layer, slot)


@jit
def _rope_write(
    k_pool, v_pool, qkv_ptr, cos_ptr, sin_ptr, slot_ptr, q_norm_ptr, k_norm_ptr, first_slot_ptr, q_ptr,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, GP: tl.constexpr, HP: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """One token's queries, key and value of one kv head, as their first and second halves: grid (T, K)."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    g = tl.arange(0, GP)[:, None]
    h = tl.arange(0, HP)[None, :]
    HALF: tl.constexpr = H // 2
    mine = (g < G + 2) & (h < HALF)
    turned = g < G + 1  # the value stays as it is
    slot = (tl.load(first_slot_ptr) + tl.load(slot_ptr + token)).to(tl.int64)
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


def rope_kv_write(k_pool, v_pool, qkv, cos, sin, layer: int, slot, *, q_norm=None, k_norm=None, eps: float = 0.0):
    """`rope_kv_write_reference` as one Triton kernel."""
    T, K, heads, H = qkv.shape
    N, S = k_pool.shape[1:3]
    size = tuning.lookup("rope_kv_write", qkv.dtype, H)
    norms = (cos, cos) if q_norm is None else (q_norm, k_norm)  # without norms nothing is read there
    return triton_call(
        _rope_write, k_pool, v_pool, qkv, cos, sin, slot, *norms, jnp.full(1, layer * (N * S), jnp.int32),
        out=[jax.ShapeDtypeStruct((T, K, heads - 2, H), qkv.dtype)], in_place=(0, 1), grid=(T, K), warps=size["warps"],
        stages=1,
        K=K, G=heads - 2, H=H, GP=power_of_two(heads), HP=power_of_two(H // 2), NORM=q_norm is not None, EPS=eps,
    )  # fmt: skip
