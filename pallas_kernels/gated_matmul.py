"""The first product of a feed-forward layer for many tokens, with the gate in it.  Its definition is that of
`skinny_matmul_reference`, gated.

T tokens, D inputs, F outputs.
"""

import jax.numpy as jnp

from pallas_kernels.mosaic import lowers
from pallas_kernels.triton_call import cdiv, cores, device

BLOCK = 128  # tokens, and outputs, that a core of a GPU computes at a time (hopper_gated.py)

# What it takes, on an H200, of the time of XLA's product and the gate after it, by tokens (up to 1024 the mean of two
# measurements); after the colon, how busy its cores are.  8B: 256 0.92:0.85, 384 0.94:0.85, 512 0.98:0.85, 640
# 1.10:0.85, 768 1.02:0.85, 896 0.92:0.99, 1024 0.88:0.97, 4096 0.96:0.97.  1.8B: 256 0.91:0.97, 384 1.05:0.73, 512
# 0.93:0.97, 640 0.98:0.81, 768 0.85:0.97, 896 0.86:0.85, 1024 0.91:0.97.  XLA has blocks that fit 640 and 768 better.
BUSY, FITTED, BUSY_THERE = 0.84, range(513, 769), 0.9


def gates(tokens, inputs, outputs, dtype) -> bool:
    """Whether `gated_matmul` takes such arrays on the device compiled for, and is quicker than XLA's way."""
    return (
        tokens >= 256
        and inputs % 64 == 0
        and inputs >= 256
        and outputs % BLOCK == 0
        and dtype in (jnp.bfloat16, jnp.float16)
        and device()[1] == 90
        and _busy(tokens, outputs) >= (BUSY_THERE if tokens in FITTED else BUSY)
        and lowers("hopper_gated", "prompts are", jnp.dtype(dtype).name)
    )


def _busy(tokens, outputs):
    """Of what the cores could do in the rounds that this takes them, the share that is asked for."""
    rounds = cdiv(cdiv(tokens, BLOCK) * (outputs // BLOCK), cores())
    return tokens * outputs / (rounds * cores() * BLOCK**2)


def gated_matmul(x, weight):
    """silu(first) * second [T, F] of x [T, D] times weight [D, 2, F], where `gates` says so."""
    from pallas_kernels.hopper_gated import gated_wgmma  # imports Mosaic, which takes half a second

    return gated_wgmma(x, weight)
