"""Block sizes of the kernels, by device and shape: data in tuned/*.json, written by measurement.

Each file holds one device: kernel -> "BITSxHEAD" (bits of an element, head dim padded to a power of two) -> sizes.  A device
without a file of its own takes default.json, whose sizes fit the 99 KiB of shared memory that every GPU from Ampere on has.
"""

import functools
import json
import pathlib
import re

import jax.numpy as jnp

from pallas_kernels.triton_call import device, power_of_two

TUNED = pathlib.Path(__file__).parent / "tuned"


def lookup(kernel: str, dtype, head_dim: int) -> dict[str, int]:
    """The sizes of a kernel for the present device.  ValueError where no file knows such a shape."""
    key = f"{jnp.dtype(dtype).itemsize * 8}x{power_of_two(head_dim)}"
    for table in (_table(_file_name(device()[0])), _table("default")):
        if key in table.get(kernel, {}):
            return table[kernel][key]
    raise ValueError(f"{kernel} has no block sizes for {key} (bits x head dim); see {TUNED / 'default.json'}")


def _file_name(kind: str) -> str:
    return re.sub("[^a-z0-9]+", "_", kind.lower()).strip("_")


@functools.cache
def _table(name: str) -> dict:
    path = TUNED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
