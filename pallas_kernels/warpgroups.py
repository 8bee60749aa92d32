"""How the matmuls for Hopper share their work out: one warpgroup loads by TMA, two others multiply."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOADING, MULTIPLYING = 40, 232  # registers of a lane
# More than what all have been given at the start would be waited for without an end.
assert LOADING + 2 * MULTIPLYING <= 65536 // (128 * 3) // 8 * 8 * 3


def run(warpgroup, each, load, multiply, free):
    """Calls each(load) in the last of three warpgroups and each(multiply) in the others; `warpgroup` is where this is.

    each(body) calls a body for each block of the result.  free: barriers, one a stage, that tell the loader that what
    it has loaded is used up: of every one the last word comes when nothing more is loaded.
    """

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(LOADING, action="decrease")
        each(load)

        @pl.loop(0, free.shape[0])  # all that barriers have been told has to be waited for
        def _(slot):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(MULTIPLYING, action="increase")
        each(multiply)
        plgpu.wait_smem_to_gmem(0)
