"""The first product of a feed-forward layer for many tokens, with the gate in it.  Its definition is that of
`skinny_matmul_reference`, gated.

T tokens, D inputs, F outputs.
"""

import jax.numpy as jnp

from pallas_kernels.mosaic import lowers
from pallas_kernels.triton_call import device

# What it takes on an H200 of the time of XLA's product and the gate after it, for a 1.8B and an 8B model: of 1024
# tokens 0.89 and 0.86, 4096 0.89 and 0.96; of the 1.8B 256 0.82, 512 1.07.  Timed beside other work: 256 tokens of the
# 8B 0.95, 512 1.00, 640 1.06 and 1.04, 768 of the 1.8B 0.87.  Blocks have 128 tokens, and without an even number of
# them cores are idle in the end.
PAIR, BEHIND = 256, (512,)


def gates(tokens, inputs, outputs, dtype) -> bool:
    """Whether `gated_matmul` takes such arrays on the device compiled for, and is quicker than XLA's way."""
    return (
        tokens % PAIR == 0
        and tokens not in BEHIND
        and inputs % 64 == 0
        and inputs >= 256
        and outputs % 128 == 0
        and dtype in (jnp.bfloat16, jnp.float16)
        and device()[1] == 90
        and lowers("hopper_gated", "prompts are", jnp.dtype(dtype).name)
    )


def gated_matmul(x, weight):
    """silu(first) * second [T, F] of x [T, D] times weight [D, 2, F], where `gates` says so."""
    from pallas_kernels.hopper_gated import gated_wgmma  # imports Mosaic, which takes half a second

    return gated_wgmma(x, weight)
