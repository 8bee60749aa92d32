"""int4 matmuls for Hopper, for as many tokens as fill a wgmma: one warpgroup loads by TMA, two others multiply.

The tiles are those of int4_mma.py, which fit wgmma's first operand too, as long as the tokens' inputs stand in the
order in which the tiles have them (`_ordered`).  Letters as there; a block has 128 outputs, 64 a warpgroup.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_mma import BITS, ROWS, UNIT, WORDS
from pallas_kernels.triton_call import cdiv, cores, power_of_two

WARPGROUPS = 2  # that multiply; with four, the last would wait forever for registers that no one gives back
LINES = 64  # outputs of an instruction
BLOCK = WARPGROUPS * LINES  # what the number of outputs has to be a multiple of
MEMORY = 220 << 10  # of the shared memory of a core
START = 6  # turns that pass, about, until a block has its first inputs, and while it writes its results


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
        i32 = ir.IntegerType.get_signless(32)

        def const(n):
            return mgpu_utils.c(n, i32)

        def address(ref, offset):
            return arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), offset)

        thread = arith.remui(mgpu_utils.thread_idx(), const(128))
        warp, row = arith.divui(thread, const(32)), arith.divui(thread, const(4))  # rows of 8 a warp, so far
        row = arith.addi(row, arith.muli(warp, const(8)))
        apart, _ = ir.MemRefType(words.type).get_strides_and_offset()  # a tile's other units may lie between
        lane = arith.muli(arith.remui(thread, const(32)), const(16))
        inputs = [address(words, arith.addi(arith.muli(warp, const(4 * apart[0])), lane))]
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


def _put(out, target):
    """Writes out [64 outputs, tokens], as wgmma leaves it, to target [tokens, 64] in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, out, target):
        index = ir.IndexType.get()
        thread = arith.index_cast(index, mgpu_utils.thread_idx())

        def const(n):
            return mgpu_utils.c(n, index)

        thread = arith.remui(thread, const(128))
        lane = arith.remui(thread, const(32))
        line = arith.addi(arith.muli(arith.divui(thread, const(32)), const(16)), arith.divui(lane, const(4)))
        column = arith.muli(arith.remui(lane, const(4)), const(2))
        tokens = out.shape[1]
        registers = out.registers.reshape(tokens // 8, 2)
        for j in range(tokens // 8):
            for half in range(2):
                for e in range(2):
                    value = vector.extract(registers[j, half], [], [e])
                    at = [arith.addi(column, const(8 * j + e)), arith.addi(line, const(8 * half))]
                    memref.store(value, target, at)

    store(out, target)


def _rows(dtype):
    """How results stand in shared memory: rows of 128 bytes, swizzled."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def _put_swizzled(out, target):
    """Writes out [64 outputs, tokens], as wgmma leaves it, to target [tokens, 64] in swizzled shared memory.

    Lanes write to all banks at once: 16-bit values by stmatrix, which transposes them, float32 one by one.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_rows(out.dtype))))
    def store(_, out, target):
        i32 = ir.IntegerType.get_signless(32)

        def const(n):
            return mgpu_utils.c(n, i32)

        def place(base, token, line, size):
            """The address of a token's line: rows of 128 bytes, whose 16 bytes change places with the row."""
            line_of = 128 // size  # lines a row
            chunk = arith.xori(arith.divui(arith.remui(line, const(line_of)), const(16 // size)),
                               arith.remui(token, const(8)))  # fmt: skip
            row = arith.addi(token, arith.muli(arith.divui(line, const(line_of)), const(8)))  # tiles of 8 rows
            if line_of < LINES:
                tile = arith.divui(token, const(8))
                row = arith.addi(row, arith.muli(tile, const(8 * (LINES // line_of - 1))))
            within = arith.muli(arith.remui(line, const(16 // size)), const(size))
            return arith.addi(base, arith.addi(arith.muli(row, const(128)), arith.addi(arith.shli(chunk, const(4)),
                                                                                        within)))  # fmt: skip

        thread = arith.remui(mgpu_utils.thread_idx(), const(128))
        lane, warp = arith.remui(thread, const(32)), arith.divui(thread, const(32))
        base, tokens = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(target)), out.shape[1]
        registers = out.registers.reshape(tokens // 8, 2)
        first = arith.muli(warp, const(16))
        if mgpu_utils.bytewidth(out.mlir_dtype) == 4:
            line = arith.addi(first, arith.divui(lane, const(4)))
            column = arith.muli(arith.remui(lane, const(4)), const(2))
            f32 = ir.F32Type.get()
            for half in range(2):
                for e in range(2):
                    at = place(base, arith.addi(column, const(e)), arith.addi(line, const(8 * half)), 4)
                    for j in range(tokens // 8):  # 8 tokens are 2 KiB
                        value = llvm.bitcast(f32, vector.extract(registers[j, half], [], [e]))
                        text = f"st.shared.f32 [$0 + {2048 * j}], $1;"
                        llvm.inline_asm(None, [at, value], text, "r,f,~{memory}", has_side_effects=True)
            return
        matrix = arith.divui(lane, const(8))  # whose rows' addresses the lane gives: half, half, of the next tokens ...
        line = arith.addi(first, arith.muli(arith.remui(matrix, const(2)), const(8)))
        token = arith.addi(arith.remui(lane, const(8)), arith.muli(arith.divui(matrix, const(2)), const(8)))
        at = place(base, token, line, 2)
        for j in range(0, tokens // 8, 2):
            values = [llvm.bitcast(i32, registers[j + n // 2, n % 2]) for n in range(4)]
            text = f"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0 + {1024 * j}], {{$1, $2, $3, $4}};"
            llvm.inline_asm(None, [at, *values], text, "r,r,r,r,r,~{memory}", has_side_effects=True)

    store(out, target)


def _ordered(x):
    """Tokens with their inputs in the order of the tiles: what a lane has for one instruction, then for the next.

    XLA makes it part of the norm, or of the product, that these come from; after attention it is a kernel of its own.
    """
    T, D = x.shape
    return x.reshape(T, D // 32, 4, 2, 2, 2).transpose(0, 1, 3, 4, 2, 5).reshape(T, D)


class How(NamedTuple):
    """How a matmul is shared out."""

    tokens: int  # of a block
    inputs: int = 128  # of a turn
    split: int = 1  # parts of the inputs, which are summed up afterwards
    high: int = 1  # times 64 outputs of a warpgroup
    stages: int = 4  # turns that are loaded at a time, at most
    cluster: int = 1  # blocks that get the tokens' inputs together
    overlap: bool = False  # a unit's values are computed while the one before is multiplied
    swizzled: bool = False  # the results go through swizzled shared memory


def _split(blocks, D, inputs, group):
    """Parts of the inputs with which all is done soonest; registers are for one block a core at a time."""
    turns = D // inputs
    parts = [n for n in range(1, turns // 2 + 1) if n == 1 or (turns % n == 0 and D // n % group == 0)] or [1]
    return min(parts, key=lambda n: cdiv(blocks * n, cores()) * (turns // n + START))


def plain(T, D, F, group):
    """How that has been measured."""
    tokens, inputs = min(128, max(16, power_of_two(T))), 128 if D % 128 == 0 else 64
    return How(tokens, inputs, _split(F // BLOCK * cdiv(T, tokens), D, inputs, group))


def planned(T, D, F, group):
    """How that should be faster, by what the instructions say: weights become values once, or while others multiply."""
    tokens = min(256, max(16, power_of_two(T)))
    inputs = 128 if D % 128 == 0 and tokens < 256 else 64
    blocks = F // BLOCK * cdiv(T, tokens)
    high = 2 if tokens < 256 and F % (2 * BLOCK) == 0 and cores() < blocks <= 2 * cores() else 1
    if high * tokens == 256:
        inputs = 64  # for the shared memory
    split = _split(blocks // high, D, inputs, group)
    return How(tokens, inputs, split, high, 6 if tokens <= 64 else 4, overlap=True, swizzled=True)


CHOICE = plain  # or planned


@functools.partial(jax.jit, static_argnames=("group", "dtype", "how", "ordered"))
def int4_wgmma(x, tiles, scale, zero, *, group, dtype=None, how=None, ordered=False):
    """x [T, D] times the matrix of `tiles` (two-dimensional out), to [T, F]; F a multiple of 128.

    how: a `How` (that of `CHOICE` unless said); ordered: the tokens' inputs stand in the order of the tiles already.
    """
    (T, D), F, dtype = x.shape, scale.shape[1], jnp.dtype(dtype or x.dtype)
    tokens, inputs, split, high, stages, cluster, overlap, swizzled = how or CHOICE(T, D, F, group)
    padded, mine = cdiv(T, tokens) * tokens, LINES * high  # of a warpgroup
    block = WARPGROUPS * mine
    x = jnp.pad(x if ordered else _ordered(x), ((0, padded - T), (0, 0)))
    turns, units, rows = D // inputs // split, inputs // UNIT, max(1, inputs // group)
    out_type = jnp.dtype(jnp.float32) if split > 1 else dtype
    stage = tokens * inputs * 2 + block * inputs // 2 + rows * block * 3 + 1024
    stages = min(stages, turns, (MEMORY - block * tokens * out_type.itemsize) // stage)
    overlap = overlap and stages > 1

    def kernel(x_ref, tiles_ref, scale_ref, zero_ref, out_ref, result):
        warpgroup, n, part, m = (lax.axis_index(name) for name in ("warpgroup", "n", "part", "m"))
        if cluster > 1:
            n = n * cluster + lax.axis_index("beside")

        def context(run):
            def scoped(*accs):
                run(accs)
                plgpu.wgmma_wait(0)
                for i, acc in enumerate(accs):
                    put = _put_swizzled if swizzled else _put
                    put(acc[...].astype(out_type), result.at[warpgroup * high + i])
                plgpu.commit_smem()
                for i in range(high):
                    at = out_ref.at[part, pl.ds(m * tokens, tokens),
                                    pl.ds(n * block + warpgroup * mine + i * LINES, LINES)]  # fmt: skip
                    plgpu.copy_smem_to_gmem(result.at[warpgroup * high + i], at)
                plgpu.wait_smem_to_gmem(0)

            pl.run_scoped(scoped, *[plgpu.ACC((LINES, tokens), jnp.float32)] * high)

        def turn(_, x_part, words, scales, zeros, accs):
            for u in range(units):
                first, second = (64 * u // group, (64 * u + 32) // group) if inputs >= group else (0, 0)
                for i, acc in enumerate(accs):
                    tile, lines = warpgroup * high + i, pl.ds(warpgroup * mine + i * LINES, LINES)
                    values = _unit(x.dtype, scale.dtype, group, words.at[pl.ds(tile * 4, 4), u],
                                   scales.at[first, lines], zeros.at[first, lines], scales.at[second, lines],
                                   zeros.at[second, lines])  # fmt: skip
                    plgpu.wgmma(acc, values, x_part.at[:, pl.ds(UNIT * u, UNIT)].T)
                    if overlap:
                        plgpu.wgmma_wait(1)
            if not overlap:
                plgpu.wgmma_wait(0)
            return accs

        tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        memory = {"memory_space": plgpu.SMEM, "delay_release": int(overlap)}
        together = {"collective_axes": ("beside",)} if cluster > 1 else {}

        def group_at(k):
            return (k * inputs // group if inputs < group else k, 0)

        plgpu.emit_pipeline_warp_specialized(
            turn, grid=(turns,), memory_registers=40, wg_axis="warpgroup", num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=stages, compute_context=context,
            in_specs=[
                plgpu.BlockSpec((tokens, inputs), lambda k: (0, k), transforms=tiled, **memory, **together),
                plgpu.BlockSpec((block // ROWS, units, WORDS), lambda k: (0, k, 0), **memory),
                plgpu.BlockSpec((rows, block), group_at, **memory),
                plgpu.BlockSpec((rows, block), group_at, **memory),
            ],
        )(
            x_ref.at[pl.ds(m * tokens, tokens), pl.ds(part * (D // split), D // split)],
            tiles_ref.at[pl.ds(n * (block // ROWS), block // ROWS), pl.ds(part * (turns * units), turns * units)],
            scale_ref.at[pl.ds(part * (D // split // group), D // split // group), pl.ds(n * block, block)],
            zero_ref.at[pl.ds(part * (D // split // group), D // split // group), pl.ds(n * block, block)],
        )  # fmt: skip

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((split, padded, F), out_type),
        grid=(F // block // cluster, split, padded // tokens),
        grid_names=("n", "part", "m"),
        **({"cluster": (cluster,), "cluster_names": ("beside",)} if cluster > 1 else {}),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((WARPGROUPS * high, tokens, LINES), out_type, transforms=_rows(out_type) if swizzled else ()),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, tiles, scale, zero)
    out = out[0] if split == 1 else out.sum(0)
    return out[:T].astype(dtype)


def lower(dtype, scale_dtype, group):
    """Lowers a small case, and throws the result away; raises what Mosaic makes of it."""
    x = jax.ShapeDtypeStruct((16, 2 * UNIT), dtype)
    tiles = jax.ShapeDtypeStruct((BLOCK // ROWS, 2, WORDS), jnp.int32)
    scale, zero = (jax.ShapeDtypeStruct((2 * UNIT // group, BLOCK), d) for d in (scale_dtype, jnp.uint8))
    int4_wgmma.trace(x, tiles, scale, zero, group=group).lower(lowering_platforms=("cuda",))
