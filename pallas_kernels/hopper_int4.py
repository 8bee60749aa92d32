"""int4 matmuls for Hopper, for as many tokens as fill a wgmma: one warpgroup loads by TMA, two or four others multiply.

The tiles are those of int4_mma.py, which fit wgmma's first operand too.  Letters as there; a block has 64 outputs a
warpgroup, of some tokens.  A core takes one block after the other, and loads the next while it writes out the last.
Of experts' matrices a block has one expert's tokens alone; which, a kernel before it finds out (`_plan`).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_lanes as lanes
from pallas_kernels import warpgroups
from pallas_kernels.hopper_lanes import LINES
from pallas_kernels.int4_mma import ROWS, UNIT, WORDS
from pallas_kernels.triton_call import cdiv, cores, jit, power_of_two, tl, triton_call

BLOCK = 2 * LINES  # what the number of outputs has to be a multiple of
TOKENS = 256  # at most, of an instruction
MEMORY = 222 << 10  # of the shared memory of a core
LITTLE = 128  # tokens of a block, for which there is little to multiply
STAGES, STAGES_OF_MANY = 8, 6  # turns that are loaded at a time, at most; of blocks of more tokens
SIDE = 4  # blocks of other tokens that go through the outputs side by side, about


class How(NamedTuple):
    """How a matmul is shared out."""

    tokens: int  # of a block, a multiple of 16
    inputs: int = 64  # of a turn
    split: int = 1  # parts of the inputs, which are summed up afterwards
    workers: int = 2  # warpgroups that multiply: 4 read more at a time, and have room for 64 tokens


# Microseconds on an H200: the launch, by how many warpgroups multiply; likewise a turn of 64 inputs by what it loads,
# and a turn by what it multiplies (either is a start and so much for a token); a block, beside its turns; summing up
# the parts, and a MB of them.
LAUNCH, LOADED, MULTIPLIED = {2: 1.0, 4: 2.5}, {2: (0.194, 0.0017), 4: (0.35, 0.0032)}, (0.1, 0.0024)
BLOCK_ENDS, SUM, SUM_OF_MB = 1.3, 1.85, 0.14
FEW = 64  # tokens of a block of four warpgroups, at most


def _microseconds(T, D, F, tokens, split, workers):
    """About what a matmul takes, by blocks of so many tokens, parts of the inputs, and warpgroups; a core has one block
    at a time."""
    rounds = cdiv(F // (LINES * workers) * cdiv(T, tokens) * split, cores())
    turn = max(start + each * tokens for start, each in (LOADED[workers], MULTIPLIED))
    parts = SUM + SUM_OF_MB * split * T * F * 8e-6 if split > 1 else 0
    return LAUNCH[workers] + rounds * (D // UNIT // split * turn + BLOCK_ENDS) + parts


def chosen(T, D, F, group):
    """How it should be done soonest."""
    whole = D // (128 if D % 128 == 0 else 64)
    splits = [n for n in range(1, whole // 2 + 1) if whole % n == 0 and D // n % group == 0] or [1]
    least = cdiv(T, TOKENS)
    shares = (cdiv(T, n) for n in range(least, max(least, min(cdiv(T, 64), least + 4)) + 1))
    shares = dict.fromkeys(cdiv(t, 32) * 32 if t > 64 else cdiv(t, 16) * 16 for t in shares)
    ways = [(t, s, w) for t in shares for s in splits for w in _workers(t, D, F)]
    tokens, split, workers = min(ways, key=lambda way: _microseconds(T, D, F, *way))
    return How(tokens, _inputs(D, tokens), split, workers)


def _inputs(D, tokens):
    return 128 if D % 128 == 0 and tokens <= 128 else 64


def _workers(tokens, D, F):
    """How many warpgroups may multiply."""
    return (2, 4) if tokens <= FEW and F % (4 * LINES) == 0 and D % 128 == 0 else (2,)


@functools.partial(jax.jit, static_argnames=("group", "dtype", "how", "gated"))
def int4_wgmma(x, tiles, scale, zero, *, group, dtype=None, how=None, gated=False):
    """x [T, D] times the matrix of `tiles` (two-dimensional out), to [T, F]; F a multiple of 128.

    gated: the matrix is [D, 2 * F], and of the products silu(first) * second is given.
    how: a `How` (what is `chosen` unless said).
    """
    (T, D), F, dtype = x.shape, scale.shape[1], jnp.dtype(dtype or x.dtype)
    how = how or chosen(T, D, F, group)
    if gated and (how.split > 1 or dtype != x.dtype):  # what is not summed up yet can't be a gate
        y = int4_wgmma(x, tiles, scale, zero, group=group, dtype=dtype, how=how)
        return jax.nn.silu(y[:, : F // 2]) * y[:, F // 2 :]
    x = _padded(x, how.tokens)
    out_type = jnp.dtype(jnp.float32) if how.split > 1 else dtype
    kernel, memory = _kernel(how, x.shape[0], D, F, group, x.dtype, scale.dtype, out_type, gated)
    new = jax.ShapeDtypeStruct((how.split, x.shape[0], F // (1 + gated)), out_type)
    count = F // (LINES * how.workers) * cdiv(T, how.tokens) * how.split
    out = _run(how, kernel, memory, new, count, x, tiles, scale, zero)
    out = out[0] if how.split == 1 else out.sum(0)
    return out[:T].astype(dtype)


@functools.partial(jax.jit, static_argnames=("group", "how"))
def int4_experts(x, tiles, scale, zero, sizes, *, group, how=None):
    """x [M, D], the tokens of expert 0, then those of expert 1, ..., times the matrix of each, to [M, F].

    The E matrices stand side by side: `tiles`, scale and zero are those of one matrix [D, E * F], F a multiple of 128.
    sizes int32[E]: how many tokens each has.  how: a `How` without a split (what is `chosen_of_experts` unless said).
    """
    (M, D), E = x.shape, sizes.shape[0]
    F = scale.shape[1] // E
    how = how or chosen_of_experts(M, E, D, F)
    x, most = _padded(x, how.tokens), most_blocks(M, E, how.tokens)
    kernel, memory = _kernel(how, x.shape[0], D, F, group, x.dtype, scale.dtype, x.dtype, experts=True)
    new = jax.ShapeDtypeStruct((1, x.shape[0], F), x.dtype)
    plan = _planned(sizes, most, how.tokens)
    count = F // (LINES * how.workers) * most
    return _run(how, kernel, memory, new, count, x, tiles, scale, zero, plan)[0, :M]


def _padded(x, tokens):
    """x with as many tokens as a block has at least, and a multiple of 8; what TMA reads beyond them is zero."""
    return jnp.pad(x, ((0, max(tokens, cdiv(x.shape[0], 8) * 8) - x.shape[0]), (0, 0)))


def _run(how, kernel, memory, out_type, blocks, *arrays):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(min(cores(), blocks),),
        grid_names=("core",),
        num_threads=how.workers + 1,
        thread_name="warpgroup",
        scratch_types=memory,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*arrays)


# An expert's blocks begin with the multiple of 8 at or before its first token, as that is what TMA can begin with here;
# of the tokens that are another's nothing is written.


def most_blocks(M, E, tokens):
    """Of M tokens of E experts, however they are distributed."""
    used = min(M, E)
    return min(M, (M + 7 * used) // tokens + used)


@jit
def _plan(sizes_ptr, most, plan_ptr, E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr):
    """Writes int32[1 + most, 4]: how many blocks there are; then of each the expert, the first token, and the expert's
    own tokens, from where to where.  Grid: most / PART."""
    e = tl.arange(0, PADDED)
    size = tl.load(sizes_ptr + e, mask=e < E, other=0)
    end = tl.cumsum(size, 0)
    first = (end - size) // 8 * 8
    blocks = tl.where(size > 0, (end - first + TOKENS - 1) // TOKENS, 0)
    after = tl.cumsum(blocks, 0)
    block = tl.program_id(0) * PART + tl.arange(0, PART)
    expert = tl.sum((after[None, :] <= block[:, None]).to(tl.int32), 1)
    own = e[None, :] == expert[:, None]
    skipped = block - tl.sum(tl.where(own, (after - blocks)[None, :], 0), 1)
    row, here = plan_ptr + 4 * (1 + block), (block < most) & (expert < PADDED)
    tl.store(row, expert, mask=here)
    tl.store(row + 1, tl.sum(tl.where(own, first[None, :], 0), 1) + skipped * TOKENS, mask=here)
    tl.store(row + 2, tl.sum(tl.where(own, (end - size)[None, :], 0), 1), mask=here)
    tl.store(row + 3, tl.sum(tl.where(own, end[None, :], 0), 1), mask=here)
    tl.store(plan_ptr, tl.sum(blocks, 0))


def _planned(sizes, most, tokens):
    """What `_plan` writes."""
    part, E = 16, sizes.shape[0]
    (plan,) = triton_call(
        _plan, sizes, most, out=[jax.ShapeDtypeStruct((1 + most, 4), jnp.int32)], grid=(cdiv(most, part),), warps=4,
        stages=1, E=E, PADDED=power_of_two(E), TOKENS=tokens, PART=part,
    )  # fmt: skip
    return plan


TURNS = {16: 0.2, 32: 0.22, 64: 0.28, 96: 0.37, 128: 0.46, 192: 0.64, 256: 0.8}  # microseconds by tokens, for 128 lines


def chosen_of_experts(M, E, D, F):
    """How it should be done soonest, if experts' numbers of tokens have a standard deviation of half of their mean."""
    mean = M / min(M, E)
    spread = math.sqrt(2 * ((mean / 2) ** 2 + 5))  # with what blocks begin before their tokens

    def blocks(tokens):
        """Of an expert, about: the chances that it has a first, a second, ..."""
        ends = range(tokens, int(3 * mean) + tokens, tokens)
        return 1 + sum(math.erfc((end - mean - 3.5) / spread) / 2 for end in ends)

    tokens = min(TURNS, key=lambda t: blocks(t) * TURNS[t])
    return How(tokens, _inputs(D, tokens), workers=_workers(tokens, D, F)[-1])


