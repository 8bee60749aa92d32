"""int4 matmuls on tensor cores with nothing between memory and registers, and the kernel that writes values out.

The weights are the first operand of mma.m16n8k16 and the tokens the second, so that few tokens waste nothing; nibbles
lie in memory so that what a lane loads is what it multiplies.  Triton has no name for that, so the instructions are
written out; all that it must keep is that element i of a tensor with as many elements as threads is thread i's.
D inputs, F outputs, T tokens; a tile has 16 outputs, a unit 64 inputs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import expert_tile
from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call

ROWS, UNIT = 16, 64
WORDS = ROWS * UNIT // 8  # of a tile and a unit


def int4_tiles(q):
    """Nibbles q uint8[D, *out] of 0 to 15 as int32[*out[:-1], out[-1] / 16, D / 64, 128], as the kernels read them.

    A lane's four words are 128 bits side by side: two rows, 8 apart, times 8 consecutive inputs of each half unit.
    Nibbles r and r + 4 of a word are the two values of the r-th register that mma wants.
    """
    lead, D = q.shape[1:-1], q.shape[0]
    q = jnp.moveaxis(q, 0, -1).reshape(*lead, -1, 2, 8, D // UNIT, 2, 4, 2, 2, 2).astype(jnp.uint32)
    # tile, row half, row, unit, half unit, lane, word, input pair, of a pair -> tile, unit, row, lane, half unit, word
    n = len(lead)
    q = q.transpose(*range(n), *(n + i for i in (0, 3, 2, 5, 4, 6, 7, 1, 8)))
    words = (q << jnp.broadcast_to(_places(q.ndim), q.shape)).sum((-3, -2, -1), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(*lead, -1, D // UNIT, WORDS)


def _places(rank):
    """Where in a word the nibble of an input pair, row half and place in the pair is, as the last of `rank` axes."""
    places = [4 * half + 8 * pair + 16 * which for pair in range(2) for half in range(2) for which in range(2)]
    return jnp.asarray(places, jnp.uint32).reshape((1,) * (rank - 3) + (2, 2, 2))


def int4_untile(tiles):
    """The nibbles uint8[D, F] of int32[F / 16, D / 64, 128]."""
    tile, units, _ = tiles.shape
    words = jax.lax.bitcast_convert_type(tiles, jnp.uint32).reshape(tile, units, 8, 4, 2, 2, 1, 1, 1)
    shape = (*words.shape[:6], 2, 2, 2)
    q = (jnp.broadcast_to(words, shape) >> jnp.broadcast_to(_places(9), shape)) & jnp.uint32(15)
    q = q.transpose(0, 7, 2, 1, 4, 3, 5, 6, 8).reshape(tile * ROWS, units * UNIT)
    return q.T.astype(jnp.uint8)


# ---- Instructions, as functions of the type of the activations.

BITS = {"bfloat16": ("0x43004300", "0x3F803F80", "bf16"), "float16": ("0x64006400", "0x3C003C00", "f16")}


def _values(dtype, word, zeros, out):
    """PTX that makes four registers of two values each, q - zero, of a word: exact, for 128 + q and 1024 + q are."""
    magic, one, kind = BITS[dtype]
    lines = [f"mov.b32 one, {one};"]
    for r in range(4):
        lines.append(f"shr.b32 t, {word}, {4 * r};" if r else f"mov.b32 t, {word};")
        lines.append(f"lop3.b32 t, t, 0x000F000F, {magic}, 0xEA;")
        lines.append(f"fma.rn.{kind}x2 {out[r]}, t, one, {zeros[r % 2]};")
    return "\n".join(lines)


def load_words(units):
    """Loads 128 bits of each of some consecutive units: 4 * units results, then the address, and whether to."""
    n = 4 * units
    loads = (f"@p ld.global.nc.L1::no_allocate.v4.b32 {{${4 * u}, ${4 * u + 1}, ${4 * u + 2}, ${4 * u + 3}}}, "
             f"[${n} + {512 * u}];" for u in range(units))  # fmt: skip
    text = f"{{ .reg .pred p;\nsetp.ne.b32 p, ${n + 1}, 0;\n" + "\n".join(loads) + "\n}"
    return text, ",".join(["=r"] * n + ["l", "r"])


LOAD_X = """{ .reg .pred p;
setp.ne.b32 p, $9, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;
@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$8];
@p ld.global.nc.v4.b32 {$4, $5, $6, $7}, [$8 + 64];
}"""
LOAD_X_KINDS = ",".join(["=&r"] * 8 + ["l", "r"])


def multiply(dtype):
    """Half a unit: results $0-3, words $4-5, zeros $6-7, tokens $8-11, sums so far $12-15 (where $0-3 are)."""
    kind = BITS[dtype][2]
    text = "{ .reg .b32 t, one, a0, a1, a2, a3;\n"
    for step in range(2):
        text += _values(dtype, f"${4 + step}", ("$6", "$7"), ("a0", "a1", "a2", "a3"))
        text += (
            f"\nmma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{a0, a1, a2, a3}}, "
            f"{{${8 + 2 * step}, ${9 + 2 * step}}}, {{$0, $1, $2, $3}};\n"
        )
    return text + "}"


MULTIPLY_KINDS = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3"


def write_values(dtype):
    """Half a unit: words $1-2, zeros $3-4, scales (float32) $5-6, addresses of two rows' 8 inputs $7-8, whether $9."""
    kind = BITS[dtype][2]
    text = "{ .reg .pred p; .reg .b32 t, one, l, h, a<8>; .reg .b16 u, v; .reg .f32 x, y;\nsetp.ne.b32 p, $9, 0;\n"
    for step in range(2):
        text += _values(dtype, f"${1 + step}", ("$3", "$4"), [f"a{4 * step + r}" for r in range(4)]) + "\n"
    for r in range(8):
        if kind == "bf16":
            text += f"shl.b32 l, a{r}, 16; and.b32 h, a{r}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;\n"
        else:
            text += f"mov.b32 {{u, v}}, a{r}; cvt.f32.f16 x, u; cvt.f32.f16 y, v;\n"
        text += f"mul.f32 x, x, ${5 + r % 2}; mul.f32 y, y, ${5 + r % 2}; cvt.rn.{kind}x2.f32 a{r}, y, x;\n"
    text += "@p st.global.v4.b32 [$7], {a0, a2, a4, a6};\n@p st.global.v4.b32 [$8], {a1, a3, a5, a7};\n"
    return text + "mov.b32 $0, 0; }"


