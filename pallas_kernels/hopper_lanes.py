"""What the lanes of a warpgroup do in the int4 matmuls for Hopper, in instructions: values, results, SiLU.

Letters as in int4_mma.py, whose tiles fit wgmma's first operand too.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.int4_mma import BITS, UNIT

LINES = 64  # outputs of an instruction


def _scale_to(kind, scale_kind, register, address):
    """PTX that loads a scale into both halves of a register."""
    load = f"ld.shared.b16 h, [{address}];\n"
    if kind == scale_kind:
        return load + f"mov.b32 {register}, {{h, h}};\n"
    wide = "cvt.f32.f16 f, h;" if scale_kind == "f16" else "mov.b16 g, 0; mov.b32 f, {g, h};"
    return load + f"{wide} cvt.rn.{kind}x2.f32 {register}, f, f;\n"


def _values(dtype, scale_dtype, group):
    """PTX for a lane's values in a unit, 16 registers of two: see `unit`.  Rounded to dtype, like their scales."""
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


def unit(dtype, scale_dtype, group, words, scale, zero, scale2, zero2):
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


def rows(dtype, together=8):
    """How results stand in shared memory: rows of 128 bytes, swizzled; so many of them make a tile."""
    return plgpu.TilingTransform((together, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def put(out, begin, target, together=8):
    """Writes tokens of out [64 outputs, tokens], as wgmma leaves it, from `begin` on to target [some tokens, 64].

    target is of `rows`, swizzled, so that lanes write to all banks at once: 16-bit values by stmatrix, which transposes
    them, float32 one by one.
    """
    count = target.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(rows(out.dtype, together))))
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


def _two_pieces(out, begin, count, firsts):
    """Registers [2 * count / 8] of the piece that this warpgroup finishes, then of its partner's: the first of the two
    that begin at token `begin` is the first one's.  And whether it is the first: one of the `firsts` lowest.
    """
    i32, const, *_ = _lane()
    first = arith.cmpi(arith.CmpIPredicate.ult, mgpu_utils.thread_idx(), const(128 * firsts))
    registers = out.registers.reshape(out.shape[1] // 8, 2)[begin // 8 : (begin + 2 * count) // 8]
    near, far = ([llvm.bitcast(i32, r) for r in half.flat] for half in np.split(registers, 2))
    pairs = list(zip(near, far, strict=True))
    mine = [arith.select(first, a, b) for a, b in pairs]
    return mine, [arith.select(first, b, a) for a, b in pairs], first


def _place(ref, count):
    """Where `count` of a lane's registers stand while they wait for the partner."""
    i32, const, *_ = _lane()
    thread = arith.remui(mgpu_utils.thread_idx(), const(128))
    base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
    return arith.addi(base, arith.muli(thread, const(4 * count)))


def give(out, begin, target, firsts):
    """Of the two pieces from token `begin` on, the one that the partner finishes goes to target [64, tokens].

    Lanes of both have the same places in their matrices, so that it stands there as a lane has it.
    """
    count = target.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def leave(_, out, target):
        values = _two_pieces(out, begin, count, firsts)[1]
        n = min(4, len(values))  # of an instruction
        at, (several, kinds) = _place(target, n), _several(1, n)
        for j in range(0, len(values), n):
            text = f"st.shared.v{n}.b32 [$0 + {512 * j}], {several};"
            llvm.inline_asm(None, [at, *values[j : j + n]], text, f"r,{kinds},~{{memory}}", has_side_effects=True)

    leave(out, target)


def gate(out, begin, theirs, firsts):
    """silu(gate) * up [64, tokens] of this warpgroup's piece: the `firsts` have the gate, theirs (`give`) is up."""
    count = theirs.shape[1]
    text = _silu(jnp.dtype(out.dtype).name)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((LINES, count), out.dtype, layout=plgpu.Layout.WGMMA),
    )
    def finish(_, out, theirs):
        mine, _, first = _two_pieces(out, begin, count, firsts)
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

    return finish(out, theirs)
