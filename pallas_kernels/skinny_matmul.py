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


def load_unit(stride, masked):
    """Loads 8 inputs' 128 bits, `stride` bytes apart: 32 results, the address, and whether to (0 where not)."""
    load = f"{'@p ' * masked}ld.global.nc.L1::no_allocate.v4.b32"
    lines = [f"mov.b32 ${i}, 0;" for i in range(32 if masked else 0)]
    lines += [f"{load} {{${4 * j}, ${4 * j + 1}, ${4 * j + 2}, ${4 * j + 3}}}, [$32 + {j * stride}];" for j in range(8)]
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


def add_up(warps, blocks, gated, norm):
    """Adds the sums of all warps up, through shared memory: tl.sum takes two barriers for each value of a thread.

    Inputs: the thread; of each of `gated + 1` matrices and `blocks` of 8 tokens a lane's 16 sums; of each block, with
    `norm`, those of squares.  Results: in the same order 16 / warps of sums, and of squares those of the one or two
    tokens of these.  A lane's sums are written by four, of two tokens and two outputs; `_place` says which of all a
    thread adds up.
    """
    values, groups = 16 // warps, blocks * (gated + 1)
    chunk, threads = min(4, values), 32 * warps
    sums = 2 if chunk == 4 else 1  # of squares
    results = groups * values + blocks * sums * norm
    inputs = [f"${results + 1 + i}" for i in range(16 * groups + blocks * norm)]
    size, squares = 2048 * warps, 128 * warps * blocks * norm
    lines = [".reg .b32 base, mine, t", ".reg .f32 v<4>", f".shared .align 16 .b8 sums[{size + squares}]",
             "mov.b32 base, sums", f"shr.b32 mine, ${results}, 5", "shl.b32 mine, mine, 11",  # a warp's 2048 bytes
             f"and.b32 t, ${results}, 31", "shl.b32 t, t, 4", "add.u32 mine, mine, t",
             "add.u32 mine, mine, base"]  # fmt: skip
    if norm:
        lines += [f"shl.b32 t, ${results}, 2", "add.u32 t, t, base"]
        lines += [f"st.shared.b32 [t + {size + 4 * threads * m}], {inputs[16 * groups + m]}" for m in range(blocks)]
    out = iter(range(results))
    for g in range(groups):
        lines += ["bar.sync 0"] * (g > 0)  # what stands there has been read
        for c in range(4):  # by output, then token
            names = [inputs[16 * g + 4 * c + i] for i in (0, 2, 1, 3)]
            lines.append(f"st.shared.v4.b32 [mine + {512 * c}], {{{', '.join(names)}}}")
        lines += ["bar.sync 0", f"shl.b32 t, ${results}, {(4 * chunk).bit_length() - 1}", "add.u32 t, t, base"]
        for k in range(values // chunk):
            names = [f"${next(out)}" for _ in range(chunk)]
            for w in range(warps):
                lines += _load(names if w == 0 else None, chunk, f"[t + {2048 * w + 4 * chunk * threads * k}]", names)
    for m in range(blocks * norm):
        for e in range(sums):
            # Of token 2 (lane % 4) + e, four lanes' of each warp; the lane is the one whose sums were taken.
            name = f"${next(out)}"
            lines += [f"shr.b32 t, ${results}, {2 - chunk.bit_length() + 1}" if chunk < 4 else f"mov.b32 t, ${results}",
                      "and.b32 t, t, 3", "shl.b32 t, t, 5"]  # fmt: skip
            if chunk < 4:
                lines += [f"shr.b32 mine, ${results}, {2 - chunk.bit_length()}", "and.b32 mine, mine, 1",
                          "shl.b32 mine, mine, 4", "add.u32 t, t, mine"]  # fmt: skip
            lines.append("add.u32 t, t, base")
            for w in range(warps):
                place = f"[t + {size + 4 * threads * m + 128 * w + 16 * e}]"
                lines += [f"ld.shared.v4.b32 {{v0, v1, v2, v3}}, {place}"]
                lines.append(f"add.f32 {name}, {name}, v0" if w else f"add.f32 {name}, v0, v1")
                lines += [f"add.f32 {name}, {name}, v{i}" for i in range(2 - (w > 0), 4)]
    text = "{ " + ";\n".join(lines) + ";\n}"
    return text, ",".join(["=&f"] * results + ["r"] + ["f"] * (16 * groups + blocks * norm))


def _load(first, chunk, place, names):
    """Loads `chunk` values into the registers `first`, or adds them to `names`."""
    to = first or [f"v{i}" for i in range(chunk)]
    many, registers = (f".v{chunk}", "{" + ", ".join(to) + "}") if chunk > 1 else ("", to[0])
    return [f"ld.shared{many}.b32 {registers}, {place}"] + (
        [] if first else [f"add.f32 {n}, {n}, {t}" for n, t in zip(names, to, strict=True)]
    )


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
def _turn(now, given, acc, squares, lane, T, NORM: tl.constexpr, GATED: tl.constexpr, BF16: tl.constexpr,
          AHEAD: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, PAIRS_KINDS: tl.constexpr, MMA: tl.constexpr,
          MMA_KINDS: tl.constexpr, WEIGH: tl.constexpr, WEIGHED_KINDS: tl.constexpr):  # fmt: skip
    """Sums of products, and of squares, with what `_fetch` has brought.

    ptxas puts a load right before its first use, and waits for one after the other.  So there is a 0 that needs all
    loads of a turn, and all that is multiplied needs it.
    """
    EACH: tl.constexpr = 16 * TOKENS  # sums a lane has of a matrix
    WORDS: tl.constexpr = 32 * (GATED + 1)
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
                g = tl.inline_asm_elementwise(WEIGH, WEIGHED_KINDS, [g[0], g[1], g[2], g[3], n[0], n[1], n[2], n[3]],
                                              dtype=(tl.int32,) * 4, is_pure=True, pack=1)  # fmt: skip
            ready = ready + (g[0], g[1], g[2], g[3])  # noqa: RUF005
        for c in tl.static_range(4 * (GATED + 1)):
            w = now[WORDS * u + 32 * (c // 4) + c % 4 : WORDS * (u + 1)]
            a = tl.inline_asm_elementwise(
                PAIRS, PAIRS_KINDS, [w[0], w[4], w[8], w[12], w[16], w[20], w[24], w[28], low, high],
                dtype=(tl.int32,) * 8, is_pure=True, pack=1)  # fmt: skip
            for m in tl.static_range(TOKENS):
                g, s = ready[4 * m : 4 * m + 4], acc[EACH * (c // 4) + 16 * m + 4 * (c % 4) :]
                s = tl.inline_asm_elementwise(
                    MMA, MMA_KINDS, [a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], g[0], g[1], g[2], g[3], s[0], s[1],
                                     s[2], s[3]], dtype=(tl.float32,) * 4, is_pure=False, pack=1)  # fmt: skip
                after = acc[EACH * (c // 4) + 16 * m + 4 * (c % 4) + 4 :]
                acc = acc[: EACH * (c // 4) + 16 * m + 4 * (c % 4)] + (s[0], s[1], s[2], s[3]) + after  # noqa: RUF005
    return acc, squares


@jit
def _skinny(x_ptr, weight_ptr, norm_ptr, residual_ptr, counter_ptr, T, out_ptr, sums_ptr, squares_ptr,
            D: tl.constexpr, F: tl.constexpr, eps: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
            RESIDUAL: tl.constexpr, BF16: tl.constexpr, SPLIT: tl.constexpr,
            WARPS: tl.constexpr, AHEAD: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr,
            LOAD: tl.constexpr, LOAD_KINDS: tl.constexpr, LOADX: tl.constexpr, LOADX_KINDS: tl.constexpr,
            PAIRS: tl.constexpr, PAIRS_KINDS: tl.constexpr, MMA: tl.constexpr, MMA_KINDS: tl.constexpr,
            WEIGH: tl.constexpr, WEIGHED_KINDS: tl.constexpr, ADD: tl.constexpr,
            ADD_KINDS: tl.constexpr):  # fmt: skip
    """64 outputs of TOKENS times 8 tokens, from a SPLIT-th of the inputs, whose units the warps share out.

    Grid: blocks of tokens, F / 64, SPLIT.
    """
    WIDTH: tl.constexpr = F * 2 if GATED else F
    UNITS: tl.constexpr = D // 32 // SPLIT
    # After the warps' sums are added up a thread has VALUES of 512 (8 tokens, 64 outputs), CHUNK of them side by side.
    VALUES: tl.constexpr = 16 // WARPS
    CHUNK: tl.constexpr = 4 if VALUES > 4 else VALUES
    SUMS: tl.constexpr = 2 if CHUNK == 4 else 1  # how many tokens' sums of squares it needs for 8 tokens
    block, column, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    row, quarter = lane // 4, lane % 4
    first = block * (8 * TOKENS)
    x = x_ptr + (first + row) * D + share * (32 * UNITS) + quarter * 8
    weight = weight_ptr + (share * (32 * UNITS) + quarter * 8).to(tl.int64) * WIDTH + column * 64 + row * 8
    norm = norm_ptr + share * (32 * UNITS) + quarter * 8
    unit = warp * AHEAD
    zero = tl.zeros([32 * WARPS], tl.float32)
    acc = (zero,) * (16 * TOKENS * (GATED + 1))
    squares = (zero,) * TOKENS
    words, tokens = _fetch(x, weight, norm, unit, UNITS, first + row, T, D, WIDTH, GATED, NORM, AHEAD, TOKENS, LOAD,
                           LOAD_KINDS, LOADX, LOADX_KINDS)  # fmt: skip
    for _ in tl.range(0, TURNS - 1, 1, num_stages=1):
        now, given = words, tokens
        unit += WARPS * AHEAD
        words, tokens = _fetch(x, weight, norm, unit, UNITS, first + row, T, D, WIDTH, GATED, NORM, AHEAD, TOKENS,
                               LOAD, LOAD_KINDS, LOADX, LOADX_KINDS)  # fmt: skip
        acc, squares = _turn(now, given, acc, squares, lane, T, NORM, GATED, BF16, AHEAD, TOKENS, PAIRS, PAIRS_KINDS,
                             MMA, MMA_KINDS, WEIGH, WEIGHED_KINDS)  # fmt: skip
    acc, squares = _turn(words, tokens, acc, squares, lane, T, NORM, GATED, BF16, AHEAD, TOKENS, PAIRS, PAIRS_KINDS,
                         MMA, MMA_KINDS, WEIGH, WEIGHED_KINDS)  # fmt: skip
    operands = (thread,)
    for i in tl.static_range(16 * TOKENS * (GATED + 1)):
        operands = operands + (acc[i],)  # noqa: RUF005
    for m in tl.static_range(TOKENS * NORM):
        operands = operands + (squares[m],)  # noqa: RUF005
    sums = tl.inline_asm_elementwise(ADD, ADD_KINDS, operands, is_pure=False, pack=1,
                                     dtype=(tl.float32,) * (TOKENS * (VALUES * (GATED + 1) + SUMS * NORM)))  # fmt: skip
    last = True
    columns, padded = tl.num_programs(1), tl.num_programs(0) * (8 * TOKENS)  # tokens in what programs leave each other
    if SPLIT > 1:
        for j in tl.static_range(TOKENS * VALUES):
            token, f = _place(thread, first, column, j, VALUES, CHUNK, WARPS)
            at = (share * padded + token) * WIDTH + f
            tl.store(sums_ptr + at, sums[j], mask=token < T)
            if GATED:
                tl.store(sums_ptr + at + F, sums[TOKENS * VALUES + j], mask=token < T)
            if NORM and j % VALUES % CHUNK % 2 == 0 and j % VALUES < CHUNK:
                s = sums[TOKENS * VALUES * (GATED + 1) + j // VALUES * SUMS + j % VALUES // 2]
                tl.store(squares_ptr + (share * columns + column) * padded + token, s, mask=token < T)  # some twice
        tl.debug_barrier()  # all threads have stored before one of them counts
        done = counter_ptr + block * columns + column
        last = tl.atomic_add(done, 1) == SPLIT - 1
        if last:
            tl.store(done, 0)  # as the next launch wants it
    if last:
        totals, seconds, factors, kept = (), (), (), ()
        for j in tl.static_range(TOKENS * VALUES):  # all loads ahead of the first store, which may not pass one
            token, f = _place(thread, first, column, j, VALUES, CHUNK, WARPS)
            here = token < T
            if SPLIT == 1:
                totals = totals + (sums[j],)  # noqa: RUF005
                if GATED:
                    seconds = seconds + (sums[TOKENS * VALUES + j],)  # noqa: RUF005
                if NORM:
                    square = sums[TOKENS * VALUES * (GATED + 1) + j // VALUES * SUMS + j % VALUES % CHUNK // 2]
                    factors = factors + (square,)  # noqa: RUF005
            else:
                totals = totals + (_parts(sums_ptr + token * WIDTH + f, padded * WIDTH, here, SPLIT),)  # noqa: RUF005
                if GATED:
                    second = _parts(sums_ptr + token * WIDTH + f + F, padded * WIDTH, here, SPLIT)
                    seconds = seconds + (second,)  # noqa: RUF005
                if NORM:
                    square = _parts(squares_ptr + column * padded + token, columns * padded, here, SPLIT)
                    factors = factors + (square,)  # noqa: RUF005
            if RESIDUAL:
                kept = kept + (tl.load(residual_ptr + token * F + f, mask=here, other=0.0),)  # noqa: RUF005
        for j in tl.static_range(TOKENS * VALUES):
            token, f = _place(thread, first, column, j, VALUES, CHUNK, WARPS)
            y, by = totals[j], 1.0
            if NORM:
                by = tl.rsqrt(factors[j] / D + eps)
                y *= by
            if GATED:
                y = y / (1.0 + tl.exp(-y)) * (seconds[j] * by)
            if RESIDUAL:
                y += kept[j].to(tl.float32)
            tl.store(out_ptr + token * F + f, y.to(out_ptr.dtype.element_ty), mask=token < T)


@jit
def _place(thread, first, column, j: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr, WARPS: tl.constexpr):
    """Token and output of a thread's j-th value (see `add_up`)."""
    at = (j % VALUES // CHUNK * (32 * WARPS) + thread) * CHUNK + j % VALUES % CHUNK
    lane = at // 4 % 32
    token = first + j // VALUES * 8 + 2 * (lane % 4) + at % 4 // 2
    return token, column * 64 + 8 * (lane // 4) + 2 * (at // 128) + at % 2


@jit
def _parts(pointers, width, here, SPLIT: tl.constexpr):
    """The sum of all programs' parts, `width` apart, always in this order; .cg: L1 knows nothing of others' stores."""
    total = tl.load(pointers, mask=here, other=0.0, cache_modifier=".cg")
    for s in tl.static_range(1, SPLIT):
        total += tl.load(pointers + s * width, mask=here, other=0.0, cache_modifier=".cg")
    return total


def shares(T, D, F, gated, programs):
    """How the work is cut, by counts of registers and not yet by the clock: warps, units ahead, split.

    All programs are there at once, two a core where registers allow it, and a warp with two units loads both at once:
    on an H200 32 to 128 KB a core are then on the way, where 4.3 TB/s at 700 ns need 23.
    `programs` is the number of cores.
    """
    units, columns = D // UNIT, F // COLUMNS * cdiv(T, 8 * tokens_at_once(T, gated))
    split = max(1, min(units, round(2 * programs / columns / (1 + gated))))
    while units % split:  # alike
        split -= 1
    each = units // split
    many = columns * split <= programs if gated else T <= 8 or (T <= 16 and each <= 16)
    warps = min(8 if many else 4, power_of_two(each + 1) // 2)
    return warps, 2 if each == 2 * warps and not gated else 1, split


def tokens_at_once(T, gated):
    """Blocks of 8 tokens that a program takes: what registers are there for."""
    return min(2 if gated else 4, cdiv(T, 8))


@functools.partial(jax.jit, static_argnames=("eps", "gated", "dtype", "warps", "ahead", "split"))
def skinny_matmul(x, weight, *, norm=None, eps=0.0, residual=None, gated=False, dtype=None, warps=None, ahead=None,
                  split=None):  # fmt: skip
    """x [T, D] times weight [D, F] as `skinny_matmul_reference` has it, for T of at most 32; bfloat16 or float16.

    D is a multiple of 32, F of 64.  Of two calls in a program one needs the other's result, as in a decoder: all count
    their parts in one array.  The norm's weight is multiplied with x before x is divided by its root mean
    square: in float16 neither x * norm nor its product may pass 65504.
    dtype: of the result, that of x unless said.
    warps: of a program; ahead: units that each loads at a time; split: into how many parts the inputs are cut, each
    a program; by `shares` unless said.
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
    if units % split or warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"{D} inputs are {units} units: no {split} parts alike, or no {warps} warps")
    turns = cdiv(units // split, warps * ahead)
    masked = units % (split * warps * ahead) > 0
    load, kinds = load_unit(2 * width, masked)
    add, add_kinds = add_up(warps, tokens, int(gated), int(norm is not None))
    padded = blocks * tokens * 8
    parts = [(split, padded, width) if split > 1 else (1,)]
    parts.append((split, F // COLUMNS, padded) if split > 1 and norm is not None else (1,))  # of squares
    counters = jnp.zeros(max(COUNTERS, blocks * (F // COLUMNS)) if split > 1 else 1, jnp.int32)
    out, *_ = triton_call(
        _skinny, x, weight, x if norm is None else norm, x if residual is None else residual, counters, T,
        out=[jax.ShapeDtypeStruct((T, F), dtype or x.dtype), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in parts)],
        grid=(blocks, F // COLUMNS, split), warps=warps, stages=1, D=D, F=F, eps=float(eps), GATED=int(gated),
        NORM=int(norm is not None), RESIDUAL=int(residual is not None), BF16=int(kind == "bf16"), SPLIT=split,
        WARPS=warps, AHEAD=ahead, TOKENS=tokens, TURNS=turns, LOAD=load, LOAD_KINDS=kinds,
        LOADX=LOAD_X, LOADX_KINDS=LOAD_X_KINDS, PAIRS=PAIR, PAIRS_KINDS=PAIR_KINDS, MMA=multiply(kind),
        MMA_KINDS=MULTIPLY_KINDS, WEIGH=weigh(kind), WEIGHED_KINDS=WEIGH_KINDS, ADD=add,
        ADD_KINDS=add_kinds,
    )  # fmt: skip
    return out
