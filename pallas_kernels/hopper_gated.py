"""`gated_matmul` for Hopper: one warpgroup loads by TMA, two others multiply by wgmma.

A warpgroup sums up both halves of its outputs, so that SiLU and product happen in registers; by themselves they would
take the sums to memory and back.  A core takes one block of the result after the other, and loads the next while it
writes out the last.  Letters as in gated_matmul.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import warpgroups
from pallas_kernels.triton_call import cdiv, cores

LINES = 64  # tokens of an instruction
TOKENS, OUTPUTS = 2 * LINES, 128  # of a block
INPUTS = 64  # of a turn: rows of 128 bytes
PIECE = 64  # outputs that are written at a time
STAGES = 4  # turns that are loaded at a time
SIDE = 16  # blocks of other tokens that go through the outputs side by side, at most
TILED = plgpu.TilingTransform((8, INPUTS)), plgpu.SwizzleTransform(128)  # type: ignore[abstract]  # only looks so


def gated_wgmma(x, weight):
    """silu(first) * second [T, F] of x [T, D] times weight [D, 2, F]; D a multiple of 64, 256 or more, F of 128."""
    (T, D), F = x.shape, weight.shape[2]
    padded = max(TOKENS, cdiv(T, 8) * 8)  # what is beyond is neither read nor written
    x = jnp.pad(x, ((0, padded - T), (0, 0)))
    blocks = cdiv(padded, TOKENS)
    kernel = functools.partial(_kernel, blocks, D, F)
    kernel.__name__ = "gated"  # type: ignore[attr-defined]  # what profilers call it
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((padded, F), x.dtype),
        grid=(min(cores(), blocks * F // OUTPUTS),),
        grid_names=("core",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((STAGES, TOKENS, INPUTS), x.dtype, transforms=TILED),
            plgpu.SMEM((STAGES, 2, INPUTS, OUTPUTS), x.dtype, transforms=TILED),
            plgpu.SMEM((2, 2, LINES, PIECE), x.dtype, transforms=TILED),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, weight.reshape(D, 2 * F))
    return out[:T]


def _kernel(blocks, D, F, x_ref, w_ref, out_ref, x_in, w_in, results, filled, free):
    turns, warpgroup = D // INPUTS, lax.axis_index("warpgroup")
    side = max(n for n in range(1, SIDE + 1) if blocks % n == 0)

    def each(body):
        """Calls body(turns before, block of the outputs, block of the tokens) for each block of the core."""

        @plgpu.nd_loop((blocks // side, F // OUTPUTS, side), collective_axes="core")
        def _(loop):
            far, n, near = loop.index
            body(loop.local_index * turns, n, far * side + near)

    def load(before, n, m):
        def turn(k, _):
            step, inputs = before + k, pl.ds(k * INPUTS, INPUTS)
            slot = lax.rem(step, STAGES)

            @pl.when(step >= STAGES)
            def _():
                plgpu.barrier_wait(free.at[slot])

            at = filled.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(m * TOKENS, TOKENS), inputs], x_in.at[slot], at)
            for h in range(2):
                tile = w_ref.at[inputs, pl.ds(h * F + n * OUTPUTS, OUTPUTS)]
                plgpu.copy_gmem_to_smem(tile, w_in.at[slot, h], at)

        lax.fori_loop(0, turns, turn, None)

    def multiply(before, n, m):
        def scoped(*halves):
            @pl.loop(0, turns)
            def _(k):
                slot = lax.rem(before + k, STAGES)
                plgpu.barrier_wait(filled.at[slot])
                for h, sums in enumerate(halves):
                    plgpu.wgmma(sums, x_in.at[slot, pl.ds(warpgroup * LINES, LINES)], w_in.at[slot, h])
                plgpu.wgmma_wait(2)  # all but this turn's

                @pl.when(k > 0)  # what the turn before has loaded has been multiplied
                def _():
                    plgpu.barrier_arrive(free.at[lax.rem(before + k - 1, STAGES)])

            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(free.at[lax.rem(before + turns - 1, STAGES)])
            finish(*(sums[...] for sums in halves), n, m)

        pl.run_scoped(scoped, *[plgpu.ACC((LINES, OUTPUTS), jnp.float32)] * 2)

    def finish(gate, up, n, m):
        for p in range(OUTPUTS // PIECE):
            g, u = (half[:, p * PIECE : (p + 1) * PIECE] for half in (gate, up))
            root = lax.rsqrt(1 + jnp.exp(-g))  # a division would take ten instructions
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            results[warpgroup, p % 2] = (g * root * root * u).astype(results.dtype)
            plgpu.commit_smem()
            at = pl.ds(m * TOKENS + warpgroup * LINES, LINES), pl.ds(n * OUTPUTS + p * PIECE, PIECE)
            plgpu.copy_smem_to_gmem(results.at[warpgroup, p % 2], out_ref.at[at])

    warpgroups.run(warpgroup, each, load, multiply, free)


def lower(dtype):
    """Lowers a small case, and throws the result away; raises what Mosaic makes of it."""
    x, weight = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((TOKENS, 256), (256, 2, OUTPUTS)))
    jax.jit(gated_wgmma).trace(x, weight).lower(lowering_platforms=("cuda",))