WRITE_KINDS = "=r,r,r,r,r,f,f,l,l,r"


# ---- Kernels.


@jit
def _zeros(zero_ptr, at, MINUS: tl.constexpr):
    """Twice -(128 + zero), or -(1024 + zero), in a register."""
    bits = tl.load(zero_ptr + at).to(tl.int32) | MINUS
    return bits | (bits << 16)


@jit
def _thread(WARPS: tl.constexpr):
    """Of each thread: its warp, its lane in that, and row and column of the lane."""
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    return thread // 32, lane, lane // 4, lane % 4


@jit
def _words(base, unit, UNITS: tl.constexpr, AHEAD: tl.constexpr, LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr):
    """A lane's words of AHEAD units from `unit` on, where there are any."""
    at, wanted = (base + unit * 128).to(tl.int64), (unit < UNITS).to(tl.int32)
    return tl.inline_asm_elementwise(LOAD, LOAD_KINDS, [at, wanted], dtype=(tl.int32,) * (4 * AHEAD), is_pure=True,
                                     pack=1)  # fmt: skip


@jit
def _tokens(x_ptr, token, last, k, column, here, D: tl.constexpr, LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr):
    """A column's 8 inputs of each half of a unit, which begins with input k, of a token, in 8 registers."""
    of, wanted = (x_ptr + token * D + k + column * 8).to(tl.int64), (here & (token < last)).to(tl.int32)
    return tl.inline_asm_elementwise(LOADX, LOADX_KINDS, [of, wanted], dtype=(tl.int32,) * 8, is_pure=True, pack=1)


