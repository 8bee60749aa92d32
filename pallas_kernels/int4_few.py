"""int4 products of few tokens: norm, product, and SiLU or residual in one kernel that reads its weights once.

A step of few tokens waits for memory, so instructions for each byte of weights are what is to be saved.  The weights
are the 8-bit integers of mma.m16n8k32 as they are: the lower nibbles of a word's bytes are four inputs of one output,
the upper ones, 16 times too large, of the output 8 below (the layout of `int4_tiles`).  The tokens become integers of
15 bits, with a power of two for each token and group of inputs: what a bfloat16 of at least a 64th of the largest has,
they have.  Such an integer's two bytes are two columns of the second operand.  Sums are exact until a group's scale.

Words come to shared memory by asynchronous copies, in a ring of `stages` for each warp, as ptxas moves plain loads to
where they are used first.  D inputs, F outputs, T tokens; a tile has 16 outputs, a chunk 128 inputs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import expert_tile
from pallas_kernels.int4_mma import ROWS, UNIT
from pallas_kernels.triton_call import cdiv, cores, jit, power_of_two, tl, triton_call

CHUNK = 2 * UNIT
WORDS = 2 * 512  # bytes of a tile and a chunk
PASS, STAGING = 512, 576  # bytes that a warp's tokens take on their way to their places, without and with their scales
SHARED = 48 << 10  # bytes that a kernel may declare
MOST = 16  # tokens of a program


# ---- Instructions, as functions of the type and the sizes.


def bring():
    """Asks for a chunk of a tile.

    Results: 0.  Inputs: shared address, address, bytes (16, or 0 for zeros) of each unit; of scales and zeros, shared
    address, address, bytes, whether to.
    """
    copy = "cp.async.cg.shared.global"
    text = f"""{{ .reg .pred p;
setp.ne.b32 p, $8, 0;
{copy} [$1], [$2], 16, $3;
{copy} [$1 + 512], [$2 + 512], 16, $4;
@p {copy} [$5], [$6], 16, $7;
cp.async.commit_group;
mov.b32 $0, 0; }}"""
    return text, "=r,r,l,r,r,r,l,r,r"


TOGETHER = "{ bar.warp.sync 0xFFFFFFFF;\nmov.b32 $0, $1;\n}"
NOTHING = "{ cp.async.commit_group;\nmov.b32 $0, $1;\n}"


def take(subs, stages):
    """Waits for the oldest chunk: its 8 words, then for each group scales' bits and zeros of rows r and r + 8.

    Inputs: the shared addresses of the lane's words, of its row's scale and of its row's zero.
    """
    n = 8 + 4 * subs
    lines = [f"cp.async.wait_group {stages - 1}", "bar.warp.sync 0xFFFFFFFF"]
    lines += [f"ld.shared.v4.b32 {{${4 * u}, ${4 * u + 1}, ${4 * u + 2}, ${4 * u + 3}}}, [${n} + {512 * u}]"
              for u in range(2)]  # fmt: skip
    for s in range(subs):
        at = 8 + 4 * s
        for i in range(2):
            lines.append(f"ld.shared.u16 ${at + i}, [${n + 1} + {48 * s + 16 * i}]")
            lines.append(f"ld.shared.u8 ${at + 2 + i}, [${n + 2} + {48 * s + 8 * i}]")
    lines.append("bar.warp.sync 0xFFFFFFFF")  # what stands there may be overwritten
    return "{ " + ";\n".join(lines) + ";\n}", ",".join(["=&r"] * n + ["r"] * 3)


LOAD_X = """{ .reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
}"""
LOAD_X_KINDS = "=&r,=&r,=&r,=&r,l,r"

MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"


def _floats(kind, words, out):
    """PTX that makes two floats of each word."""
    lines = []
    for i, w in enumerate(words):
        low, high = out[2 * i], out[2 * i + 1]
        if kind == "bf16":
            lines += [f"shl.b32 {low}, {w}, 16", f"and.b32 {high}, {w}, 0xFFFF0000"]
        else:
            lines += [f"mov.b32 {{u, v}}, {w}", f"cvt.f32.f16 {low}, u", f"cvt.f32.f16 {high}, v"]
    return lines


def prepare(kind, rounds, subs, norm):
    """2 * rounds tokens' chunk as the second operand.

    Results: 8 registers of it; for each group the power of two and the sum (of integers, negative) of the lane's token,
    that is lane % 4; for each round, with `norm`, the sum of squares of the lane's inputs.
    Inputs: the warp's shared address, the lane, for each round the 8 inputs lane % 16 of that token (4 words), the
    norm's 8 (4 words).
    """
    results = 8 + 2 * subs + rounds * norm
    given = [f"${results + i}" for i in range(2 + 4 * rounds + 4 * norm)]
    base, lane = given[:2]
    f, v = [f"f{i}" for i in range(8)], [f"v{i}" for i in range(8)]
    lines = [".reg .pred p<2>", ".reg .b32 at, to, t, m, e, inv, one, nought, keep, send, even, odd",
             ".reg .b16 u, v", ".reg .f32 f<8>, g<8>", f".reg .b32 v<8>, q<2>, w<{4 * rounds}>, a<4>",
             "mov.b32 one, 0x01010101", "mov.b32 nought, 0", f"shr.b32 t, {lane}, 3", "and.b32 t, t, 1",
             "setp.ne.b32 p1, t, 0", "xor.b32 t, t, 1", "setp.ne.b32 p0, t, 0",
             f"and.b32 t, {lane}, 1", "shl.b32 at, t, 5", f"and.b32 to, {lane}, 6", "shl.b32 to, to, 1",
             "add.u32 at, at, to", "sub.u32 t, nought, t", "and.b32 to, t, 0x4444", "add.u32 keep, to, 0x3210",
             "sub.u32 send, 0x7654, to", "and.b32 to, t, 0x3C3C", "sub.u32 even, 0x5140, to",
             "sub.u32 odd, 0x7362, to", f"and.b32 t, {lane}, 16", "shl.b32 t, t, 3", "add.u32 at, at, t",
             f"add.u32 at, at, {base}"]  # fmt: skip
    # Of scales: token, then group.
    lines += [f"shr.b32 to, {lane}, 4", f"shl.b32 to, to, {subs.bit_length() + 1}", f"and.b32 t, {lane}, 15",
              f"shr.b32 t, t, {4 - subs.bit_length() + 1}", "shl.b32 t, t, 2", "add.u32 to, to, t",
              f"add.u32 to, to, {base}"]  # fmt: skip
    if norm:
        lines += _floats(kind, given[2 + 4 * rounds :], [f"g{i}" for i in range(8)])
    for r in range(rounds):
        lines += _floats(kind, given[2 + 4 * r : 6 + 4 * r], f)
        if norm:
            total = f"${8 + 2 * subs + r}"
            lines += [f"mul.f32 {total}, f0, f0"] + [f"fma.rn.f32 {total}, {x}, {x}, {total}" for x in f[1:]]
            lines += [f"mul.f32 {x}, {x}, g{i}" for i, x in enumerate(f)]
        lines.append("abs.f32 m, f0")
        lines += [line for x in f[1:] for line in (f"abs.f32 t, {x}", "max.NaN.f32 m, m, t")]
        for far in (1, 2, 4, 8)[: 5 - subs.bit_length()]:
            lines += [f"shfl.sync.bfly.b32 t, m, {far}, 31, 0xFFFFFFFF", "max.NaN.f32 m, m, t"]
        # 2 ** (13 - exponent), its inverse (NaN where there was one, or an infinity), and integers in the lower bits.
        lines += ["and.b32 e, m, 0x7F800000", f"max.s32 e, e, {20 << 23}", f"sub.u32 inv, {267 << 23}, e",
                  f"sub.u32 e, e, {13 << 23}", "fma.rn.f32 e, m, nought, e",
                  f"st.shared.b32 [to + {PASS + 8 * subs * r}], e", "mov.b32 t, 0x4B400080"]  # fmt: skip
        lines += [f"fma.rn.f32 {v[i]}, {f[i]}, inv, t" for i in range(8)]
        for half in range(2):
            a, b, c, d = v[4 * half : 4 * half + 4]
            lines += [f"prmt.b32 q0, {a}, {b}, 0x5140", f"prmt.b32 q1, {c}, {d}, 0x5140",
                      f"prmt.b32 w{4 * r + half}, q0, q1, 0x7632", "prmt.b32 t, q0, q1, 0x5410",
                      f"xor.b32 w{4 * r + 2 + half}, t, 0x80808080"]  # fmt: skip
        # A lane's 8 inputs are half of what stands in a word of 4 lanes; it makes the words of two of them, with its
        # neighbour, which has the other half.
        for w in (4 * r, 4 * r + 2):
            lines += [f"prmt.b32 t, w{w}, w{w + 1}, send", "shfl.sync.bfly.b32 t, t, 1, 31, 0xFFFFFFFF",
                      f"prmt.b32 q0, w{w}, w{w + 1}, keep", f"prmt.b32 w{w}, q0, t, even",
                      f"prmt.b32 w{w + 1}, q0, t, odd"]  # fmt: skip
    lines += [f"shl.b32 t, {lane}, 4", f"add.u32 t, t, {base}"]
    for u in range(2):
        for r in range(rounds):
            for byte in range(2):
                w, to = 4 * r + 2 * byte, 256 * r + 64 * byte
                lines += [f"@p{u} st.shared.b32 [at + {to}], w{w}", f"@p{u} st.shared.b32 [at + {to + 16}], w{w + 1}"]
        fetch = f"ld.shared.v4.b32 {{${4 * u}, ${4 * u + 1}, ${4 * u + 2}, ${4 * u + 3}}}, [t]"
        lines += ["bar.warp.sync 0xFFFFFFFF", fetch, "bar.warp.sync 0xFFFFFFFF"]
        if u == 0:
            lines += [f"and.b32 to, {lane}, 3", f"shl.b32 to, to, {subs.bit_length() + 1}", f"add.u32 to, to, {base}"]
            lines += [f"ld.shared.b32 ${8 + 2 * s}, [to + {PASS + 4 * s}]" for s in range(subs)]
    for s in range(subs):
        before = "{nought, nought, nought, nought}"
        for k in range(4 // subs * s, 4 // subs * (s + 1)):
            lines.append(f"{MMA} {{a0, a1, a2, a3}}, {{one, one, one, one}}, {{${2 * k}, ${2 * k + 1}}}, {before}")
            before = "{a0, a1, a2, a3}"
        lines += ["shl.b32 a0, a0, 8", "add.u32 a0, a0, a1", f"sub.u32 ${9 + 2 * s}, nought, a0"]
    text = "{ " + ";\n".join(lines) + ";\n}"
    kinds = ["=&r"] * 8 + ["=&f", "=&r"] * subs + ["=&f"] * (rounds * norm)
    return text, ",".join(kinds + ["r"] * (2 + 4 * rounds + 4 * norm))


def products(blocks, subs):
    """Sums over each group: 4 for each of `blocks` of 4 tokens and each group, of 8 words and 8 registers a block."""
    results = 4 * blocks * subs
    words = [f"${results + i}" for i in range(8)]
    lines = [".reg .b32 a<4>, nought", "mov.b32 nought, 0"]
    for k in range(4):
        for i in range(2):
            word = words[2 * k + i]
            lines += [f"and.b32 a{2 * i}, {word}, 0x0F0F0F0F", f"and.b32 a{2 * i + 1}, {word}, 0xF0F0F0F0"]
        for b in range(blocks):
            at, first = 4 * (b * subs + k * subs // 4), k % (4 // subs) == 0
            to = f"{{${at}, ${at + 1}, ${at + 2}, ${at + 3}}}"
            x = results + 8 + 8 * b + 2 * k
            so_far = "{nought, nought, nought, nought}" if first else to
            lines.append(f"{MMA} {to}, {{a0, a1, a2, a3}}, {{${x}, ${x + 1}}}, {so_far}")
    return "{ " + ";\n".join(lines) + ";\n}", ",".join(["=&r"] * results + ["r"] * (8 + 8 * blocks))


def add_up(warps, values, each, pairs, squares):
    """Adds all warps' sums up, as many at a time as there is room for.

    Results: `each` sums of values thread // 32 + warps * j of a lane, or with `pairs` of these and of those values / 2
    further on; with `squares`, that of the thread's token.  Inputs: shared address, thread, `values` sums, `squares`
    sums of squares, of token 4 * (i // rounds) + 2 * (i % rounds) + lane // 16 with `rounds` of (rounds, blocks).
    """
    rounds, blocks = squares
    count, half = each * (1 + pairs), values // (1 + pairs)
    results = count + (blocks > 0)
    base, thread, *given = (f"${results + i}" for i in range(2 + values + rounds * blocks))
    step, more = 128 * warps * warps, 16 * warps * blocks  # bytes of a result's sums; squares stand before
    lines = [".reg .b32 mine, put, get, t", ".reg .f32 v<4>", "cp.async.wait_all", "bar.sync 0",
             f"shr.b32 mine, {thread}, 5", f"and.b32 t, {thread}, 31", "shl.b32 t, t, 2", f"add.u32 t, t, {base}",
             "shl.b32 put, mine, 7", "add.u32 put, put, t",  # a value's warps are 128 bytes apart
             f"shl.b32 get, mine, {(128 * warps).bit_length() - 1}", "add.u32 get, get, t"]  # fmt: skip
    for i in range(rounds * blocks):
        lines += [f"mov.b32 v0, {given[values + i]}"]
        lines += [x for far in (1, 2, 4, 8) for x in (f"shfl.sync.bfly.b32 v1, v0, {far}, 31, 0xFFFFFFFF",
                                                      "add.f32 v0, v0, v1")]  # fmt: skip
        lines += [f"shr.b32 t, {thread}, 4", "and.b32 t, t, 1", f"shl.b32 t, t, {(4 * warps).bit_length() - 1}",
                  f"add.u32 t, t, {base}", "add.u32 t, t, mine", "add.u32 t, t, mine", "add.u32 t, t, mine",
                  "add.u32 t, t, mine",
                  f"st.shared.b32 [t + {4 * warps * (4 * (i // rounds) + 2 * (i % rounds))}], v0"]  # fmt: skip
    at_once = max(1, (SHARED - more) // step)
    for begin in range(0, count, at_once):
        now = range(begin, min(count, begin + at_once))
        lines += ["bar.sync 0"] * (begin > 0)  # what stands there has been read
        for j in now:
            for i in range(min(warps, half - warps * (j % each))):
                v = half * (j // each) + warps * (j % each) + i
                lines.append(f"st.shared.b32 [put + {more + step * (j - begin) + 128 * warps * i}], {given[v]}")
        lines.append("bar.sync 0")
        for j in now:
            at = more + step * (j - begin)
            lines.append(f"ld.shared.b32 ${j}, [get + {at}]")
            for w in range(1, warps):
                lines += [f"ld.shared.b32 v{w % 4}, [get + {at + 128 * w}]", f"add.f32 ${j}, ${j}, v{w % 4}"]
    if blocks:
        out = f"${results - 1}"
        lines += [f"and.b32 t, {thread}, 3", f"and.b32 mine, mine, {blocks - 1}", "shl.b32 mine, mine, 2",
                  "add.u32 t, t, mine", f"shl.b32 t, t, {(4 * warps).bit_length() - 1}", f"add.u32 t, t, {base}",
                  f"mov.b32 {out}, 0"]  # fmt: skip
        lines += [x for w in range(warps) for x in (f"ld.shared.b32 v{w % 4}, [t + {4 * w}]",
                                                    f"add.f32 {out}, {out}, v{w % 4}")]  # fmt: skip
    kinds = ["=&f"] * results + ["r", "r"] + ["f"] * (values + rounds * blocks)
    return "{ " + ";\n".join(lines) + ";\n}", ",".join(kinds)


# ---- Kernels.


@jit
def _tile(i: tl.constexpr, block, TILES: tl.constexpr, COUNT: tl.constexpr, GATED: tl.constexpr):
    """How far the i-th tile of a block is from its first; COUNT tiles are there, if GATED of each of two matrices.

    Then the second half of i is the second matrix's.
    """
    EACH: tl.constexpr = TILES // 2 if GATED else TILES
    if COUNT % EACH == 0:
        return i % EACH + i // EACH * COUNT
    return tl.minimum(i % EACH, COUNT - 1 - block * EACH) + i // EACH * COUNT


@jit
def _bring(ring, units, parameters, wide, tile, chunk, lane, UNITS: tl.constexpr, WIDTH: tl.constexpr,
           GROUPS: tl.constexpr, SUBS: tl.constexpr, BRING: tl.constexpr):  # fmt: skip
    """Asks for a tile's chunk, to the ring's place; where there is none, for zeros.

    units, parameters: what the lane brings of a block's first tile and chunk 0; wide: bytes of each such parameter.
    """
    unit, group = chunk * 2, chunk * SUBS + lane // 4
    here = unit < UNITS
    chunk = tl.where(here, chunk, 0)
    units += chunk * 1024 + tl.cast(tile, tl.int64) * (UNITS * 512)
    parameters += chunk * (SUBS * WIDTH) * wide + tile * 16 * wide
    second, known = here if UNITS % 2 == 0 else unit + 1 < UNITS, here if GROUPS % SUBS == 0 else group < GROUPS
    tl.inline_asm_elementwise(
        BRING[0], BRING[1],
        [ring + lane * 16, units, tl.where(here, 16, 0), tl.where(second, 16, 0),
         ring + 1024 + lane * 16 - lane // 4 * 16, parameters, tl.where(known, 16, 0),
         ((lane < 4 * SUBS) & (lane % 4 < 3)).to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


@jit
def _tokens(x, norm, chunk, token, last, lane, D: tl.constexpr, NORM: tl.constexpr, ROUNDS: tl.constexpr,
            BLOCKS: tl.constexpr, LOADX: tl.constexpr):  # fmt: skip
    """A lane's 8 inputs of a chunk, of one token a round, in 4 registers; then the norm's."""
    out, at = (), chunk * 128 + lane % 16 * 8
    here = at < D
    at = tl.where(here, at, 0)
    for i in tl.static_range(BLOCKS * ROUNDS):
        t = token + (i // ROUNDS * 4 + i % ROUNDS * 2)
        of, wanted = (x + t * D + at).to(tl.int64), (here & (t < last)).to(tl.int32)
        got = tl.inline_asm_elementwise(LOADX[0], LOADX[1], [of, wanted], dtype=(tl.int32,) * 4, is_pure=False, pack=1)
        out = out + (got[0], got[1], got[2], got[3])  # noqa: RUF005
    if NORM:
        of, wanted = (norm + at).to(tl.int64), here.to(tl.int32)
        got = tl.inline_asm_elementwise(LOADX[0], LOADX[1], [of, wanted], dtype=(tl.int32,) * 4, is_pure=False, pack=1)
        out = out + (got[0], got[1], got[2], got[3])  # noqa: RUF005
    return out


@jit
def _scale(bits, BF16: tl.constexpr):
    if BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _added(acc, found, f: tl.constexpr, to: tl.constexpr, BLOCKS: tl.constexpr, s0, s1, z0, z1, power, total):
    """The sums, with a group's added: of two rows, BLOCKS apart, of which the second's nibbles were 16 times too large.

    total: of the integers of the tokens, negative.
    """
    v0 = found[f] * 256 + (found[f + 1] + z0 * total)
    v1 = found[f + 2] * 256 + (found[f + 3] + z1 * (total * 16))
    a0, a1 = acc[to] + v0.to(tl.float32) * (s0 * power), acc[to + BLOCKS] + v1.to(tl.float32) * (s1 * (power * 0.0625))
    return acc[:to] + (a0,) + acc[to + 1 : to + BLOCKS] + (a1,) + acc[to + BLOCKS + 1 :]  # noqa: RUF005


@jit
def _place(j: tl.constexpr, thread, block, first, last, F: tl.constexpr, VALUES: tl.constexpr, BLOCKS: tl.constexpr,
           WARPS: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Where the row is that a thread's j-th sum (of `add_up`) goes to, where in it, and whether it is such a sum."""
    HALF: tl.constexpr = VALUES // 2 if GATED else VALUES
    value, lane = thread // 32 + j * WARPS, thread % 32
    token = first + value % BLOCKS * 4 + lane % 4
    tile = block * (HALF // (2 * BLOCKS)) + value // (2 * BLOCKS)
    column = tile * 16 + value // BLOCKS % 2 * 8 + lane // 4
    return token * F, column, (value < HALF) & (token < last) & (tile < F // 16)


@jit
def _few(x_ptr, tiles_ptr, scale_ptr, zero_ptr, norm_ptr, residual_ptr, sizes_ptr, T, out_ptr,
         D: tl.constexpr, F: tl.constexpr, eps: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
         GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, WARPS: tl.constexpr,
         TILES: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr, BLOCKS: tl.constexpr, ROUNDS: tl.constexpr,
         SCALE_BF16: tl.constexpr, DECLARE: tl.constexpr, NOTHING: tl.constexpr, TOGETHER: tl.constexpr,
         BRING: tl.constexpr, TAKE: tl.constexpr, LOADX: tl.constexpr, PREPARE: tl.constexpr, PRODUCTS: tl.constexpr,
         ADD: tl.constexpr):  # fmt: skip
    """TILES tiles (GATED: half of them of the second matrix) and BLOCKS times 4 tokens; warps share the chunks out.

    Grid: tiles / TILES, blocks of tokens.  With EXPERTS, each has F outputs, and the tokens that sizes_ptr says.
    """
    UNITS: tl.constexpr = D // 64
    SUBS: tl.constexpr = 128 // GROUP
    SLOT: tl.constexpr = 1024 + 48 * SUBS
    COUNT: tl.constexpr = F // 16  # of tiles, in a half where GATED
    WIDTH: tl.constexpr = EXPERTS * F * (2 if GATED else 1)
    VALUES: tl.constexpr = 2 * BLOCKS * TILES
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    row = lane // 4
    block, first, last, expert = tl.program_id(0), tl.program_id(1) * (4 * BLOCKS), T, 0
    if EXPERTS > 1:
        expert, first, last = expert_tile(sizes_ptr, tl.program_id(1), 4 * BLOCKS, EXPERTS, PADDED, 0, EXPERTS)
        if expert >= EXPERTS:
            return
    shared = tl.inline_asm_elementwise(DECLARE, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    ring = shared + warp * (STAGES * SLOT)
    staging = shared + (WARPS * STAGES * SLOT) + warp * 576
    x, norm = x_ptr, norm_ptr
    tile, piece = block * (TILES // 2 if GATED else TILES) + expert * COUNT, lane % 4  # of scales two, and one of zeros
    units, wide = (
        tiles_ptr.to(tl.int64) + tl.cast(tile, tl.int64) * (UNITS * 512) + lane * 16,
        tl.where(piece == 2, 1, 2),
    )
    parameters = tl.where(piece == 2, zero_ptr.to(tl.int64), scale_ptr.to(tl.int64) + piece * 16)
    parameters += (tl.where(lane < 4 * SUBS, lane // 4, 0) * WIDTH + tile * 16) * wide
    token, chunk = first + lane // 16, warp
    for i in tl.static_range(STAGES):
        if i // TILES < TURNS:
            tile = _tile(i % TILES, block, TILES, COUNT, GATED)
            _bring(ring + i * SLOT, units, parameters, wide, tile, chunk + i // TILES * WARPS, lane, UNITS, WIDTH,
                   D // GROUP, SUBS, BRING)  # fmt: skip
        else:
            tl.inline_asm_elementwise(NOTHING, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
    # ptxas would wait for the tokens first.
    tl.inline_asm_elementwise(TOGETHER, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
    given = _tokens(x, norm, chunk, token, last, lane, D, NORM, ROUNDS, BLOCKS, LOADX)
    HALF: tl.constexpr = VALUES // 2 if GATED else VALUES
    EACH: tl.constexpr = (HALF + WARPS - 1) // WARPS
    kept = ()
    for j in tl.static_range(EACH if RESIDUAL else 0):
        at, column, here = _place(j, thread, block, first, last, F, VALUES, BLOCKS, WARPS, GATED)
        at = at + column if RESIDUAL == 2 else column
        kept = kept + (tl.load(residual_ptr + at, mask=here, other=0.0),)  # noqa: RUF005
    acc = (tl.zeros([32 * WARPS], tl.float32),) * VALUES
    squares = (tl.zeros([32 * WARPS], tl.float32),) * (ROUNDS * BLOCKS if NORM else 0)
    slot = tl.zeros([32 * WARPS], tl.int32)
    for _ in tl.range(0, TURNS, 1, num_stages=1):
        now = given
        columns, powers, sums, more = (), (), (), ()
        for b in tl.static_range(BLOCKS):
            operands = (staging, lane) + now[4 * ROUNDS * b : 4 * ROUNDS * (b + 1)]  # noqa: RUF005
            if NORM:
                operands = operands + now[4 * ROUNDS * BLOCKS :]
            got = tl.inline_asm_elementwise(
                PREPARE[0], PREPARE[1], operands, is_pure=False, pack=1,
                dtype=(tl.int32,) * 8 + (tl.float32, tl.int32) * SUBS + (tl.float32,) * (ROUNDS * NORM))  # fmt: skip
            for i in tl.static_range(8):
                columns = columns + (got[i],)  # noqa: RUF005
            for s in tl.static_range(SUBS):
                powers, sums = powers + (got[8 + 2 * s],), sums + (got[9 + 2 * s],)  # noqa: RUF005
            if NORM:
                for r in tl.static_range(ROUNDS):
                    more = more + (squares[b * ROUNDS + r] + got[8 + 2 * SUBS + r],)  # noqa: RUF005
        squares = more
        if TURNS > 1:
            given = _tokens(x, norm, chunk + WARPS, token, last, lane, D, NORM, ROUNDS, BLOCKS, LOADX)
        for i in tl.static_range(TILES):
            of = ring + slot
            got = tl.inline_asm_elementwise(TAKE[0], TAKE[1], [of + lane * 16, of + 1024 + row * 2, of + 1056 + row],
                                            dtype=(tl.int32,) * (8 + 4 * SUBS), is_pure=False, pack=1)  # fmt: skip
            if (i + STAGES) // TILES < TURNS:
                tile = _tile((i + STAGES) % TILES, block, TILES, COUNT, GATED)
                _bring(ring + slot, units, parameters, wide, tile, chunk + (i + STAGES) // TILES * WARPS, lane, UNITS,
                       WIDTH, D // GROUP, SUBS, BRING)  # fmt: skip
            else:
                tl.inline_asm_elementwise(NOTHING, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
            slot = tl.where(slot == (STAGES - 1) * SLOT, 0, slot + SLOT)
            found = tl.inline_asm_elementwise(PRODUCTS[0], PRODUCTS[1], got[:8] + columns,
                                              dtype=(tl.int32,) * (4 * BLOCKS * SUBS), is_pure=True,
                                              pack=1)  # fmt: skip
            for s in tl.static_range(SUBS):
                s0, s1 = _scale(got[8 + 4 * s], SCALE_BF16), _scale(got[9 + 4 * s], SCALE_BF16)
                for b in tl.static_range(BLOCKS):
                    acc = _added(acc, found, 4 * (b * SUBS + s), 2 * BLOCKS * i + b, BLOCKS, s0, s1, got[10 + 4 * s],
                                 got[11 + 4 * s], powers[b * SUBS + s], sums[b * SUBS + s])  # fmt: skip
        chunk += WARPS
    operands = (shared, thread) + acc + squares  # noqa: RUF005
    total = tl.inline_asm_elementwise(ADD[0], ADD[1], operands, is_pure=False, pack=1,
                                      dtype=(tl.float32,) * (EACH * (2 if GATED else 1) + NORM))  # fmt: skip
    by = 1.0
    if NORM:
        by = tl.rsqrt(total[EACH * (2 if GATED else 1)] / D + eps)
    for j in tl.static_range(EACH):
        at, column, here = _place(j, thread, block, first, last, F, VALUES, BLOCKS, WARPS, GATED)
        y = tl.where(here, total[j], 0.0) * by
        if GATED:
            y = y / (1.0 + tl.exp(-y)) * (tl.where(here, total[EACH + j], 0.0) * by)
        if RESIDUAL:
            y += kept[j].to(tl.float32)
        tl.store(out_ptr + at + column, y.to(out_ptr.dtype.element_ty), mask=here)


def shares(T, D, tiles, programs):
    """How the work is cut: warps of a program, its tiles (of all matrices), stages; `programs` cores, `tiles` in all.

    By what an H200 has taken.  A core has 32 to 64 KB on the way, where 4.3 TB/s at 800 ns need 26.
    """
    chunks, whole = cdiv(D, CHUNK), cdiv(tiles, programs)
    if chunks < 16:
        warps = power_of_two(chunks + 1) // 2
        return warps, cdiv(tiles, programs * 16 // warps), 4
    if whole > (4 if T <= 4 else 8):  # registers for all sums of a larger program would leave room for one a core
        return 8, min(4, cdiv(tiles, 2 * programs)), 4
    return 16, whole, 2


@functools.partial(jax.jit, static_argnames=("group", "eps", "gated", "dtype", "warps", "tiles_each", "stages"))
def int4_few(x, tiles, scale, zero, sizes=None, *, group, norm=None, eps=0.0, residual=None, gated=False, dtype=None,
              warps=None, tiles_each=None, stages=None):  # fmt: skip
    """x [T, D] times the matrix of `tiles` (of `int4_tiles`, two-dimensional out), to [T, F]; best for few tokens.

    norm [D] (with eps), residual [T, F] (or [F], for all tokens), gated (the matrix is [D, 2 * F]) as `skinny_matmul`
    has them.
    sizes int32[E]: tokens of expert 0 stand before those of expert 1, ...: how many each has; then the matrix is E of
    them, side by side, and the result [T, F / E].  warps: of a program; tiles_each: of a program; stages: chunks that a
    warp has asked for; by `shares` unless said.
    """
    experts = 1 if sizes is None else sizes.shape[0]
    (T, D), F = x.shape, scale.shape[1] // experts // (1 + gated)
    kind = {"bfloat16": "bf16", "float16": "f16"}[x.dtype.name]
    count, subs = F // ROWS, CHUNK // group
    # Some experts have more tokens than others, and who has no room for them is read again.
    at_once = min(MOST, 4 * power_of_two(cdiv(cdiv(T, experts), 4) if experts == 1 else cdiv(T, 2 * experts)))
    blocks, rounds = at_once // 4, 2 if T > 2 else 1
    token_blocks = cdiv(T, at_once) if sizes is None else min(T, cdiv(T, at_once) + experts)
    chosen = shares(T, D, count * (1 + gated) * token_blocks, cores())
    warps, stages = max(blocks, warps or chosen[0]), stages or chosen[2]
    turns = cdiv(cdiv(D, CHUNK), warps)
    of = min(tiles_each or chosen[1], count * (1 + gated))
    each, parts = cdiv(of, 1 + gated) * (1 + gated), 1
    most = 32 if turns == 1 or blocks == 1 else 24  # sums of a lane that registers are there for
    while each > 1 + gated and 2 * blocks * each > most:
        parts += 1
        each = cdiv(cdiv(of, parts), 1 + gated) * (1 + gated)
    values, pairs = 2 * blocks * each, int(gated)
    half = values // (1 + pairs)
    sums = cdiv(half, warps)
    normed = norm is not None
    ring = warps * (stages * (WORDS + 48 * subs) + STAGING)
    more, step = 16 * warps * blocks * normed, 128 * warps * warps  # of `add_up`
    size = max(ring, more + step * min(sums * (1 + pairs), (SHARED - more) // step))
    if size > SHARED:
        raise ValueError(f"{size} bytes of shared memory, {SHARED} are there: {warps} warps, {stages} stages")
    grid = cdiv(count, each // (1 + pairs)), token_blocks
    (out,) = triton_call(
        _few, x, tiles, scale, zero, x if norm is None else norm, x if residual is None else residual,
        x if sizes is None else sizes, T, out=[jax.ShapeDtypeStruct((T, F), dtype or x.dtype)], grid=grid,
        warps=warps, stages=1, D=D, F=F, eps=float(eps), EXPERTS=experts, PADDED=power_of_two(experts), GROUP=group,
        GATED=pairs, NORM=int(normed), RESIDUAL=0 if residual is None else residual.ndim, WARPS=warps, TILES=each,
        STAGES=stages, TURNS=turns, BLOCKS=blocks, ROUNDS=rounds, SCALE_BF16=int(scale.dtype == jnp.bfloat16),
        DECLARE=f"{{ .shared .align 16 .b8 buffer[{size}];\nmov.b32 $0, buffer;\n}}", NOTHING=NOTHING,
        TOGETHER=TOGETHER, BRING=bring(), TAKE=take(subs, stages),
        LOADX=(LOAD_X, LOAD_X_KINDS), PREPARE=prepare(kind, rounds, subs, int(normed)), PRODUCTS=products(blocks, subs),
        ADD=add_up(warps, values, sums, pairs, (rounds, blocks) if normed else (0, 0)),
    )  # fmt: skip
    return out