def _kernel(how, T, D, F, group, dtype, scale_dtype, out_type, gated=False, experts=False):
    """The kernel, and what it has of shared memory and barriers.

    Gated: the first warpgroups' outputs are of the first half, the others' of the second; two whose outputs belong
    together are partners: of every two pieces each finishes one, and gives the other its sums of the other one.
    Experts: one argument more, of `_plan`.
    """
    tokens, inputs, split, workers = how
    block, firsts = LINES * workers, workers // 2
    turns, units, rows = D // inputs // split, inputs // UNIT, max(1, inputs // group)
    fits = (n for n in ((8, 16, 32) if gated else (16, 32, 48, 64)) if tokens % (n * (1 + gated)) == 0)
    piece, halves = max(fits), 1 + gated  # tokens whose results are written at a time; where outputs are taken from
    room = MEMORY - 2 * piece * block * out_type.itemsize * halves
    most = min(STAGES, turns, room // (tokens * inputs * 2 + block * (inputs // 2 + halves * rows * 3)))
    assert most >= min(turns, 2)  # a turn is freed in the next one
    # A remainder of anything but a power of two takes 20 instructions, which matters where there is little to multiply.
    stages = power_of_two(most + 1) // 2 if most >= 4 and tokens <= LITTLE else min(most, STAGES_OF_MANY)
    blocks, outputs = cdiv(T, tokens), F // block
    side = max(n for n in range(1, 2 * SIDE) if blocks % n == 0)
    together = 1 if experts else 8  # tokens that are written at least

    def slot_of(step):
        return step & (stages - 1) if stages & (stages - 1) == 0 else lax.rem(step, stages)

    def kernel(x_ref, tiles_ref, scale_ref, zero_ref, *refs):
        plan_ref, refs = (refs[0], refs[1:]) if experts else (None, refs)
        out_ref, x_in, words, scales, zeros, results, filled, free, *gate = refs
        warpgroup = lax.axis_index("warpgroup")

        def each(body):
            """Calls body(turns before, block of the outputs, part, block of the tokens) for each block of the core."""

            @plgpu.nd_loop((blocks // side, split, outputs, side), collective_axes="core")
            def _(loop):
                far, part, n, near = loop.index
                body(loop.local_index * turns, n, part, far * side + near)

        def each_planned(body):
            """The same of experts, whose blocks the device has counted."""
            first, step = lax.axis_index("core"), lax.axis_size("core")

            @pl.loop(0, lax.div(plan_ref[0, 0] * outputs - first + (step - 1), step))
            def _(i):
                item = first + i * step
                m = lax.div(item, outputs)
                body(i * turns, item - m * outputs, 0, m)

        def first_token(m):
            return plan_ref[1 + m, 1] if experts else m * tokens

        def load(before, n, part, m):
            expert, begin = plan_ref[1 + m, 0] if experts else 0, first_token(m)

            def turn(k, _):
                step, k = before + k, part * turns + k
                slot = slot_of(step)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                row = k * rows if inputs >= group else lax.div(k * inputs, group)
                at = filled.at[slot]
                x_at = x_ref.at[pl.ds(begin, tokens), pl.ds(k * inputs, inputs)]
                plgpu.copy_gmem_to_smem(x_at, x_in.at[slot], at)
                for h in range(halves):
                    count = block // ROWS // halves
                    tile = expert * (F // ROWS) + h * (F // 2 // ROWS) + n * count
                    tiles_at = tiles_ref.at[pl.ds(tile, count), pl.ds(k * units, units)]
                    plgpu.copy_gmem_to_smem(tiles_at, words.at[slot, pl.ds(h * count, count)], at)
                    # Of a half's lines only half are wanted, and stand where they would without halves.
                    lines = pl.ds(expert * F + h * (F // 2 - block // 2) + n * (block // halves), block)
                    plgpu.copy_gmem_to_smem(scale_ref.at[pl.ds(row, rows), lines], scales.at[slot, h], at)
                    plgpu.copy_gmem_to_smem(zero_ref.at[pl.ds(row, rows), lines], zeros.at[slot, h], at)

            lax.fori_loop(0, turns, turn, None)

        def multiply(before, n, part, m):
            mine, half = pl.ds(warpgroup * LINES, LINES), lax.div(warpgroup, firsts) if gated else 0

            def turn(k, acc):
                """Computes a unit's values while the one before is multiplied."""
                slot = slot_of(before + k)
                plgpu.barrier_wait(filled.at[slot])
                for u in range(units):
                    first, second = (64 * u // group, (64 * u + 32) // group) if inputs >= group else (0, 0)
                    near = [a.at[slot, half, row, mine] for row in (first, second) for a in (scales, zeros)]
                    values = lanes.unit(dtype, scale_dtype, group, words.at[slot, pl.ds(warpgroup * 4, 4), u], *near)
                    plgpu.wgmma(acc, values, x_in.at[slot].at[:, pl.ds(UNIT * u, UNIT)].T)
                    plgpu.wgmma_wait(1)
                    if u == 0:  # what the turn before has loaded has been multiplied

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[slot_of(before + k - 1)])

            def scoped(acc):
                # wgmma reads registers until it is done: with two units in the loop each has its own.
                several = 2 if units == 1 else 1

                @pl.loop(0, turns // several)
                def _(i):
                    for j in range(several):
                        turn(several * i + j, acc)

                if turns % several:
                    turn(turns - 1, acc)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot_of(before + turns - 1)])
                finish(acc[...].astype(out_type), n, part, m)

            pl.run_scoped(scoped, plgpu.ACC((LINES, tokens), jnp.float32))

        def finish(out, n, part, m):
            for p in range(tokens // (piece * halves)):
                values, first = out, p * piece
                token, line = first_token(m) + first, n * block + warpgroup * LINES
                if gated:
                    sums, given = gate
                    begin, first, half = 2 * p * piece, 0, lax.div(warpgroup, firsts)
                    partner = warpgroup + firsts * (1 - 2 * half)
                    token = first_token(m) + begin + half * piece
                    line = n * (block // 2) + lax.rem(warpgroup, firsts) * LINES
                    lanes.give(out, begin, sums.at[warpgroup, p % 2], firsts)
                    meet(given)  # what has been read there, two pieces ago, was so before the one between was given
                    values = lanes.gate(out, begin, sums.at[partner, p % 2], firsts)
                plgpu.wait_smem_to_gmem(min(p, 1), wait_read_only=True)
                lanes.put(values, first, results.at[warpgroup, p % 2], together)
                plgpu.commit_smem()
                if experts:
                    write_own(results.at[warpgroup, p % 2], token, line, m)
                else:
                    at = pl.ds(token, piece), pl.ds(line, LINES)
                    plgpu.copy_smem_to_gmem(results.at[warpgroup, p % 2], out_ref.at[part].at[at])
            if gated and tokens // (2 * piece) % 2:  # the next block begins where this one has ended
                meet(gate[1])

        def write_own(values, token, line, m):
            """Of the tokens from `token` on those that are the expert's; TMA takes as many as a program says."""
            begin = jnp.clip(plan_ref[1 + m, 2] - token, 0, piece)
            left = jnp.clip(plan_ref[1 + m, 3] - token, begin, piece) - begin

            def copy(count):
                at = pl.ds(token + begin, count), pl.ds(line, LINES)
                plgpu.copy_smem_to_gmem(values.at[pl.ds(begin, count)], out_ref.at[0].at[at], commit_group=False)

            count = power_of_two(piece)
            while count:
                pl.when(left & count != 0)(functools.partial(copy, count))
                begin, count = begin + (left & count), count // 2
            plgpu.commit_smem_to_gmem_group()

        def meet(barrier):
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        if experts:
            idle = lax.axis_index("core") >= plan_ref[0, 0] * outputs
            pl.when(~idle)(lambda: warpgroups.run(warpgroup, each_planned, load, multiply, free, workers))
        else:
            warpgroups.run(warpgroup, each, load, multiply, free, workers)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    gate = (plgpu.SMEM((workers, 2, LINES, piece), out_type), plgpu.Barrier(num_arrivals=workers)) if gated else ()
    return kernel, (
        plgpu.SMEM((stages, tokens, inputs), dtype, transforms=tiled),
        plgpu.SMEM((stages, block // ROWS, units, WORDS), jnp.int32),
        plgpu.SMEM((stages, halves, rows, block), scale_dtype),
        plgpu.SMEM((stages, halves, rows, block), jnp.uint8),
        plgpu.SMEM((workers, 2, piece, LINES), out_type, transforms=lanes.rows(out_type, together)),
        plgpu.Barrier(num_arrivals=1 + 3 * halves, num_barriers=stages),
        plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
        *gate,
    )


def lower(dtype, scale_dtype, group, experts=None):
    """Lowers a small case, of experts if so many are given, and throws it away; raises what Mosaic makes of it."""
    x = jax.ShapeDtypeStruct((16, 2 * UNIT), dtype)
    tiles = jax.ShapeDtypeStruct(((experts or 1) * BLOCK // ROWS, 2, WORDS), jnp.int32)
    parameters = 2 * UNIT // group, (experts or 1) * BLOCK
    arrays = x, tiles, *(jax.ShapeDtypeStruct(parameters, d) for d in (scale_dtype, jnp.uint8))
    if experts:
        traced = int4_experts.trace(*arrays, jax.ShapeDtypeStruct((experts,), jnp.int32), group=group)
    else:
        traced = int4_wgmma.trace(*arrays, group=group)
    traced.lower(lowering_platforms=("cuda",))
