"""How nibbles lie in memory, and the kernel that writes their values out, for matmuls of XLA's.

What a lane loads is what it multiplies by mma.m16n8k16 or mma.m16n8k32.  Triton has no name for that, so instructions
are written out; all that it must keep is that element i of a tensor with as many elements as threads is thread i's.
D inputs, F outputs, T tokens; a tile has 16 outputs, a unit 64 inputs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import cdiv, jit, tl, triton_call

ROWS, UNIT = 16, 64
WORDS = ROWS * UNIT // 8  # of a tile and a unit


def int4_tiles(q):
    """Nibbles q uint8[D, *out] of 0 to 15 as int32[*out[:-1], out[-1] / 16, D / 64, 128], as the kernels read them.

    A lane's four words are 128 bits side by side, one of 16 inputs each: two rows, 8 apart, times two neighbours of the
    first 8 inputs and two of the others.  Nibbles r and r + 4 of a word are the two values of the r-th register of the
    first operand, of mma as of wgmma, that those 16 inputs want.
    """
    lead, D = q.shape[1:-1], q.shape[0]
    q = jnp.moveaxis(q, 0, -1).reshape(*lead, -1, 2, 8, D // UNIT, 4, 2, 4, 2).astype(jnp.uint32)
    # tile, row half, row, unit, word, input half, lane, of a pair -> tile, unit, row, lane, word
    n = len(lead)
    q = q.transpose(*range(n), *(n + i for i in (0, 3, 2, 6, 4, 5, 1, 7)))
    words = (q << jnp.broadcast_to(_places(q.ndim), q.shape)).sum((-3, -2, -1), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(*lead, -1, D // UNIT, WORDS)


def _places(rank):
    """Where in a word the nibble of an input half, row half and place in the pair is, as the last of `rank` axes."""
    places = [4 * row + 8 * half + 16 * which for half in range(2) for row in range(2) for which in range(2)]
    return jnp.asarray(places, jnp.uint32).reshape((1,) * (rank - 3) + (2, 2, 2))


def int4_untile(tiles):
    """The nibbles uint8[D, F] of int32[F / 16, D / 64, 128]."""
    tile, units, _ = tiles.shape
    words = jax.lax.bitcast_convert_type(tiles, jnp.uint32).reshape(tile, units, 8, 4, 4, 1, 1, 1)
    shape = (*words.shape[:5], 2, 2, 2)
    q = (jnp.broadcast_to(words, shape) >> jnp.broadcast_to(_places(8), shape)) & jnp.uint32(15)
    q = q.transpose(0, 6, 2, 1, 4, 5, 3, 7).reshape(tile * ROWS, units * UNIT)
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


def write_values(dtype):
    """Half a unit: words $1-2, zeros $3-4, scales (float32) $5-6, addresses of two rows' 8 inputs $7-8, whether $9.

    A lane's column is $10.  It has two of each 8 inputs, and writes all of the column-th 8: four lanes exchange them.
    """
    kind = BITS[dtype][2]
    text = "{ .reg .pred p, p<4>; .reg .b32 t, one, l, h, a<8>; .reg .b16 u, v; .reg .f32 x, y;\n"
    text += "setp.ne.b32 p, $9, 0;\n"
    for bit in range(2):  # predicates: whether the column has the bit, whether not
        text += f"and.b32 t, $10, {1 << bit}; setp.ne.b32 p{bit}, t, 0;\n"
        text += f"xor.b32 t, t, {1 << bit}; setp.ne.b32 p{2 + bit}, t, 0;\n"
    for step in range(2):
        text += _values(dtype, f"${1 + step}", ("$3", "$4"), [f"a{4 * step + r}" for r in range(4)]) + "\n"
    for r in range(8):
        if kind == "bf16":
            text += f"shl.b32 l, a{r}, 16; and.b32 h, a{r}, 0xFFFF0000; mov.b32 x, l; mov.b32 y, h;\n"
        else:
            text += f"mov.b32 {{u, v}}, a{r}; cvt.f32.f16 x, u; cvt.f32.f16 y, v;\n"
        text += f"mul.f32 x, x, ${5 + r % 2}; mul.f32 y, y, ${5 + r % 2}; cvt.rn.{kind}x2.f32 a{r}, y, x;\n"
    for bit, low in [(0, 0), (0, 1), (0, 4), (0, 5), (1, 0), (1, 1), (1, 2), (1, 3)]:
        far, high = 1 << bit, low + (2 << bit)
        text += f"mov.b32 t, a{high};\n@p{bit} mov.b32 t, a{low};\nshfl.sync.bfly.b32 t, t, {far}, 31, 0xFFFFFFFF;\n"
        text += f"@p{bit} mov.b32 a{low}, t;\n@p{2 + bit} mov.b32 a{high}, t;\n"
    text += "@p st.global.v4.b32 [$7], {a0, a2, a4, a6};\n@p st.global.v4.b32 [$8], {a1, a3, a5, a7};\n"
    return text + "mov.b32 $0, 0; }"


WRITE_KINDS = "=r,r,r,r,r,f,f,l,l,r,r"


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
    words = tl.inline_asm_elementwise(LOAD, LOAD_KINDS,
                                      [(tiles_ptr + (tile * UNITS + unit) * 128 + lane * 4).to(tl.int64),
                                       wanted.to(tl.int32)], dtype=(tl.int32,) * 4, is_pure=True,
                                      pack=1)  # fmt: skip
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
                                   wanted.to(tl.int32), column], dtype=tl.int32, is_pure=False, pack=1)  # fmt: skip


MINUS = {"bfloat16": 0xC300, "float16": 0xE400}


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
