"""Stores a step's keys and values in the pages of the cache, in place.

T tokens of the step, S tokens a page, N pages, L layers, K kv heads, H head dim.
"""

import jax.numpy as jnp

from pallas_kernels.kv_quant import QuantizedPool, quantize
from pallas_kernels.triton_call import jit, power_of_two, tl, triton_call


def kv_write_reference(k_pool, v_pool, k, v, layer: int, slot):
    """Writes token t's k[t] and v[t] ([T, K, H]) to slot[t] = page * S + offset of one layer of the pools.

    k_pool, v_pool: [L, N, S, K, H], or QuantizedPools of that shape; slot int32[T].  Padding tokens go to slots of
    page 0, whose content is junk.  Returns the new pools; in place where the old ones are donated.
    """
    L, N, S, K, H = k_pool.shape
    if slot.shape[0] == 1:
        # XLA makes a scatter of one row a dynamic-update-slice, fuses it with its neighbours and then copies the whole
        # pool in every layer (5 ms a layer on a CPU, not 4 us); a second row, for the padding page, keeps it a scatter.
        slot = jnp.concatenate([slot, jnp.zeros_like(slot)])
        k, v = jnp.concatenate([k, k]), jnp.concatenate([v, v])

    def write_codes(array, x):
        pages = array.reshape(L * N, *array.shape[2:])
        pages = pages.at[layer * N + slot // S, :, slot % S].set(x, mode="promise_in_bounds")
        return pages.reshape(array.shape)

    def write(pool, x):
        if isinstance(pool, QuantizedPool):
            codes, parameters = quantize(x, pool.kind)
            return QuantizedPool(write_codes(pool.codes, codes), write_codes(pool.parameters, parameters), pool.kind)
        rows = pool.reshape(L * N * S, K * H)
        # Padding tokens may share a slot: the indices are not unique, and which of them stays does not matter.
        rows = rows.at[slot + layer * (N * S)].set(x.reshape(-1, K * H).astype(pool.dtype), mode="promise_in_bounds")
        return rows.reshape(pool.shape)

    return write(k_pool, k), write(v_pool, v)


@jit
def _write(
    k_pool, v_pool, k_ptr, v_ptr, slot_ptr, first_slot_ptr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One token's keys and values, K * H elements each: grid (T,)."""
    token = tl.program_id(0)
    x = tl.arange(0, PADDED)
    mine = x < WIDTH
    k = tl.load(k_ptr + token * WIDTH + x, mask=mine)
    v = tl.load(v_ptr + token * WIDTH + x, mask=mine)
    place = (tl.load(first_slot_ptr) + tl.load(slot_ptr + token)).to(tl.int64) * WIDTH + x
    tl.store(k_pool + place, k.to(k_pool.dtype.element_ty), mask=mine)
    tl.store(v_pool + place, v.to(v_pool.dtype.element_ty), mask=mine)


def kv_write(k_pool, v_pool, k, v, layer: int, slot):
    """`kv_write_reference` as one Triton kernel for keys and values; for QuantizedPools there is `rope_kv_write`."""
    N, S, K, H = k_pool.shape[1:]
    first = jnp.full(1, layer * (N * S), jnp.int32)
    return triton_call(
        _write, k_pool, v_pool, k, v, slot, first, out=(), in_place=(0, 1), grid=(slot.shape[0],), warps=4, stages=1,
        WIDTH=K * H, PADDED=power_of_two(K * H),
    )  # fmt: skip
