"""Waits on the device until the host has made the masks of a step, and fetches them.

So a step can be launched whole before the host knows what its tokens may be.  Host and device share page-locked memory
of the host, int32: a flag, which rows have masks, the masks, and the tokens that were drawn by them: the host has these
before JAX knows that the program is done.

R rows, W words of a mask.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.triton_call import cdiv, jit, power_of_two, tl, triton_call

CYCLE = 16  # numbers of openings, after which they begin again; half of them may be on their way
FREE = -1  # in place of a number: nothing to wait for
WIDE = -1  # in place of the newest opening: nothing is waited for any more
HEAD = 64  # words ahead of those that tell which rows have masks; the first is the flag
TOLD = 32  # the word that has the number of the opening whose tokens are there, a line behind the flag's
TICKET = 8  # words: address (the lowest 31 bits, the rest), number, where masks begin, patience, where tokens begin
BLOCK = 512  # words of a row that a block of threads fetches: each thread 16 bytes at once
LINE = 32  # words: what crosses PCIe by one request, when a warp asks for all of it by one instruction
# Acquire: what the host wrote before the flag is seen by whoever has seen the flag.
FLAG = "{ nanosleep.u32 100; ld.acquire.sys.global.b32 $0, [$1]; }"
CLOCK = "mov.u64 $0, %globaltimer;"
# Release: who has seen the number sees the tokens, which all threads have written before the barrier.
TELL = "{ bar.sync 0; fence.acq_rel.sys; st.release.sys.global.b32 [$1], $2; mov.b32 $0, $2; }"


def ticket(address: int, number: int, masks: int, patience: float, tokens: int = 0) -> np.ndarray:
    """int32[TICKET]: what `await_masks` and `tell` need to know.

    address: of the shared memory.  number: of the opening to wait for, below CYCLE, or FREE.  masks, tokens: where
    these begin, in words; 0: no tokens are told.  patience: seconds to wait at most.

    Masks are read by whole lines: what is behind them in their last one must be the memory's, too.  ValueError where
    they begin within one, or the address is not a multiple of 16; a multiple of a line's bytes is better.
    """
    if address % 16 or masks % LINE:
        raise ValueError(
            f"masks are read by lines of 128 bytes: they cannot begin {masks} words behind address {address:#x}"
        )
    words = np.zeros(TICKET, np.int32)
    words[:6] = address & 0x7FFFFFFF, address >> 31, number, masks, round(patience * 1e3), tokens
    return words


def is_open(flag, number):
    """Whether an opening has been, when the flag is the newest that has."""
    return ((flag - number) & (CYCLE - 1) < CYCLE // 2) | (flag == WIDE)


def await_masks_reference(ticket, flag, bound, masks, *, rows: int):
    """int32[rows, W]: the masks of the rows that are bound, -1 for the others; 0 where nobody opened in time.

    flag: int32[], bound: int32[R] and masks: int32[R, W], R >= rows, as they are when the waiting ends.
    """
    number = ticket[2]
    found = jnp.where((bound[:rows, None] != 0) & is_open(flag, number), masks[:rows], -1)
    found = jnp.where(is_open(flag, number), found, 0)
    return jnp.where(number == FREE, -1, found).astype(jnp.int32)


@jit
def _shared(ticket):
    """A pointer to the shared memory."""
    address = (tl.load(ticket + 1).to(tl.int64) << 31) | tl.load(ticket).to(tl.int64)
    return address.to(tl.pointer_type(tl.int32), bitcast=True)


@jit
def _closed(flag, number, CYCLE: tl.constexpr, WIDE: tl.constexpr):
    return (((flag - number) & (CYCLE - 1)) >= CYCLE // 2) & (flag != WIDE)


@jit
def _wait(
    ticket, after, found, R: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, CYCLE: tl.constexpr,
    WIDE: tl.constexpr, FLAG: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """found int32[R]: 1 where a row's mask is there, 0 where it has none, -1 for all when patience has ended.
    Grid (1,), ROWS: R or the next power of two.  What all blocks that fetch must know crosses PCIe here, once."""
    row = tl.arange(0, ROWS)
    number, result = tl.load(ticket + 2), tl.zeros([ROWS], tl.int32)
    if number >= 0:
        shared = _shared(ticket)
        patience = tl.load(ticket + 4).to(tl.int64) * 1000000  # ns
        began = tl.inline_asm_elementwise(CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        now = began
        flag = tl.inline_asm_elementwise(FLAG, "=r,l", [shared], dtype=tl.int32, is_pure=False, pack=1)
        while _closed(flag, number, CYCLE, WIDE) & (now - began < patience):
            now = tl.inline_asm_elementwise(CLOCK, "=l", [], dtype=tl.int64, is_pure=False, pack=1)
            flag = tl.inline_asm_elementwise(FLAG, "=r,l", [shared], dtype=tl.int32, is_pure=False, pack=1)
        bound = tl.load(shared + HEAD + row, mask=row < R, other=0, volatile=True)
        result = tl.where(_closed(flag, number, CYCLE, WIDE), -1, (bound != 0).to(tl.int32))
    tl.store(found + row, result, mask=row < R)


@jit
def _fetch(ticket, found, out, W: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK words from the line on that a row begins in: grid (R, (W and what is ahead of it) / BLOCK).  Rows without
    masks are not read across PCIe.  Volatile: no cache may have what was there in the step before.

    A thread asks for 16 bytes and a warp for whole lines, also where a row begins or ends within one: were words
    asked for singly, each would cross PCIe together with its neighbours, and these for it."""
    row, state = tl.program_id(0), tl.load(found + tl.program_id(0))
    begin, end = row * W, row * W + W
    at = begin // LINE * LINE + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.full([BLOCK], -1, tl.int32)
    if state > 0:
        masks = tl.multiple_of(_shared(ticket) + tl.load(ticket + 3), 16)  # else Triton loads words
        words = tl.load(masks + at, mask=at < (end + LINE - 1) // LINE * LINE, other=0, volatile=True)
    if state < 0:
        words = tl.zeros([BLOCK], tl.int32)
    tl.store(out + at, words, mask=(at >= begin) & (at < end))


def await_masks(ticket, after, *, rows: int, words: int):
    """int32[rows, words]: see `await_masks_reference`; `ticket` as the function of that name makes it.

    after: an array that is to be there before the waiting begins, lest what makes it wait, too.
    """
    (found,) = triton_call(
        _wait, ticket, after, out=[jax.ShapeDtypeStruct((rows,), jnp.int32)], grid=(1,), warps=1, stages=1, R=rows,
        ROWS=power_of_two(rows), HEAD=HEAD, CYCLE=CYCLE, WIDE=WIDE, FLAG=FLAG, CLOCK=CLOCK,
    )  # fmt: skip
    ahead = LINE - math.gcd(words, LINE)  # words of the line that a row begins in, at most
    (masks,) = triton_call(
        _fetch, ticket, found, out=[jax.ShapeDtypeStruct((rows, words), jnp.int32)],
        grid=(rows, cdiv(ahead + words, BLOCK)), warps=4, stages=1, W=words, LINE=LINE, BLOCK=BLOCK,
    )  # fmt: skip
    return masks


@jit
def _tell(ticket, tokens, out, R: tl.constexpr, ROWS: tl.constexpr, TOLD: tl.constexpr, TELL: tl.constexpr):
    """Grid (1,).  ROWS: R or the next power of two."""
    row = tl.arange(0, ROWS)
    drawn = tl.load(tokens + row, mask=row < R, other=0)
    number, at = tl.load(ticket + 2), tl.load(ticket + 5)
    if (number >= 0) & (at > 0):
        shared = _shared(ticket)
        tl.store(shared + at + row, drawn, mask=row < R)
        tl.inline_asm_elementwise(TELL, "=r,l,r", [shared + TOLD, number], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out + row, drawn, mask=row < R)


def tell(ticket, tokens):
    """Writes tokens int32[R] to where the host sees them, then the ticket's number; returns them."""
    rows = tokens.shape[0]
    (told,) = triton_call(
        _tell, ticket, tokens, out=[jax.ShapeDtypeStruct((rows,), jnp.int32)], grid=(1,), warps=1, stages=1, R=rows,
        ROWS=power_of_two(rows), TOLD=TOLD, TELL=TELL,
    )  # fmt: skip
    return told
