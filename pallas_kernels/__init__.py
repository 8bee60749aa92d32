"""GPU kernels for serving, each beside its definition in plain JAX.

`*_reference` is the definition and runs anywhere; the function without the suffix is the kernel, for NVIDIA GPUs from
Ampere on.  Nothing here chooses between the two: `available()` says whether the kernels can run, and why not.
"""

from pallas_kernels.eight_bit_matmul import (
    eight_bit_matmul,
    eight_bit_matmul_reference,
    grouped_eight_bit,
    grouped_eight_bit_reference,
)
from pallas_kernels.gated_matmul import gated_matmul, gates
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_matmul_reference
from pallas_kernels.int4_few import int4_few
from pallas_kernels.int4_matmul import (
    PIECE as INT4_PIECE,
)
from pallas_kernels.int4_matmul import (
    int4_dequantize,
    int4_grouped,
    int4_grouped_reference,
    int4_matmul,
    int4_matmul_reference,
    int4_pack,
)
from pallas_kernels.int4_mma import int4_tiles
from pallas_kernels.kv_quant import QuantizedPool, pool_shapes
from pallas_kernels.kv_write import kv_write, kv_write_reference
from pallas_kernels.mosaic import prepare
from pallas_kernels.paged_decode import paged_decode, paged_decode_reference
from pallas_kernels.paged_prefill import paged_prefill, paged_prefill_reference
from pallas_kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference
from pallas_kernels.skinny_matmul import COLUMNS as SKINNY_OUTPUTS
from pallas_kernels.skinny_matmul import UNIT as SKINNY_INPUTS
from pallas_kernels.skinny_matmul import skinny_matmul, skinny_matmul_reference
from pallas_kernels.triton_call import available

__all__ = [
    "INT4_PIECE",
    "SKINNY_INPUTS",
    "SKINNY_OUTPUTS",
    "QuantizedPool",
    "available",
    "eight_bit_matmul",
    "eight_bit_matmul_reference",
    "gated_matmul",
    "gates",
    "grouped_eight_bit",
    "grouped_eight_bit_reference",
    "grouped_matmul",
    "grouped_matmul_reference",
    "int4_dequantize",
    "int4_few",
    "int4_grouped",
    "int4_grouped_reference",
    "int4_matmul",
    "int4_matmul_reference",
    "int4_pack",
    "int4_tiles",
    "kv_write",
    "kv_write_reference",
    "paged_decode",
    "paged_decode_reference",
    "paged_prefill",
    "paged_prefill_reference",
    "pool_shapes",
    "prepare",
    "rope_kv_write",
    "rope_kv_write_reference",
    "skinny_matmul",
    "skinny_matmul_reference",
]