@jit
def _added(acc, m: tl.constexpr, words, u: tl.constexpr, half: tl.constexpr, HALVES: tl.constexpr, z0, z1, s0, s1, x,
           WARPS: tl.constexpr, MMA: tl.constexpr, MMA_KINDS: tl.constexpr):  # fmt: skip
    """Sums of all tokens, with those of block m grown by a unit's half, or by all of unit u where HALVES is 1."""
    part = (tl.zeros([32 * WARPS], tl.float32),) * 4
    for i in tl.static_range(half, half + 3 - HALVES):
        part = tl.inline_asm_elementwise(
            MMA, MMA_KINDS,
            [words[4 * u + 2 * i], words[4 * u + 2 * i + 1], z0, z1, x[4 * i], x[4 * i + 1], x[4 * i + 2],
             x[4 * i + 3], part[0], part[1], part[2], part[3]],
            dtype=(tl.float32,) * 4, is_pure=False, pack=1)  # fmt: skip
    sums = (acc[4 * m] + part[0] * s0, acc[4 * m + 1] + part[1] * s0, acc[4 * m + 2] + part[2] * s1,
            acc[4 * m + 3] + part[3] * s1)  # fmt: skip
    return acc[: 4 * m] + sums + acc[4 * m + 4 :]


@jit
def _skinny(x_ptr, tiles_ptr, scale_ptr, zero_ptr, sizes_ptr, T, out_ptr, D: tl.constexpr, F: tl.constexpr,
            EXPERTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
            TOKENS: tl.constexpr, MINUS: tl.constexpr, LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr,
            LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr, MMA: tl.constexpr, MMA_KINDS: tl.constexpr):  # fmt: skip
    """TOKENS times 8 tokens and a tile of 16 outputs, whose units the warps share out, AHEAD at a time.

    Grid: F / 16, blocks of tokens.  With EXPERTS, each has F outputs, and the tokens that sizes_ptr says.
    """
    UNITS: tl.constexpr = D // 64
    HALVES: tl.constexpr = 2 if GROUP == 32 else 1
    warp, lane, row, column = _thread(WARPS)
    tile, first, last = tl.program_id(0), tl.program_id(1) * TOKENS * 8, T
    if EXPERTS > 1:
        expert, first, last = expert_tile(sizes_ptr, tl.program_id(1), TOKENS * 8, EXPERTS, PADDED, 0, EXPERTS)
        if expert >= EXPERTS:
            return
        tile += expert * (F // 16)
    n = tile * 16 + row
    acc = (tl.zeros([32 * WARPS], tl.float32),) * (4 * TOKENS)
    base = tiles_ptr + tile.to(tl.int64) * (UNITS * 128) + lane * 4
    unit = warp * AHEAD
    words = _words(base, unit, UNITS, AHEAD, LOAD, LOAD_KINDS)
    for _ in tl.range(0, UNITS, WARPS * AHEAD, num_stages=1):
        now = words
        here = unit < UNITS
        place = tl.where(here, unit, 0)
        unit += WARPS * AHEAD
        words = _words(base, unit, UNITS, AHEAD, LOAD, LOAD_KINDS)
        for u in tl.static_range(AHEAD):
            k = (place + u) * 64
            for half in tl.static_range(HALVES):
                at = ((k + 32 * half) // GROUP) * (EXPERTS * F) + n
                z0, z1 = _zeros(zero_ptr, at, MINUS), _zeros(zero_ptr, at + 8, MINUS)
                s0, s1 = tl.load(scale_ptr + at).to(tl.float32), tl.load(scale_ptr + at + 8).to(tl.float32)
                for m in tl.static_range(TOKENS):
                    x = _tokens(x_ptr, first + 8 * m + row, last, k, column, here, D, LOADX, LOADX_KINDS)
                    acc = _added(acc, m, now, u, half, HALVES, z0, z1, s0, s1, x, WARPS, MMA, MMA_KINDS)
    lane = tl.arange(0, 32)
    n, token = tl.program_id(0) * 16 + lane // 4, first + 2 * (lane % 4)
    for m in tl.static_range(TOKENS):
        for i in tl.static_range(4):
            total = tl.sum(tl.reshape(acc[4 * m + i], [WARPS, 32]), 0)
            t = token + 8 * m + i % 2
            tl.store(out_ptr + t * F + n + 8 * (i // 2), total.to(out_ptr.dtype.element_ty), mask=t < last)


@jit
def _parameters(zero_ptr, scale_ptr, place, n, WIDTH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Zeros and scales of two rows, for each of some consecutive groups from that of unit `place` on."""
    at = (place * 64 // GROUP) * WIDTH + n
    out = (tl.load(zero_ptr + at), tl.load(zero_ptr + at + 8), tl.load(scale_ptr + at), tl.load(scale_ptr + at + 8))
    for g in tl.static_range(1, GROUPS):
        to = at + g * WIDTH
        more = tl.load(zero_ptr + to), tl.load(zero_ptr + to + 8), tl.load(scale_ptr + to), tl.load(scale_ptr + to + 8)
        out = out + more
    return out


@jit
def _early(x_ptr, tiles_ptr, scale_ptr, zero_ptr, sizes_ptr, T, out_ptr, D: tl.constexpr, F: tl.constexpr,
           EXPERTS: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
           TOKENS: tl.constexpr, MINUS: tl.constexpr, LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr,
           LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr, MMA: tl.constexpr, MMA_KINDS: tl.constexpr,
           EARLY_X: tl.constexpr, TURNS: tl.constexpr):  # fmt: skip
    """`_skinny`, but that all loads of a turn are under way before it begins.

    ptxas puts each load right before its first use, behind barriers even, and waits for one after the other.  So there
    is a 0 that needs all of them, and is in all that is multiplied.
    """
    UNITS: tl.constexpr = D // 64
    HALVES: tl.constexpr = 2 if GROUP == 32 else 1
    GROUPS: tl.constexpr = (AHEAD * 64 + GROUP - 1) // GROUP
    warp, lane, row, column = _thread(WARPS)
    tile, first, last = tl.program_id(0), tl.program_id(1) * TOKENS * 8, T
    if EXPERTS > 1:
        expert, first, last = expert_tile(sizes_ptr, tl.program_id(1), TOKENS * 8, EXPERTS, PADDED, 0, EXPERTS)
        if expert >= EXPERTS:
            return
        tile += expert * (F // 16)
    n = tile * 16 + row
    acc = (tl.zeros([32 * WARPS], tl.float32),) * (4 * TOKENS)
    base = tiles_ptr + tile.to(tl.int64) * (UNITS * 128) + lane * 4
    unit = warp * AHEAD
    words = _words(base, unit, UNITS, AHEAD, LOAD, LOAD_KINDS)
    said = _parameters(zero_ptr, scale_ptr, tl.where(unit < UNITS, unit, 0), n, EXPERTS * F, GROUP, GROUPS)
    for _ in tl.range(0, TURNS, 1, num_stages=1):
        now, told = words, said
        here = unit < UNITS
        place = tl.where(here, unit, 0)
        early = ()
        if EARLY_X:
            for j in tl.static_range(AHEAD * TOKENS):
                k = (place + j // TOKENS) * 64
                x = _tokens(x_ptr, first + 8 * (j % TOKENS) + row, last, k, column, here, D, LOADX, LOADX_KINDS)
                early = early + (x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7])  # noqa: RUF005
        unit += WARPS * AHEAD
        if TURNS > 1:
            words = _words(base, unit, UNITS, AHEAD, LOAD, LOAD_KINDS)
            said = _parameters(zero_ptr, scale_ptr, tl.where(unit < UNITS, unit, 0), n, EXPERTS * F, GROUP, GROUPS)
        held = lane
        for g in tl.static_range(GROUPS):
            held ^= told[4 * g].to(tl.int32) ^ told[4 * g + 1].to(tl.int32)
            for i in tl.static_range(2, 4):
                held ^= told[4 * g + i].to(tl.int16, bitcast=True).to(tl.int32)
        if EARLY_X:
            for i in tl.static_range(8 * AHEAD * TOKENS):
                held ^= early[i]
        for i in tl.static_range(4 * AHEAD):
            held ^= now[i]
        held &= T >> 31  # 0, which the compiler does not know
        for u in tl.static_range(AHEAD):
            for half in tl.static_range(HALVES):
                z0 = told[4 * ((64 * u + 32 * half) // GROUP)].to(tl.int32) | MINUS
                z1 = told[4 * ((64 * u + 32 * half) // GROUP) + 1].to(tl.int32) | MINUS
                z0, z1 = z0 | (z0 << 16) | held, z1 | (z1 << 16) | held
                s0 = told[4 * ((64 * u + 32 * half) // GROUP) + 2].to(tl.float32)
                s1 = told[4 * ((64 * u + 32 * half) // GROUP) + 3].to(tl.float32)
                for m in tl.static_range(TOKENS):
                    if EARLY_X:
                        x = early[8 * (u * TOKENS + m) : 8 * (u * TOKENS + m) + 8]
                    else:
                        k = (place + u) * 64
                        x = _tokens(x_ptr, first + 8 * m + row, last, k, column, here, D, LOADX, LOADX_KINDS)
                    acc = _added(acc, m, now, u, half, HALVES, z0, z1, s0, s1, x, WARPS, MMA, MMA_KINDS)
    lane = tl.arange(0, 32)[:, None, None]
    below, right = tl.arange(0, 2)[None, None, :], tl.arange(0, 2)[None, :, None]
    n, token = tl.program_id(0) * 16 + lane // 4 + 8 * below, first + 2 * (lane % 4) + right
    for m in tl.static_range(TOKENS):
        sums = tl.join(tl.join(acc[4 * m], acc[4 * m + 1]), tl.join(acc[4 * m + 2], acc[4 * m + 3]))
        total = tl.sum(tl.reshape(sums, [WARPS, 32, 2, 2]), 0)
        t = token + 8 * m
        tl.store(out_ptr + t * F + n, total.to(out_ptr.dtype.element_ty), mask=t < last)


@jit
def _write(tiles_ptr, scale_ptr, zero_ptr, first, out_ptr, D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr,
           WARPS: tl.constexpr, MINUS: tl.constexpr, LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr, STORE: tl.constexpr,
           STORE_KINDS: tl.constexpr):  # fmt: skip
    """The values of a tile's units, one a warp; tiles from `first` on.  Grid: tiles, D / 64 / WARPS."""
    UNITS: tl.constexpr = D // 64
    warp, lane, row, column = _thread(WARPS)
    local, unit = tl.program_id(0).to(tl.int64), tl.program_id(1) * WARPS + warp
    tile = local + first
    wanted = unit < UNITS
    unit = tl.where(wanted, unit, 0)
    types: tl.constexpr = (tl.int32,) * 4
    words = tl.inline_asm_elementwise(LOAD, LOAD_KINDS,
                                      [(tiles_ptr + (tile * UNITS + unit) * 128 + lane * 4).to(tl.int64),
                                       wanted.to(tl.int32)], dtype=types,
                                      is_pure=True, pack=1)  # fmt: skip
    n = tile * 16 + row
    for half in tl.static_range(2):
        k = unit * 64 + 32 * half
        at = (k // GROUP) * F + n
        z0, z1 = _zeros(zero_ptr, at, MINUS), _zeros(zero_ptr, at + 8, MINUS)
        s0, s1 = tl.load(scale_ptr + at).to(tl.float32), tl.load(scale_ptr + at + 8).to(tl.float32)
        to = out_ptr + (local * 16 + row) * D + k + column * 8
        below = (to + 8 * D).to(tl.int64)
        to = to.to(tl.int64)
        tl.inline_asm_elementwise(STORE, STORE_KINDS,
                                  [words[2 * half], words[2 * half + 1], z0, z1, s0, s1, to, below,
                                   wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


MINUS = {"bfloat16": 0xC300, "float16": 0xE400}


def plain(units):
    """How a block shares out its units so far: warps, units that each loads at a time, `early`."""
    ahead = next(n for n in (4, 2, 1) if (units % n == 0 and units >= 4 * n) or n == 1)
    return min(8, power_of_two(cdiv(units, ahead))), ahead, 0


def planned(units):
    """The same that should be faster, by the order of the instructions: all loads of a turn are under way at once."""
    warps, ahead, _ = plain(units)
    return 16 if units >= 16 * ahead else warps, ahead, 2  # if all of them have something


CHOICE = plain  # or planned


@functools.partial(jax.jit, static_argnames=("group", "dtype", "warps", "ahead", "early"))
def int4_skinny(x, tiles, scale, zero, sizes=None, *, group, dtype=None, warps=None, ahead=None, early=None):
    """x [T, D] times the matrix of `tiles` (of `int4_tiles`, two-dimensional out), to [T, F]; best for few tokens.

    sizes int32[E], where tokens of expert 0 stand before those of expert 1, ...: how many each has; then the matrix is
    E of them, side by side, and the result [T, F / E].  warps: of a block; ahead: units that each loads at a time;
    early: whether loads are kept before the multiplications (1), those of the tokens too (2); by `CHOICE` unless said.
    """
    experts = 1 if sizes is None else sizes.shape[0]
    (T, D), F, name = x.shape, scale.shape[1] // experts, x.dtype.name
    units = D // UNIT
    chosen = CHOICE(units)
    ahead, early = ahead or chosen[1], chosen[2] if early is None else early
    warps = warps or min(chosen[0], power_of_two(cdiv(units, ahead)))
    tokens = min(2, cdiv(T, 8 * experts))
    blocks = cdiv(T, 8 * tokens) if sizes is None else min(T, cdiv(T, 8 * tokens) + experts)
    load, kinds = load_words(ahead)
    more = {}
    if early:
        more = {"EARLY_X": early > 1, "TURNS": cdiv(units, warps * ahead)}
    (out,) = triton_call(
        _early if early else _skinny, x, tiles, scale, zero, x if sizes is None else sizes, T,
        out=[jax.ShapeDtypeStruct((T, F), dtype or x.dtype)], grid=(F // ROWS, blocks), warps=warps, stages=1, D=D, F=F,
        EXPERTS=experts, PADDED=power_of_two(experts), GROUP=group, WARPS=warps, AHEAD=ahead,
        TOKENS=tokens, MINUS=MINUS[name], LOAD=load, LOAD_KINDS=kinds, LOADX=LOAD_X, LOADX_KINDS=LOAD_X_KINDS,
        MMA=multiply(name), MMA_KINDS=MULTIPLY_KINDS, **more,
    )  # fmt: skip
    return out


@functools.partial(jax.jit, static_argnames=("group", "dtype", "first", "outputs"))
def int4_values(tiles, scale, zero, *, group, dtype, first=0, outputs=None):
    """The values [outputs, D] of the matrix of `tiles`, from output `first` on (all unless said).

    Each is the product in float32, rounded to `dtype`.
    """
    D, F, name = tiles.shape[1] * UNIT, scale.shape[1], jnp.dtype(dtype).name
    outputs = outputs or F - first
    warps = min(4, 1 << (D // UNIT - 1).bit_length())
    load, kinds = load_words(1)
    (out,) = triton_call(
        _write, tiles, scale, zero, first // ROWS, out=[jax.ShapeDtypeStruct((outputs, D), dtype)],
        grid=(outputs // ROWS, cdiv(D // UNIT, warps)), warps=warps, stages=1, D=D, F=F, GROUP=group, WARPS=warps,
        MINUS=MINUS[name], LOAD=load, LOAD_KINDS=kinds, STORE=write_values(name), STORE_KINDS=WRITE_KINDS,
    )  # fmt: skip
    return out


def int4_by_values(x, tiles, scale, zero, *, group, dtype=None, at_once=None):
    """x [T, D] times the matrix of `tiles`, to [T, F], through its values, `at_once` bytes of them."""
    D, F = x.shape[1], scale.shape[1]
    step = F if at_once is None else min(F, max(ROWS, at_once // (D * x.dtype.itemsize) // 128 * 128))
    parts = []
    for first in range(0, F, step):
        values = int4_values(tiles, scale, zero, group=group, dtype=x.dtype, first=first, outputs=min(step, F - first))
        parts.append(jax.lax.dot_general(x, values, (((1,), (1,)), ((), ())), preferred_element_type=dtype or x.dtype))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
