"""Prefill attention for Hopper: one warpgroup brings pages by TMA, two others multiply them with wgmma.

The case of `paged_prefill` that costs the most, and no other (see `hopper` there); `_attend` says how the work is
shared out.  Letters as in paged_prefill.py, and p: the query heads of one kv head that share a tile, B = K * G / p.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tuning
from pallas_kernels.tiles import tiles
from pallas_kernels.triton_call import cdiv, cores, jit, tl, triton_call

WARPGROUPS = 2  # that compute; the last one loads
ROWS = 64  # of queries a warpgroup: tokens * p
LOG2E = math.log2(math.e)
WGMMA = plgpu.Layout.WGMMA
SWIZZLE = plgpu.SwizzleTransform(128)  # type: ignore[abstract]  # it only looks abstract
# Rows of 64 elements, 128 bytes, as wgmma wants them.
TILED = (plgpu.TilingTransform((8, 64)), SWIZZLE)  # type: ignore[abstract]


class Sizes(NamedTuple):
    """What was found by measurement: the sizes in tuned/, see tuning.py."""

    block: int  # keys a turn
    stages: int  # blocks of keys, and of values, that are on their way or in use
    pingpong: bool  # one warpgroup multiplies while the other one computes weights
    registers: tuple[int, int]  # of a thread that loads, of one that computes


class Refs(NamedTuple):
    """Memory that the kernel sees: its arguments, its result, and what a program has of its own."""

    q: Any  # [T, B, p, H / 64, 64]
    k: Any  # [L * N, S, K, H]
    v: Any
    pages: Any  # int32[R, P]
    work: Any  # int32[1 + tiles, 8], see _work
    base: Any  # int32[1]: the first page of the layer
    out: Any  # like q
    queries: Any  # [WARPGROUPS, H / 64, tokens, p, 64] for TMA, the same memory as [WARPGROUPS, H / 64, ROWS, 64]
    result: Any  # like queries
    keys: Any  # [stages, block, H]
    values: Any
    # Barriers, one a warpgroup or a stage: queries have come, may be overwritten; likewise for keys and values.
    q_ready: Any
    q_free: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any  # both warpgroups meet here when they change places


class Shape(NamedTuple):
    """What is known when the kernel is compiled."""

    blocks: int  # B
    packed: int  # p
    kv_heads: int
    page: int  # S
    head_dim: int
    dtype: str
    scale: float
    programs: int
    sizes: Sizes

    @property
    def halves(self):
        """Parts of a head of 64 elements, the 128 bytes that swizzled memory has in a row."""
        return self.head_dim // 64

    @property
    def tokens(self):
        """Tokens a warpgroup."""
        return ROWS // self.packed

    @property
    def parts(self):
        """Pages a block of keys."""
        return self.sizes.block // self.page


def prefill_tiles(q, k_pool, v_pool, layer: int, pages, first, count, start, *, scale: float):
    """The part of `paged_prefill_reference` that is about rows of several tokens, and about padding.

    Tokens of rows with a single one are left undefined.
    """
    T, K, _, H = q.shape
    N, S = k_pool.shape[1:3]
    shape = _shape(q, S, scale)
    work = _work(first, count, start, T, WARPGROUPS * shape.tokens)
    k, v = (pool.reshape(-1, S, K, H) for pool in (k_pool, v_pool))
    base = jnp.full(1, layer * N, jnp.int32)
    return _attend(shape, _packed(q, shape), k, v, pages, work, base).reshape(q.shape)


def lower(heads, dtype, page):
    """Lowers the kernel for queries [T, *heads], and throws the result away; raises what Mosaic makes of it."""
    queries = jax.ShapeDtypeStruct((2 * WARPGROUPS * ROWS, *heads), dtype)
    shape = _shape(queries, page, 1.0)
    pool = jax.ShapeDtypeStruct((8, page, heads[0], heads[2]), dtype)
    tables = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1, 8), (9, 8), (1,))]
    queries = jax.eval_shape(functools.partial(_packed, shape=shape), queries)
    _attend.trace(shape, queries, pool, pool, *tables).lower(lowering_platforms=("cuda",))


def _shape(q, page, scale):
    _, K, G, H = q.shape
    size = tuning.lookup("hopper_prefill", q.dtype, H)
    sizes = Sizes(size["block"], size["stages"], bool(size["pingpong"]), tuple(size["registers"]))
    p = math.gcd(G, 8)  # the largest power of two that divides the group, 8 at most
    return Shape(K * G // p, p, K, page, H, q.dtype.name, scale, cores(), sizes)


def _packed(q, shape):
    return q.reshape(q.shape[0], -1, shape.packed, shape.halves, 64)


@jit
def _order(tiles_ptr, most, work_ptr, PART: tl.constexpr, CHUNK: tl.constexpr):
    """Writes the tiles to work_ptr, the costly ones first, behind a row of which the first word is their number.

    Grid: most / PART.  Tiles without tokens cost nothing; they come last and are not counted.
    """
    number = tl.program_id(0) * PART + tl.arange(0, PART)
    cost = tl.load(tiles_ptr + number * 8 + 6, mask=number < most, other=0)
    place = tl.zeros([PART], tl.int32)
    total = tl.sum(place, 0)
    for at in tl.range(0, most, CHUNK):
        other = at + tl.arange(0, CHUNK)
        against = tl.load(tiles_ptr + other * 8 + 6, mask=other < most, other=-1)
        above = (against[None, :] > cost[:, None]) | (
            (against[None, :] == cost[:, None]) & (other[None, :] > number[:, None])
        )
        place += tl.sum(above.to(tl.int32), 1)
        total += tl.sum((against > 0).to(tl.int32), 0)
    word = tl.arange(0, 8)[None, :]
    stored = (number < most)[:, None] & (word < 7)
    words = tl.load(tiles_ptr + number[:, None] * 8 + word, mask=stored, other=0)
    tl.store(work_ptr + (1 + place)[:, None] * 8 + word, words, mask=stored)
    if tl.program_id(0) == 0:
        tl.store(work_ptr, total)


def _work(first, count, start, tokens, tile):
    """The tiles of paged_prefill.py in the order in which they are worked off, int32[1 + tiles, 8]: see `_order`."""
    found = tiles(first, count, start, tokens, tile)
    most = found.shape[0]
    (work,) = triton_call(
        _order, found, most, out=[jax.ShapeDtypeStruct((1 + most, 8), jnp.int32)], grid=(cdiv(most, 32),), warps=4,
        stages=1, PART=32, CHUNK=256,
    )  # fmt: skip
    return work


@functools.partial(jax.jit, static_argnums=0)  # so that it is lowered once for all layers
def _attend(shape, q, k_pool, v_pool, pages, work, base):
    """Attention of the tiles in `work`, to an array like q.

    A program has a core of the GPU to itself and takes one item, a tile and a block of heads, after the other.  Its
    last warpgroup loads the blocks of keys and values of all its items into a ring, ahead of the two that compute;
    these share a tile, half of its tokens each.
    """
    stages, parts = shape.sizes.stages, shape.parts

    def both():
        tokens = plgpu.SMEM((WARPGROUPS, shape.halves, shape.tokens, shape.packed, 64), q.dtype, transforms=(SWIZZLE,))
        rows = plgpu.SMEM((WARPGROUPS, shape.halves, ROWS, 64), q.dtype, transforms=TILED)
        return plgpu.RefUnion(tokens, rows)

    ring = plgpu.SMEM((stages, shape.sizes.block, shape.head_dim), q.dtype, transforms=TILED)
    ready = plgpu.Barrier(num_barriers=stages, num_arrivals=parts)
    free = plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)
    q_ready = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=shape.halves)
    q_free = plgpu.Barrier(num_barriers=WARPGROUPS)
    turn = plgpu.Barrier(num_arrivals=WARPGROUPS)

    def prefill(*refs):
        refs = Refs(*refs)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == WARPGROUPS)(lambda: _load(shape, refs))
        pl.when(warpgroup < WARPGROUPS)(lambda: _compute(shape, refs, warpgroup))

    return plgpu.kernel(
        prefill,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(both(), both(), ring, ring, q_ready, q_free, ready, ready, free, free, turn),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(q, k_pool, v_pool, pages, work, base)


def _items(shape, refs, act, carry):
    """Calls act(number, row of `work`, head block, carry) for the program's items; returns the last carry.

    The items are dealt out in rounds, from the costliest, and every other round from the other end.
    """
    items = refs.work[0, 0] * shape.blocks
    me = lax.axis_index("program")

    def at(turn):
        place = jnp.where(lax.rem(turn, 2) == 0, me, shape.programs - 1 - me)
        return turn * shape.programs + place

    rounds = lax.div(items, shape.programs)
    rounds += jnp.where(at(rounds) < items, 1, 0)

    def one(turn, carry):
        tile = lax.div(at(turn), shape.blocks)
        return act(turn, 1 + tile, at(turn) - tile * shape.blocks, carry)

    return lax.fori_loop(0, rounds, one, carry)


def _load(shape, refs):
    """The warpgroup that loads."""
    plgpu.set_max_registers(shape.sizes.registers[0], action="decrease")
    base = refs.base[0]
    q_tokens, _ = refs.queries

    def load_queries(turn, token, block):
        for w in range(WARPGROUPS):
            tokens = pl.ds(token + w * shape.tokens, shape.tokens)
            pl.when(turn > 0)(functools.partial(plgpu.barrier_wait, refs.q_free.at[w]))
            for half in range(shape.halves):
                plgpu.copy_gmem_to_smem(refs.q.at[tokens, block, :, half], q_tokens.at[w, half], refs.q_ready.at[w])

    def item(turn, tile, block, step):
        row, token, keys = refs.work[tile, 0], refs.work[tile, 1], refs.work[tile, 4]
        row = jnp.maximum(row, 0)  # padding has none: whatever is loaded for it, its queries see no key
        load_queries(turn, token, block)
        head = lax.div(block, shape.blocks // shape.kv_heads)
        last = lax.div(keys - 1, shape.page)

        def pages(i):
            return [refs.pages[row, jnp.minimum(i * shape.parts + n, last)] + base for n in range(shape.parts)]

        def load(i, carry):
            step, *page = carry
            following = pages(i + 1)  # asked for a turn ahead, as they take long
            slot = lax.rem(step, shape.sizes.stages)
            for pool, ring, ready, free in (
                (refs.k, refs.keys, refs.k_ready, refs.k_free),
                (refs.v, refs.values, refs.v_ready, refs.v_free),
            ):
                pl.when(step >= shape.sizes.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                for n in range(shape.parts):
                    part = ring.at[slot, pl.ds(n * shape.page, shape.page)]
                    plgpu.copy_gmem_to_smem(pool.at[page[n], :, head], part, ready.at[slot])
            return step + 1, *following

        return lax.fori_loop(0, _blocks(shape, keys), load, (step, *pages(0)))[0]

    _items(shape, refs, item, jnp.int32(0))


def _blocks(shape, keys):
    return lax.div(keys + (shape.sizes.block - 1), shape.sizes.block)


def _compute(shape, refs, warpgroup):
    """A warpgroup that computes."""
    plgpu.set_max_registers(shape.sizes.registers[1], action="increase")

    def item(_, tile, block, step):
        token, tokens, position, keys, in_row = (refs.work[tile, n] for n in range(1, 6))
        mine = warpgroup * shape.tokens
        blocks = _blocks(shape, keys)
        whole = jnp.minimum(lax.div(position + 1, shape.sizes.block), blocks - 1)  # blocks that all of the tile sees
        plgpu.barrier_wait(refs.q_ready.at[warpgroup])
        out, step = _softmax(shape, refs, warpgroup, step, whole, blocks, position + mine, in_row)
        _store(shape, refs, warpgroup, out, token + mine, tokens - mine, block)
        _change(shape, refs)
        return step

    pl.when(warpgroup == 1)(lambda: _change(shape, refs))  # so that one is half a turn ahead of the other
    _items(shape, refs, item, jnp.int32(0))
    pl.when(warpgroup == 0)(lambda: _change(shape, refs))
    plgpu.wait_smem_to_gmem(0)


def _change(shape, refs):
    """Hands the tensor cores over to the other warpgroup, or waits until they are handed back."""
    if shape.sizes.pingpong:
        plgpu.barrier_arrive(refs.turn)
        plgpu.barrier_wait(refs.turn)


def _softmax(shape, refs, warpgroup, step, whole, blocks, position, in_row):
    """Attention of a warpgroup's rows: [ROWS, H], and the next step.

    position: of the first token; in_row: keys of the whole row.  The products of a turn, weights times values and
    queries times the next block's keys, are queued together.
    """
    size = shape.sizes.block

    def slot(step):
        return lax.rem(step, shape.sizes.stages)

    def score(scores, slot):
        for half in range(shape.halves):
            plgpu.wgmma(scores, refs.queries[1].at[warpgroup, half], refs.keys.at[slot, :, pl.ds(64 * half, 64)].T)

    def first(scores):
        score(scores, slot(step))
        _change(shape, refs)
        return scores[...]

    def turn(i, carry, masked):
        step, scores, *sums = carry
        weight, *sums, acc = _weigh(shape, scores, i, position, masked, *sums)
        plgpu.barrier_wait(refs.v_ready.at[slot(step)])
        plgpu.barrier_wait(refs.k_ready.at[slot(step + 1)])
        _change(shape, refs)

        def multiply(accumulators):
            acc, scores = accumulators
            plgpu.wgmma(acc, weight, refs.values.at[slot(step)])
            score(scores, slot(step + 1))
            _change(shape, refs)
            plgpu.wgmma_wait(shape.halves)
            plgpu.barrier_arrive(refs.v_free.at[slot(step)])

        acc, scores = pl.run_state(multiply)((plgpu.ACC.init(acc), plgpu.ACC.init(_zeros(ROWS, size))))
        plgpu.barrier_arrive(refs.k_free.at[slot(step + 1)])
        return step + 1, scores, *sums, acc

    plgpu.barrier_wait(refs.k_ready.at[slot(step)])
    scores = pl.run_scoped(first, plgpu.ACC((ROWS, size), jnp.float32))
    plgpu.barrier_arrive(refs.k_free.at[slot(step)])
    top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), WGMMA.reduce(1))
    carry = step, scores, top, _zeros(ROWS, 8), _zeros(ROWS, shape.head_dim)
    carry = lax.fori_loop(0, whole, functools.partial(turn, masked=False), carry)
    carry = lax.fori_loop(whole, blocks - 1, functools.partial(turn, masked=True), carry)
    step, scores, *sums = carry
    plgpu.barrier_arrive(refs.q_free.at[warpgroup])

    weight, _, total, acc = _weigh(shape, scores, blocks - 1, position, True, *sums)
    plgpu.barrier_wait(refs.v_ready.at[slot(step)])
    left = in_row - (blocks - 1) * size
    pl.when(left < size)(lambda: _clear(refs.values.at[slot(step)], left))
    _change(shape, refs)

    def last(acc):
        plgpu.wgmma(acc, weight, refs.values.at[slot(step)])
        _change(shape, refs)

    acc = pl.run_state(last)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(refs.v_free.at[slot(step)])
    out = acc * lax.broadcast_in_dim(1.0 / total.sum(1), acc.shape, [0])
    return jnp.where(in_row > 0, out, 0.0), step + 1


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA)


def _weigh(shape, scores, i, position, masked, top, total, acc):
    """The weights of block i's keys, not yet divided by their sum; and top, total [ROWS, 8], acc with them.

    `total` holds sums that the threads have each for themselves, to be added up in the end.
    """
    size, scale = shape.sizes.block, shape.scale * LOG2E
    if masked:
        row, key = (plgpu.broadcasted_iota(jnp.int32, (ROWS, size), d, layout=WGMMA) for d in (0, 1))
        # A row is a token's, row // p: key <= position + row // p.
        scores = jnp.where(key * shape.packed + (i * size - position) * shape.packed <= row, scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(1) * scale)
    fade = jnp.exp2(top - new_top)
    weight = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    total *= lax.broadcast_in_dim(fade, total.shape, [0])
    for n in range(0, size, 8):
        total += weight[:, n : n + 8]
    acc *= lax.broadcast_in_dim(fade, acc.shape, [0])
    return lax.optimization_barrier((weight.astype(jnp.dtype(shape.dtype)), new_top, total, acc))


def _clear(values, left):
    """Makes all but the first `left` of a block's values zero.

    What lies behind the row's last key may be anything, and 0 * NaN is NaN.  Both warpgroups write the same.
    """
    for n in range(0, values.shape[0], ROWS):
        part = values.at[pl.ds(n, ROWS)]
        old = plgpu.load(part, layout=WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=WGMMA)
        part[...] = jnp.where(key < left - n, old, jnp.zeros_like(old))
    plgpu.commit_smem()


def _store(shape, refs, warpgroup, out, token, tokens, block):
    """Writes the first `tokens` tokens of out [ROWS, H] to those from `token` on."""
    as_tokens, as_rows = refs.result
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the item before
    for half in range(shape.halves):
        as_rows.at[warpgroup, half][...] = out[:, 64 * half : 64 * half + 64].astype(jnp.dtype(shape.dtype))
    plgpu.commit_smem()

    def copy(begin, length):
        for half in range(shape.halves):
            to = refs.out.at[pl.ds(token + begin, length), block, :, half]
            plgpu.copy_smem_to_gmem(as_tokens.at[warpgroup, half, pl.ds(begin, length)], to)

    pl.when(tokens >= shape.tokens)(lambda: copy(0, shape.tokens))

    @pl.when(tokens < shape.tokens)
    def _():
        pl.loop(0, jnp.maximum(tokens, 0))(lambda n: copy(n, 1))
