"""Products of few tokens with 16-bit weights, with what stands around them in a layer: norm, SiLU, residual.

So few tokens cost what it takes to read the weights, and each kernel more costs as long as reading megabytes of them.
The weights are the first operand of mma.m16n8k16 and the tokens the second, as in int4_mma.py, and go from memory to
the registers that are multiplied: a lane loads 8 outputs of one input (128 bits), and two inputs of an output become
one register by one PRMT, whatever the order of the inputs, as long as the tokens' is the same.

D inputs, F outputs, T tokens; a unit has 32 inputs and 64 outputs.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.triton_call import cdiv, cores, jit, power_of_two, tl, triton_call

UNIT, COLUMNS = 32, 64
MOST = 32  # tokens: beyond it other kernels are no slower
COUNTERS = 4096  # one array for all sizes, so that a step makes it once


def skinny_matmul_reference(x, weight, *, norm=None, eps=0.0, residual=None, gated=False):
    """x [T, D] times weight [D, F], summed up in float32, to [T, F] of x's type.

    norm [D]: of RMSNorm (Zhang and Sennrich, 2019; `eps` is its), which x goes through before; gated: weight is
    [D, 2, F], and the result silu(first) * second (Shazeer, 2020); residual [T, F]: is added to the result.
    """
    y = x.astype(jnp.float32)
    if norm is not None:
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
        y = y.astype(x.dtype).astype(jnp.float32) * jnp.broadcast_to(norm.astype(jnp.float32), y.shape)
    y = jnp.tensordot(y.astype(x.dtype), weight, 1, preferred_element_type=jnp.float32)
    if gated:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(x.dtype)


# ---- Instructions, as functions of the sizes and the type.


def load_unit(stride, masked, hint=""):
    """Loads 8 inputs' 128 bits, `stride` bytes apart: 32 results, the address, and whether to (0 where not)."""
    load = f"ld.global.nc.L1::no_allocate{hint}.v4.b32"
    lines = [f"mov.b32 ${i}, 0;" for i in range(32 if masked else 0)]
    lines += [f"{'@p ' * masked}{load} {{${4 * j}, ${4 * j + 1}, ${4 * j + 2}, ${4 * j + 3}}}, [$32 + {j * stride}];"
              for j in range(8)]  # fmt: skip
    text = "{ .reg .pred p;\nsetp.ne.b32 p, $33, 0;\n" + "\n".join(lines) + "\n}"
    return text, ",".join(["=&r"] * 32 + ["l", "r"])


LOAD_X = """{ .reg .pred p;
setp.ne.b32 p, $5, 0;
mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];
}"""
LOAD_X_KINDS = "=&r,=&r,=&r,=&r,l,r"

# Words of 8 inputs of two outputs, $8-15, and the selectors of lower and upper halves, $16-17, to two steps' registers.
PAIR = "{\n" + "".join(
    f"prmt.b32 ${4 * s + r}, ${8 + 4 * s + 2 * (r // 2)}, ${9 + 4 * s + 2 * (r // 2)}, ${16 + r % 2};\n"
    for s in range(2) for r in range(4)
) + "}"  # fmt: skip
PAIR_KINDS = ",".join(["=&r"] * 8 + ["r"] * 10)


def multiply(kind):
    """Two steps of 16 inputs: sums $0-3, weights $4-11, tokens $12-15."""
    return "{\n" + "".join(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, "
        f"{{${4 + 4 * s}, ${5 + 4 * s}, ${6 + 4 * s}, ${7 + 4 * s}}}, {{${12 + 2 * s}, ${13 + 2 * s}}}, "
        f"{{$0, $1, $2, $3}};\n" for s in range(2)
    ) + "}"  # fmt: skip


MULTIPLY_KINDS = ",".join(["=f"] * 4 + ["r"] * 12 + ["0", "1", "2", "3"])


