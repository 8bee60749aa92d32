"""int4 matmuls for Hopper, for as many tokens as fill a wgmma: one warpgroup loads by TMA, two others multiply.

The tiles are those of int4_mma.py, which fit wgmma's first operand too.  Letters as there; a block has 128 outputs, 64
a warpgroup, of some tokens.  A core takes one block after the other, and loads the next while it writes out the last.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import warpgroups
from pallas_kernels.int4_mma import BITS, ROWS, UNIT, WORDS
from pallas_kernels.triton_call import cdiv, cores

LINES = 64  # outputs of an instruction
BLOCK = 2 * LINES  # what the number of outputs has to be a multiple of
TOKENS = 256  # at most, of an instruction
MEMORY = 222 << 10  # of the shared memory of a core
STAGES = 6  # turns that are loaded at a time, at most
SIDE = 4  # blocks of other tokens that go through the outputs side by side, about


def _scale_to(kind, scale_kind, register, address):
    """PTX that loads a scale into both halves of a register."""
    load = f"ld.shared.b16 h, [{address}];\n"
    if kind == scale_kind:
        return load + f"mov.b32 {register}, {{h, h}};\n"
    wide = "cvt.f32.f16 f, h;" if scale_kind == "f16" else "mov.b16 g, 0; mov.b32 f, {g, h};"
    return load + f"{wide} cvt.rn.{kind}x2.f32 {register}, f, f;\n"


def _values(dtype, scale_dtype, group):
    """PTX for a lane's values in a unit, 16 registers of two: see `_unit`.  Rounded to dtype, like their scales."""
    magic, one, kind = BITS[dtype]
    minus, scale_kind = {"bf16": "0xC300", "f16": "0xE400"}[kind], BITS[scale_dtype][2]
    text = (
        "{ .reg .b32 w<4>, t, one, z<2>, s<2>; .reg .b16 h, g; .reg .f32 f;\n"
        f"mov.b32 one, {one};\nld.shared.v4.b32 {{w0, w1, w2, w3}}, [$16];\n"
    )
    for step in range(4):
        if step == 0 or (step == 2 and group == 32):
            zero, scale = ("$17", "$18") if step == 0 else ("$19", "$20")
            for r in range(2):
                text += f"ld.shared.u8 z{r}, [{zero} + {8 * r}];\nor.b32 z{r}, z{r}, {minus};\n"
                text += f"prmt.b32 z{r}, z{r}, z{r}, 0x1010;\n"
                text += _scale_to(kind, scale_kind, f"s{r}", f"{scale} + {16 * r}")
        for r in range(4):
            out = f"${2 * (2 * step + r // 2) + r % 2}"
            text += f"shr.b32 t, w{step}, {4 * r};\n" if r else f"mov.b32 t, w{step};\n"
            text += f"lop3.b32 t, t, 0x000F000F, {magic}, 0xEA;\nfma.rn.{kind}x2 t, t, one, z{r % 2};\n"
            text += f"mul.rn.{kind}x2 {out}, t, s{r % 2};\n"
    return text + "}"


def _lane():
    """The type of addresses, what makes constants of it, the lane in its warp, and the warp in its warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    const = functools.partial(mgpu_utils.c, ty=i32)
    thread = arith.remui(mgpu_utils.thread_idx(), const(128))
    return i32, const, arith.remui(thread, const(32)), arith.divui(thread, const(32))


def _unit(dtype, scale_dtype, group, words, scale, zero, scale2, zero2):
    """The values [64, 64] of a warpgroup's outputs in a unit, from shared memory, as wgmma's first operand.

    words int32[4, 128]; scale, zero [64] of the unit's first half, scale2, zero2 of its second.
    """
    text = _values(jnp.dtype(dtype).name, jnp.dtype(scale_dtype).name, group)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * 5,
        return_type=plgpu.ShapeDtypeStruct((LINES, UNIT), dtype, layout=plgpu.Layout.WGMMA),
    )
    def load(_, words, scale, zero, scale2, zero2):
        def address(ref, offset):
            return arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), offset)

        i32, const, lane, warp = _lane()
        row = arith.addi(arith.divui(lane, const(4)), arith.muli(warp, const(16)))
        apart, _ = ir.MemRefType(words.type).get_strides_and_offset()  # a tile's other units may lie between
        quarter = arith.muli(warp, const(4 * apart[0]))
        inputs = [address(words, arith.addi(quarter, arith.muli(lane, const(16))))]
        for z, s in ((zero, scale), (zero2, scale2))[: 2 if group == 32 else 1]:
            inputs += [address(z, row), address(s, arith.muli(row, const(2)))]
        struct = llvm.StructType.get_literal([i32] * 16)
        kinds = ",".join(["=&r"] * 16 + ["r"] * len(inputs)) + ",~{memory}"
        out = llvm.inline_asm(struct, inputs, text, kinds, has_side_effects=True)
        pair = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(jnp.dtype(dtype)))
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((LINES, UNIT)), dtype=object)
        flat = [llvm.bitcast(pair, llvm.extractvalue(i32, out, [i])) for i in range(16)]
        registers.reshape(8, 2)[...] = np.array(flat, dtype=object).reshape(8, 2)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(words, scale, zero, scale2, zero2)


def _several(first, count):
    """Operands of so many registers, side by side, and LLVM's letters for them."""
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}", ",".join("r" * count)


