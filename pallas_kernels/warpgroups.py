"""How the matmuls for Hopper share their work out: one warpgroup loads by TMA, two or four others multiply."""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOADING, MULTIPLYING = 40, {2: 232, 4: 104}  # registers of a lane, by how many multiply
for count, registers in MULTIPLYING.items():  # more than what all had at the start would be waited for without an end
    assert LOADING + count * registers <= 65536 // (128 * (count + 1)) // 8 * 8 * (count + 1)


def run(warpgroup, each, load, multiply, free, count=2):
    """Calls each(multiply) in `count` warpgroups and each(load) in the one after them; `warpgroup` is where this is.

    each(body) calls a body for each block of the result.  free: barriers, one a stage, that tell the loader that what
    it has loaded is used up: of every one the last word comes when nothing more is loaded.
    """

    @pl.when(warpgroup == count)
    def _():
        plgpu.set_max_registers(LOADING, action="decrease")
        each(load)

        @pl.loop(0, free.shape[0])  # all that barriers have been told has to be waited for
        def _(slot):
            plgpu.barrier_wait(free.at[slot])

    @pl.when(warpgroup < count)
    def _():
        plgpu.set_max_registers(MULTIPLYING[count], action="increase")
        each(multiply)
        plgpu.wait_smem_to_gmem(0)
