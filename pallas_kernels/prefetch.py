"""Weights on their way to the L2 cache before the kernel that multiplies with them begins.

Between two kernels memory rests for 2 to 3 us, and nearly as long as attention to a few tokens takes.  So a kernel may
ask for the first bytes of what the next ones read; it waits for nothing, and on GPUs before Hopper asks for nothing.
"""

import dataclasses
from functools import partial

import jax

from pallas_kernels.triton_call import cdiv, device, jit, tl

PIECE = 4096  # bytes that a thread asks for at a time
BORDER = 16  # they are a multiple of so many
ARRAYS = 2  # that a kernel can ask for
NONE = (0, 1, 0, 0, 0, "")

ASK_KINDS = "=r,l,r"  # result 0, address, whether to


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["size", "parts"])
@dataclasses.dataclass(frozen=True)
class First:
    """The first bytes of an array that a kernel will read: `size` in all, those of each of `parts` equal parts.

    A kernel's programs begin in different places, all at once; each should find as much as the others.
    """

    array: jax.Array
    size: int
    parts: int = 1


def _ask(size):
    prefetch = f"@p cp.async.bulk.prefetch.L2.global [$1], {size};"
    return f"{{ .reg .pred p;\nsetp.ne.b32 p, $2, 0;\n{prefetch}\nmov.b32 $0, 0;\n}}"


def asked(following, other, programs, threads):
    """For a kernel that calls `ask`: ARRAYS arrays (`other` where there are fewer), and of each what is asked for.

    following: a tuple of First; programs, threads: of the kernel, which share the pieces out.
    """
    if len(following) > ARRAYS:
        raise ValueError(f"a kernel can ask for {ARRAYS} arrays, not {len(following)}")
    arrays, pieces = [], []
    for first in following if following and device()[1] >= 90 else ():
        stride = first.array.size * first.array.dtype.itemsize // first.parts
        each = min(first.size // first.parts, stride)
        piece = min(PIECE, each) // BORDER * BORDER
        if piece and stride % BORDER == 0:
            count = each // piece * first.parts
            arrays.append(first.array)
            pieces.append((count, each // piece, stride, piece, cdiv(count, programs * threads), _ask(piece)))
    missing = ARRAYS - len(arrays)
    return (*arrays, *[other] * missing), (*pieces, *[NONE] * missing)


@jit
def ask(pointer, PIECES: tl.constexpr, ASK_KINDS: tl.constexpr, THREADS: tl.constexpr):
    """Asks for one array's pieces, as `asked` has them; neighbouring programs for neighbours, in the array's order."""
    COUNT: tl.constexpr = PIECES[0]
    PER: tl.constexpr = PIECES[1]
    STRIDE: tl.constexpr = PIECES[2]
    SIZE: tl.constexpr = PIECES[3]
    TURNS: tl.constexpr = PIECES[4]
    ASK: tl.constexpr = PIECES[5]
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    thread = tl.arange(0, THREADS)
    thread = thread % 32 * (THREADS // 32) + thread // 32  # few of each warp, for lanes ask one after the other
    for turn in tl.static_range(TURNS):
        piece = (turn * THREADS + thread) * programs + program
        here = piece < COUNT
        piece = tl.where(here, piece, 0)
        of = (piece // PER).to(tl.int64) * STRIDE + piece % PER * SIZE
        tl.inline_asm_elementwise(ASK, ASK_KINDS, [pointer.to(tl.int64) + of, here.to(tl.int32)], dtype=tl.int32,
                                  is_pure=False, pack=1)  # fmt: skip