def _rows(dtype):
    """How results stand in shared memory: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _put(out, begin, target):
    """Writes tokens of out [64 outputs, tokens], as wgmma leaves it, from `begin` on to target [some tokens, 64].

    target is swizzled, so that lanes write to all banks at once: 16-bit values by stmatrix, which transposes them,
    float32 one by one.
    """
    count = target.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_rows(out.dtype))))
    def store(_, out, target):
        i32, const, lane, warp = _lane()
        base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(target))

        def place(token, line, size):
            """The address of a token's line: rows of 128 bytes, whose 16 bytes change places with the row."""
            line_of = 128 // size  # lines a row
            chunk = arith.divui(arith.remui(line, const(line_of)), const(16 // size))
            chunk = arith.xori(chunk, arith.remui(token, const(8)))
            row = arith.addi(token, arith.muli(arith.divui(line, const(line_of)), const(8)))  # tiles of 8 rows
            if line_of < LINES:
                tile = arith.divui(token, const(8))
                row = arith.addi(row, arith.muli(tile, const(8 * (LINES // line_of - 1))))
            within = arith.muli(arith.remui(line, const(16 // size)), const(size))
            within = arith.addi(arith.shli(chunk, const(4)), within)
            return arith.addi(base, arith.addi(arith.muli(row, const(128)), within))

        registers = out.registers.reshape(out.shape[1] // 8, 2)[begin // 8 :]
        first = arith.muli(warp, const(16))
        if mgpu_utils.bytewidth(out.mlir_dtype) == 4:
            line = arith.addi(first, arith.divui(lane, const(4)))
            column = arith.muli(arith.remui(lane, const(4)), const(2))
            f32 = ir.F32Type.get()
            for half in range(2):
                for e in range(2):
                    at = place(arith.addi(column, const(e)), arith.addi(line, const(8 * half)), 4)
                    for j in range(count // 8):  # 8 tokens are 2 KiB
                        value = llvm.bitcast(f32, vector.extract(registers[j, half], [], [e]))
                        text = f"st.shared.f32 [$0 + {2048 * j}], $1;"
                        llvm.inline_asm(None, [at, value], text, "r,f,~{memory}", has_side_effects=True)
            return
        matrix = arith.divui(lane, const(8))  # whose rows' addresses the lane gives: half, half, of the next tokens ...
        line = arith.addi(first, arith.muli(arith.remui(matrix, const(2)), const(8)))
        token = arith.addi(arith.remui(lane, const(8)), arith.muli(arith.divui(matrix, const(2)), const(8)))
        at = place(token, line, 2)
        for j in range(0, count // 8, 2):
            values = [llvm.bitcast(i32, value) for value in registers[j : min(j + 2, count // 8)].flat]
            several, kinds = _several(1, len(values))
            text = f"stmatrix.sync.aligned.m8n8.x{len(values)}.trans.shared.b16 [$0 + {1024 * j}], {several};"
            llvm.inline_asm(None, [at, *values], text, f"r,{kinds},~{{memory}}", has_side_effects=True)

    store(out, target)


def _silu(dtype):
    """PTX for silu(gate) * up of two values each: $0 of $1 and $2, in float32."""
    kind = BITS[dtype][2]
    text = "{ .reg .b32 g<2>, u<2>, e, minus, one; .reg .b16 h, k;\n"
    text += "mov.b32 minus, 0xBFB8AA3B;\nmov.b32 one, 0x3F800000;\n"  # -log2(e), 1
    for register, name in (("$1", "g"), ("$2", "u")):
        if kind == "bf16":
            text += f"shl.b32 {name}0, {register}, 16;\nand.b32 {name}1, {register}, 0xFFFF0000;\n"
        else:
            text += f"mov.b32 {{h, k}}, {register};\ncvt.f32.f16 {name}0, h;\ncvt.f32.f16 {name}1, k;\n"
    for i in range(2):  # exp(-gate) by a power of two
        text += f"mul.f32 e, g{i}, minus;\nex2.approx.ftz.f32 e, e;\nadd.f32 e, e, one;\nrcp.approx.ftz.f32 e, e;\n"
        text += f"mul.f32 g{i}, g{i}, e;\nmul.f32 g{i}, g{i}, u{i};\n"
    return text + f"cvt.rn.{kind}x2.f32 $0, g1, g0;\n}}"


def _two_pieces(out, begin, count):
    """Registers [2 * count / 8] of the piece that this warpgroup finishes, then of the other's: the first one's is the
    first of the two that begin at token `begin`.  And whether it is the first.
    """
    i32, const, *_ = _lane()
    first = arith.cmpi(arith.CmpIPredicate.ult, mgpu_utils.thread_idx(), const(128))
    registers = out.registers.reshape(out.shape[1] // 8, 2)[begin // 8 : (begin + 2 * count) // 8]
    near, far = ([llvm.bitcast(i32, r) for r in half.flat] for half in np.split(registers, 2))
    pairs = list(zip(near, far, strict=True))
    mine = [arith.select(first, a, b) for a, b in pairs]
    return mine, [arith.select(first, b, a) for a, b in pairs], first


def _place(ref, count):
    """Where `count` of a lane's registers stand while they wait for the other warpgroup."""
    i32, const, *_ = _lane()
    thread = arith.remui(mgpu_utils.thread_idx(), const(128))
    base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
    return arith.addi(base, arith.muli(thread, const(4 * count)))


def _give(out, begin, target):
    """Of the two pieces from token `begin` on, the one that the other warpgroup finishes goes to target [64, tokens].

    Lanes of both have the same places in their matrices, so that it stands there as a lane has it.
    """
    count = target.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def give(_, out, target):
        values = _two_pieces(out, begin, count)[1]
        n = min(4, len(values))  # of an instruction
        at, (several, kinds) = _place(target, n), _several(1, n)
        for j in range(0, len(values), n):
            text = f"st.shared.v{n}.b32 [$0 + {512 * j}], {several};"
            llvm.inline_asm(None, [at, *values[j : j + n]], text, f"r,{kinds},~{{memory}}", has_side_effects=True)

    give(out, target)


def _gate(out, begin, theirs):
    """silu(gate) * up [64, tokens] of this warpgroup's piece: the first has the gate, and theirs (`_give`) is up."""
    count = theirs.shape[1]
    text = _silu(jnp.dtype(out.dtype).name)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((LINES, count), out.dtype, layout=plgpu.Layout.WGMMA),
    )
    def gate(_, out, theirs):
        mine, _, first = _two_pieces(out, begin, count)
        n = min(4, len(mine))
        at, several, kinds = _place(theirs, n), _several(0, n)[0], ",".join(["=r"] * n)
        i32 = ir.IntegerType.get_signless(32)
        struct, pair, found = llvm.StructType.get_literal([i32] * n), ir.VectorType.get((2,), out.mlir_dtype), []
        for j in range(0, len(mine), n):
            load = f"ld.shared.v{n}.b32 {several}, [${n} + {512 * j}];"
            got = llvm.inline_asm(struct, [at], load, f"{kinds},r,~{{memory}}", has_side_effects=True)
            for i, own in enumerate(mine[j : j + n]):
                other = llvm.extractvalue(i32, got, [i])
                pairs = arith.select(first, own, other), arith.select(first, other, own)
                found.append(llvm.bitcast(pair, llvm.inline_asm(i32, pairs, text, "=r,r,r")))
        layout = mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape((LINES, count)), dtype=object)
        registers.reshape(-1)[...] = np.array(found, dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return gate(out, theirs)


class How(NamedTuple):
    """How a matmul is shared out."""

    tokens: int  # of a block, a multiple of 16
    inputs: int = 64  # of a turn
    split: int = 1  # parts of the inputs, which are summed up afterwards


# Microseconds on an H200: a turn of 64 inputs by what it loads, and by what it multiplies (either is a start and so
# much for a token); a block, beside its turns; the launch; summing up the parts, and a MB of them.
LOADED, MULTIPLIED, BLOCK_ENDS, LAUNCH, SUM, SUM_OF_MB = (0.194, 0.0017), (0.1, 0.0024), 1.3, 1.0, 1.85, 0.14


def _microseconds(T, D, F, tokens, split):
    """About what a matmul takes, by blocks of so many tokens and parts of the inputs; a core has one at a time."""
    rounds = cdiv(F // BLOCK * cdiv(T, tokens) * split, cores())
    turn = max(start + each * tokens for start, each in (LOADED, MULTIPLIED))
    parts = SUM + SUM_OF_MB * split * T * F * 8e-6 if split > 1 else 0
    return LAUNCH + rounds * (D // UNIT // split * turn + BLOCK_ENDS) + parts


def chosen(T, D, F, group):
    """How it should be done soonest."""
    whole = D // (128 if D % 128 == 0 else 64)
    splits = [n for n in range(1, whole // 2 + 1) if whole % n == 0 and D // n % group == 0] or [1]
    least = cdiv(T, TOKENS)
    shares = (cdiv(T, n) for n in range(least, max(least, min(cdiv(T, 64), least + 4)) + 1))
    shares = dict.fromkeys(cdiv(t, 32) * 32 if t > 64 else cdiv(t, 16) * 16 for t in shares)
    tokens, split = min(((t, s) for t in shares for s in splits), key=lambda how: _microseconds(T, D, F, *how))
    return How(tokens, 128 if D % 128 == 0 and tokens <= 128 else 64, split)


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
    padded = max(how.tokens, cdiv(T, 8) * 8)  # what is beyond is neither read nor written
    x = jnp.pad(x, ((0, padded - T), (0, 0)))
    out_type = jnp.dtype(jnp.float32) if how.split > 1 else dtype
    kernel, memory = _kernel(how, padded, D, F, group, x.dtype, scale.dtype, out_type, gated)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((how.split, padded, F // (1 + gated)), out_type),
        grid=(min(cores(), F // BLOCK * cdiv(T, how.tokens) * how.split),),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=memory,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, tiles, scale, zero)
    out = out[0] if how.split == 1 else out.sum(0)
    return out[:T].astype(dtype)


def _kernel(how, T, D, F, group, dtype, scale_dtype, out_type, gated=False):
    """The kernel, and what it has of shared memory and barriers.

    Gated: the first warpgroup's outputs are of the first half, the other's of the second; of every two pieces each
    warpgroup finishes one, and gives the other its sums of the other one.
    """
    tokens, inputs, split = how
    turns, units, rows = D // inputs // split, inputs // UNIT, max(1, inputs // group)
    fits = (n for n in ((8, 16, 32) if gated else (16, 32, 48, 64)) if tokens % (n * (1 + gated)) == 0)
    piece, halves = max(fits), 1 + gated  # tokens whose results are written at a time; where outputs are taken from
    room = MEMORY - 2 * piece * BLOCK * out_type.itemsize * halves
    stages = min(STAGES, turns, room // (tokens * inputs * 2 + BLOCK * (inputs // 2 + halves * rows * 3)))
    assert stages >= min(turns, 2)  # a turn is freed in the next one
    blocks, outputs = cdiv(T, tokens), F // BLOCK
    side = max(n for n in range(1, 2 * SIDE) if blocks % n == 0)

    def kernel(
        x_ref, tiles_ref, scale_ref, zero_ref, out_ref, x_in, words, scales, zeros, results, filled, free, *gate
    ):
        warpgroup = lax.axis_index("warpgroup")

        def each(body):
            """Calls body(turns before, block of the outputs, part, block of the tokens) for each block of the core."""

            @plgpu.nd_loop((blocks // side, split, outputs, side), collective_axes="core")
            def _(loop):
                far, part, n, near = loop.index
                body(loop.local_index * turns, n, part, far * side + near)

        def load(before, n, part, m):
            def turn(k, _):
                step, k = before + k, part * turns + k
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                row = k * rows if inputs >= group else lax.div(k * inputs, group)
                at = filled.at[slot]
                x_at = x_ref.at[pl.ds(m * tokens, tokens), pl.ds(k * inputs, inputs)]
                plgpu.copy_gmem_to_smem(x_at, x_in.at[slot], at)
                for h in range(halves):
                    each = BLOCK // ROWS // halves
                    tiles_at = tiles_ref.at[pl.ds(h * (F // 2 // ROWS) + n * each, each), pl.ds(k * units, units)]
                    plgpu.copy_gmem_to_smem(tiles_at, words.at[slot, pl.ds(h * each, each)], at)
                    # Of a half 64 lines are wanted, and stand where they would without halves.
                    lines = pl.ds(h * (F // 2 - LINES) + n * (BLOCK // halves), BLOCK)
                    plgpu.copy_gmem_to_smem(scale_ref.at[pl.ds(row, rows), lines], scales.at[slot, h], at)
                    plgpu.copy_gmem_to_smem(zero_ref.at[pl.ds(row, rows), lines], zeros.at[slot, h], at)

            lax.fori_loop(0, turns, turn, None)

        def multiply(before, n, part, m):
            mine, half = pl.ds(warpgroup * LINES, LINES), warpgroup if gated else 0

            def turn(k, acc):
                """Computes a unit's values while the one before is multiplied."""
                slot = lax.rem(before + k, stages)
                plgpu.barrier_wait(filled.at[slot])
                for u in range(units):
                    first, second = (64 * u // group, (64 * u + 32) // group) if inputs >= group else (0, 0)
                    near = [a.at[slot, half, row, mine] for row in (first, second) for a in (scales, zeros)]
                    values = _unit(dtype, scale_dtype, group, words.at[slot, pl.ds(warpgroup * 4, 4), u], *near)
                    plgpu.wgmma(acc, values, x_in.at[slot].at[:, pl.ds(UNIT * u, UNIT)].T)
                    plgpu.wgmma_wait(1)
                    if u == 0:  # what the turn before has loaded has been multiplied

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(free.at[lax.rem(before + k - 1, stages)])

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
                plgpu.barrier_arrive(free.at[lax.rem(before + turns - 1, stages)])
                finish(acc[...].astype(out_type), n, part, m)

            pl.run_scoped(scoped, plgpu.ACC((LINES, tokens), jnp.float32))

        def finish(out, n, part, m):
            for p in range(tokens // (piece * halves)):
                values, first = out, p * piece
                token, line = m * tokens + first, n * BLOCK + warpgroup * LINES
                if gated:
                    sums, given = gate
                    begin, first = 2 * p * piece, 0
                    token, line = m * tokens + begin + warpgroup * piece, n * LINES
                    _give(out, begin, sums.at[warpgroup, p % 2])
                    meet(given)  # what has been read there, two pieces ago, was so before the one between was given
                    values = _gate(out, begin, sums.at[1 - warpgroup, p % 2])
                plgpu.wait_smem_to_gmem(min(p, 1), wait_read_only=True)
                _put(values, first, results.at[warpgroup, p % 2])
                plgpu.commit_smem()
                at = pl.ds(token, piece), pl.ds(line, LINES)
                plgpu.copy_smem_to_gmem(results.at[warpgroup, p % 2], out_ref.at[part].at[at])
            if gated and tokens // (2 * piece) % 2:  # the next block begins where this one has ended
                meet(gate[1])

        def meet(barrier):
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        warpgroups.run(warpgroup, each, load, multiply, free)

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    gate = (plgpu.SMEM((2, 2, LINES, piece), out_type), plgpu.Barrier(num_arrivals=2)) if gated else ()
    return kernel, (
        plgpu.SMEM((stages, tokens, inputs), dtype, transforms=tiled),
        plgpu.SMEM((stages, BLOCK // ROWS, units, WORDS), jnp.int32),
        plgpu.SMEM((stages, halves, rows, BLOCK), scale_dtype),
        plgpu.SMEM((stages, halves, rows, BLOCK), jnp.uint8),
        plgpu.SMEM((2, 2, piece, LINES), out_type, transforms=_rows(out_type)),
        plgpu.Barrier(num_arrivals=1 + 3 * halves, num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        *gate,
    )


def lower(dtype, scale_dtype, group):
    """Lowers a small case, and throws the result away; raises what Mosaic makes of it."""
    x = jax.ShapeDtypeStruct((16, 2 * UNIT), dtype)
    tiles = jax.ShapeDtypeStruct((BLOCK // ROWS, 2, WORDS), jnp.int32)
    scale, zero = (jax.ShapeDtypeStruct((2 * UNIT // group, BLOCK), d) for d in (scale_dtype, jnp.uint8))
    int4_wgmma.trace(x, tiles, scale, zero, group=group).lower(lowering_platforms=("cuda",))
