"""Rows of several tokens cut into tiles of consecutive tokens, which the kernels for prompts take one a program.

R rows, T tokens of the step.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pieces import cdiv_, listed
from pallas_kernels.triton_call import jit, tl, triton_call


@jit
def _tiles(
    first_ptr, count_ptr, start_ptr, R, T, most, tiles_ptr,
    TILE: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Cuts the rows of LEAST and more tokens, then the padding tokens, into tiles of TILE tokens: grid most / PART.

    Writes int32[most, 8]: row (-1: none), first token, tokens, position, keys, keys of the whole row, cost.  Padding
    sees one key of a row that has none.
    """
    r = tl.arange(0, ROWS)
    count = tl.load(count_ptr + r, mask=r < R, other=0)
    tiles = tl.where(count >= LEAST, cdiv_(count, TILE), 0)
    after = tl.cumsum(tiles, 0)
    number = tl.program_id(0) * PART + tl.arange(0, PART)
    passed = after[None, :] <= number[:, None]
    skipped = (number - tl.max(tl.where(passed, after[None, :], 0), 1)) * TILE
    used = number < tl.sum(tiles, 0)
    row = tl.where(used, tl.sum(passed.to(tl.int32), 1), 0)
    idle = tl.sum(count, 0) + (number - tl.sum(tiles, 0)) * TILE
    count = tl.load(count_ptr + row)
    start = tl.load(start_ptr + row)
    tokens = tl.minimum(tl.maximum(tl.where(used, count - skipped, T - idle), 0), TILE)
    position = tl.where(used, start + skipped, 0)
    keys = tl.where(used, position + tokens, 1)
    tile = tiles_ptr + number * 8
    stored = number < most
    tl.store(tile, tl.where(used, row, -1), mask=stored)
    tl.store(tile + 1, tl.where(used, tl.load(first_ptr + row) + skipped, idle), mask=stored)
    tl.store(tile + 2, tokens, mask=stored)
    tl.store(tile + 3, position, mask=stored)
    tl.store(tile + 4, keys, mask=stored)
    tl.store(tile + 5, tl.where(used, start + count, 0), mask=stored)
    tl.store(tile + 6, tl.where(tokens > 0, keys + used.to(tl.int32), 0), mask=stored)


@jit
def tile_at(tiles_ptr):
    """The tile that program 1 of the grid takes: row, first token, tokens, position.

    The costly ones, at the end of a row, come first.
    """
    tile = tiles_ptr + (tl.num_programs(1) - 1 - tl.program_id(1)) * 8
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)


def tiles(first, count, start, tokens, tile, least=2):
    """What `_tiles` writes.  The same in every layer of a step, where XLA computes it once."""
    R = count.shape[0]
    most = tokens // tile + min(R, tokens // least) + 1
    constants, grid = listed(R, most)
    (found,) = triton_call(
        _tiles, first, count, start, R, tokens, most, out=[jax.ShapeDtypeStruct((most, 8), jnp.int32)], grid=grid,
        warps=4, stages=1, TILE=tile, LEAST=least, **constants,
    )  # fmt: skip
    return found