def weigh(kind):
    """Four registers of tokens times four of the norm's; bfloat16 has no product of its own before Hopper."""
    return "{ .reg .b32 z;\nmov.b32 z, 0x80008000;\n" + "".join(
        f"fma.rn.{kind}x2 ${r}, ${4 + r}, ${8 + r}, z;\n" for r in range(4)) + "}"  # fmt: skip


WEIGH_KINDS = ",".join(["=&r"] * 4 + ["r"] * 8)

# ---- Kernels.


@jit
def _squares(word, BF16: tl.constexpr):
    """The sum of the squares of a register's two values."""
    if BF16:
        low, high = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low * low + high * high


@jit
def _fetch(x, weight, norm, unit, units, token, T, D: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
           NORM: tl.constexpr, AHEAD: tl.constexpr, TOKENS: tl.constexpr, LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr,
           LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr):  # fmt: skip
    """A turn's registers: of weights 32 for each unit and matrix; of tokens 4 a unit and 8 tokens, norms 4 a unit."""
    words, tokens = (), ()
    for u in tl.static_range(AHEAD):
        here = unit + u < units
        at = tl.where(here, unit + u, 0)
        for half in tl.static_range(GATED + 1):
            of = (weight + at.to(tl.int64) * (32 * WIDTH) + half * (WIDTH // 2)).to(tl.int64)
            got = tl.inline_asm_elementwise(LOAD, LOAD_KINDS, [of, here.to(tl.int32)], dtype=(tl.int32,) * 32,
                                            is_pure=True, pack=1)  # fmt: skip
            for i in tl.static_range(32):
                words = words + (got[i],)  # noqa: RUF005
    for u in tl.static_range(AHEAD):
        here = unit + u < units
        at = tl.where(here, unit + u, 0)
        for m in tl.static_range(TOKENS):
            of = (x + at * 32 + m * (8 * D)).to(tl.int64)
            got = tl.inline_asm_elementwise(LOADX, LOADX_KINDS, [of, (here & (token + 8 * m < T)).to(tl.int32)],
                                            dtype=(tl.int32,) * 4, is_pure=True, pack=1)  # fmt: skip
            tokens = tokens + (got[0], got[1], got[2], got[3])  # noqa: RUF005
    for u in tl.static_range(AHEAD * NORM):
        here = unit + u < units
        of = (norm + tl.where(here, unit + u, 0) * 32).to(tl.int64)
        got = tl.inline_asm_elementwise(LOADX, LOADX_KINDS, [of, here.to(tl.int32)], dtype=(tl.int32,) * 4,
                                        is_pure=True, pack=1)  # fmt: skip
        tokens = tokens + (got[0], got[1], got[2], got[3])  # noqa: RUF005
    return words, tokens


@jit
def _total(acc, at: tl.constexpr, WARPS: tl.constexpr):
    """[8 tokens, 64 outputs]: the warps' sums acc[at], ..., acc[at + 15] added up."""
    pairs = ()
    for i in tl.static_range(4):
        low, high = tl.join(acc[at + 4 * i], acc[at + 4 * i + 1]), tl.join(acc[at + 4 * i + 2], acc[at + 4 * i + 3])
        pairs = pairs + (tl.join(low, high),)  # noqa: RUF005
    both = tl.join(tl.join(pairs[0], pairs[1]), tl.join(pairs[2], pairs[3]))
    # row, column, token of two, output of two, and which of four pairs of outputs
    both = tl.sum(tl.reshape(both, [WARPS, 8, 4, 2, 2, 2, 2]), 0)
    return tl.reshape(tl.permute(both, (1, 2, 0, 5, 4, 3)), [8, 64])


@jit
def _leave(total, second, squares, token, f, T, residual_ptr, out_ptr, eps: tl.constexpr, D: tl.constexpr,
           F: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """What is done with sums [8, 64], and with the sums of squares [8]."""
    if NORM:
        by = tl.rsqrt(squares / D + eps)[:, None]
        total, second = total * by, second * by
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * second
    place, here = token[:, None] * F + f[None, :], (token < T)[:, None]
    if RESIDUAL:
        total += tl.load(residual_ptr + place, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=here)


@jit
def _parts(ptr, at, width, here, SPLIT: tl.constexpr, PADDED: tl.constexpr):
    """The sum of all programs' parts, which stand `width` apart; .cg: L1 knows nothing of what others stored."""
    part = tl.arange(0, PADDED)[:, None, None]
    mask = (part < SPLIT) & here[None, :, :]
    return tl.sum(tl.load(ptr + part * width + at[None, :, :], mask=mask, other=0.0, cache_modifier=".cg"), 0)


@jit
def _skinny(x_ptr, weight_ptr, norm_ptr, residual_ptr, counter_ptr, T, out_ptr, sums_ptr, squares_ptr,
            D: tl.constexpr, F: tl.constexpr, eps: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
            RESIDUAL: tl.constexpr, BF16: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr,
            WARPS: tl.constexpr, AHEAD: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr,
            LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr, LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr,
            PAIRS: tl.constexpr, PAIRS_KINDS: tl.constexpr, MMA: tl.constexpr, MMA_KINDS: tl.constexpr,
            WEIGH: tl.constexpr, WEIGHED_KINDS: tl.constexpr):  # fmt: skip
    """64 outputs of TOKENS times 8 tokens, from a SPLIT-th of the inputs, whose units the warps share out.

    ptxas puts a load right before its first use, and waits for one after the other.  So there is a 0 that needs all
    loads of a turn, and all that is multiplied needs it.  Grid: blocks of tokens, F / 64, SPLIT.
    """
    WIDTH: tl.constexpr = F * 2 if GATED else F
    EACH: tl.constexpr = 16 * TOKENS  # sums a lane has of a matrix
    WORDS: tl.constexpr = 32 * (GATED + 1)
    block, column, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    row, quarter = lane // 4, lane % 4
    first = block * (8 * TOKENS)
    x = x_ptr + (first + row) * D + quarter * 8
    weight = weight_ptr + quarter * (8 * WIDTH) + column * 64 + row * 8
    norm = norm_ptr + quarter * 8
    units = (D // 32 * (share + 1)) // SPLIT
    unit = (D // 32 * share) // SPLIT + warp * AHEAD
    zero = tl.zeros([32 * WARPS], tl.float32)
    acc = (zero,) * (EACH * (GATED + 1))
    squares = (zero,) * TOKENS
    words, tokens = _fetch(x, weight, norm, unit, units, first + row, T, D, WIDTH, GATED, NORM, AHEAD, TOKENS, LOAD,
                           LOAD_KINDS, LOADX, LOADX_KINDS)  # fmt: skip
    for _ in tl.range(0, TURNS, 1, num_stages=1):
        now, given = words, tokens
        if TURNS > 1:
            unit += WARPS * AHEAD
            words, tokens = _fetch(x, weight, norm, unit, units, first + row, T, D, WIDTH, GATED, NORM, AHEAD, TOKENS,
                                   LOAD, LOAD_KINDS, LOADX, LOADX_KINDS)  # fmt: skip
        held = lane
        for i in tl.static_range(8 * (GATED + 1) * AHEAD):
            held ^= now[4 * i]
        for i in tl.static_range((TOKENS + NORM) * AHEAD):
            held ^= given[4 * i]
        held &= T >> 31  # 0, which the compiler does not know
        low, high = held | 0x5410, held | 0x7632
        for u in tl.static_range(AHEAD):
            ready = ()
            for m in tl.static_range(TOKENS):
                g = given[4 * (u * TOKENS + m) : 4 * (u * TOKENS + m) + 4]
                if NORM:
                    n = given[4 * (AHEAD * TOKENS + u) : 4 * (AHEAD * TOKENS + u) + 4]
                    add = squares[m] + _squares(g[0], BF16) + _squares(g[1], BF16) + _squares(g[2], BF16) + _squares(
                        g[3], BF16)  # fmt: skip
                    squares = squares[:m] + (add,) + squares[m + 1 :]  # noqa: RUF005
                    g = tl.inline_asm_elementwise(WEIGH, WEIGHED_KINDS,
                                                  [g[0], g[1], g[2], g[3], n[0], n[1], n[2], n[3]],
                                                  dtype=(tl.int32,) * 4, is_pure=True, pack=1)  # fmt: skip
                ready = ready + (g[0], g[1], g[2], g[3])  # noqa: RUF005
            for c in tl.static_range(4 * (GATED + 1)):
                w = now[WORDS * u + 32 * (c // 4) + c % 4 : WORDS * (u + 1)]
                a = tl.inline_asm_elementwise(
                    PAIRS, PAIRS_KINDS, [w[0], w[4], w[8], w[12], w[16], w[20], w[24], w[28], low, high],
                    dtype=(tl.int32,) * 8, is_pure=True, pack=1)  # fmt: skip
                for m in tl.static_range(TOKENS):
                    at: tl.constexpr = (c // 4) * EACH + m * 16 + 4 * (c % 4)
                    g, s = ready[4 * m : 4 * m + 4], acc[at : at + 4]
                    s = tl.inline_asm_elementwise(
                        MMA, MMA_KINDS, [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], g[0], g[1], g[2], g[3], s[0],
                                         s[1], s[2], s[3]], dtype=(tl.float32,) * 4, is_pure=False, pack=1)  # fmt: skip
                    acc = acc[:at] + (s[0], s[1], s[2], s[3]) + acc[at + 4 :]  # noqa: RUF005
    f = column * 64 + tl.arange(0, 64)
    columns, padded = tl.num_programs(1), tl.num_programs(0) * (8 * TOKENS)  # tokens in what programs leave each other
    for m in tl.static_range(TOKENS):
        token = first + 8 * m + tl.arange(0, 8)
        total, sums = _total(acc, m * 16, WARPS), tl.zeros([8], tl.float32)
        second = total
        if GATED:
            second = _total(acc, EACH + m * 16, WARPS)
        if NORM:
            sums = tl.sum(tl.sum(tl.reshape(squares[m], [WARPS, 8, 4]), 2), 0)
        if SPLIT == 1:
            _leave(total, second, sums, token, f, T, residual_ptr, out_ptr, eps, D, F, GATED, NORM, RESIDUAL)
        else:
            here = (token < T)[:, None] & (f < F)[None, :]
            place = (share * padded + token)[:, None] * WIDTH + f[None, :]
            tl.store(sums_ptr + place, total, mask=here)
            if GATED:
                tl.store(sums_ptr + place + F, second, mask=here)
            if NORM:
                tl.store(squares_ptr + (share * columns + column) * padded + token, sums, mask=token < T)
    if SPLIT > 1:
        tl.debug_barrier()  # all threads have stored before one of them counts
        done = counter_ptr + block * columns + column
        if tl.atomic_add(done, 1) == SPLIT - 1:
            tl.store(done, 0)  # as the next launch wants it
            for m in tl.static_range(TOKENS):
                token = first + 8 * m + tl.arange(0, 8)
                here = (token < T)[:, None] & (f < F)[None, :]
                place = token[:, None] * WIDTH + f[None, :]
                total, sums = _parts(sums_ptr, place, padded * WIDTH, here, SPLIT, PADDED), tl.zeros([8], tl.float32)
                second = total
                if GATED:
                    second = _parts(sums_ptr, place + F, padded * WIDTH, here, SPLIT, PADDED)
                if NORM:
                    at = (column * padded + token)[:, None]
                    sums = tl.sum(_parts(squares_ptr, at, columns * padded, (token < T)[:, None], SPLIT, PADDED), 1)
                _leave(total, second, sums, token, f, T, residual_ptr, out_ptr, eps, D, F, GATED, NORM, RESIDUAL)


def shares(T, D, F, gated, programs):
    """How the work is cut, by counts of registers and not yet by the clock: warps, units ahead, split.

    A program for about each half of a core; warps that all have something.
    """
    units, columns = D // UNIT, F // COLUMNS * cdiv(T, 8 * tokens_at_once(T, gated))
    split = max(1, min(units, round(2 * programs / columns / (1 + gated))))
    while units % split:  # alike
        split -= 1
    return min(8, power_of_two(units // split + 1) // 2), 1, split


def tokens_at_once(T, gated):
    """Blocks of 8 tokens that a program takes: what registers are there for."""
    return min(2 if gated else 4, cdiv(T, 8))


@functools.partial(jax.jit, static_argnames=("eps", "gated", "warps", "ahead", "split", "hint"))
def skinny_matmul(x, weight, *, norm=None, eps=0.0, residual=None, gated=False, warps=None, ahead=None, split=None,
                  hint=""):  # fmt: skip
    """x [T, D] times weight [D, F] as `skinny_matmul_reference` has it, for T of at most 32; bfloat16 or float16.

    D is a multiple of 32, F of 64.  The norm's weight is multiplied with x before x is divided by its root mean
    square: in float16 neither x * norm nor its product may pass 65504.
    warps: of a program; ahead: units that each loads at a time; split: into how many parts the inputs are cut, each
    a program; by `shares` unless said.  hint: what is said of loads to the L2, such as ".L2::256B".
    """
    T, D, F = *x.shape, weight.shape[-1]
    if weight.shape != ((D, 2, F) if gated else (D, F)) or D % UNIT or F % COLUMNS or not 0 < T <= MOST:
        raise ValueError(f"skinny_matmul takes x [1 to {MOST}, D] and a weight [D, F], gated [D, 2, F], D a multiple "
                         f"of {UNIT}, F of {COLUMNS}, not {x.shape} and {weight.shape}, gated {gated}")  # fmt: skip
    if x.dtype not in (jnp.bfloat16, jnp.float16) or any(
        a is not None and a.dtype != x.dtype for a in (weight, norm, residual)
    ):
        raise ValueError(f"skinny_matmul takes bfloat16 or float16 alone, not x {x.dtype}, weight {weight.dtype}, ...")
    tokens, kind = tokens_at_once(T, gated), {"bfloat16": "bf16", "float16": "f16"}[x.dtype.name]
    if None in (warps, ahead, split):
        chosen = shares(T, D, F, gated, cores())
        warps, ahead, split = warps or chosen[0], ahead or chosen[1], split or chosen[2]
    blocks, units, width = cdiv(T, 8 * tokens), D // UNIT, F * (1 + gated)
    turns = cdiv(cdiv(units, split), warps * ahead)
    masked = units % (split * warps * ahead) > 0 or turns > 1  # the last turn asks for one more
    load, kinds = load_unit(2 * width, masked, hint)
    padded = blocks * tokens * 8
    left = (split, padded, width) if split > 1 else (1,)
    squares = (split, F // COLUMNS, padded) if split > 1 and norm is not None else (1,)
    counters = jnp.zeros(max(COUNTERS, blocks * (F // COLUMNS)) if split > 1 else 1, jnp.int32)
    out, *_ = triton_call(
        _skinny, x, weight, x if norm is None else norm, x if residual is None else residual, counters, T,
        out=[jax.ShapeDtypeStruct((T, F), x.dtype), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (left, squares))],
        grid=(blocks, F // COLUMNS, split), warps=warps, stages=1, D=D, F=F, eps=float(eps), GATED=int(gated),
        NORM=int(norm is not None), RESIDUAL=int(residual is not None), BF16=int(kind == "bf16"), SPLIT=split,
        PADDED=power_of_two(split), WARPS=warps, AHEAD=ahead, TOKENS=tokens, TURNS=turns, LOAD=load, LOAD_KINDS=kinds,
        LOADX=LOAD_X, LOADX_KINDS=LOAD_X_KINDS, PAIRS=PAIR, PAIRS_KINDS=PAIR_KINDS, MMA=multiply(kind),
        MMA_KINDS=MULTIPLY_KINDS, WEIGH=weigh(kind), WEIGHED_KINDS=WEIGH_KINDS,
    )  # fmt: skip
    return out
