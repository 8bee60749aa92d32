"""Block sizes of the kernels, by device and shape: data in tuned/*.json, written by measurement.

Each file holds one device: kernel -> "BITSxHEAD" (bits of an element, head dim padded to a power of two) -> sizes.  A
device without a file of its own takes default.json, whose sizes fit the 99 KiB of shared memory that every GPU from
Ampere on has.
"""

import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from pallas_kernels.triton_call import device, power_of_two

TUNED = pathlib.Path(__file__).parent / "tuned"
TABLES: dict[str, dict] = {}  # file name -> content, read when first asked for


def lookup(kernel: str, dtype, head_dim: int) -> dict[str, Any]:
    """The sizes of a kernel for the present device.  ValueError where no file knows such a shape."""
    key = f"{jnp.dtype(dtype).itemsize * 8}x{power_of_two(head_dim)}"
    for file in (path(device()[0]), TUNED / "default.json"):
        if file.stem not in TABLES:
            TABLES[file.stem] = json.loads(file.read_text()) if file.exists() else {}
        if key in TABLES[file.stem].get(kernel, {}):
            return TABLES[file.stem][kernel][key]
    raise ValueError(f"{kernel} has no block sizes for {key} (bits x head dim); see {TUNED / 'default.json'}")


def of_kind(kernel: str, kind: str | None) -> str:
    """The name in the tables of a kernel for codes of a kind (None: for plain numbers)."""
    return kernel if kind is None else f"{kernel}_int{4 if kind == 'int4' else 8}"


def path(kind: str) -> pathlib.Path:
    """The file of a device kind: NVIDIA H200 -> tuned/nvidia_h200.json."""
    return TUNED / (re.sub("[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")
