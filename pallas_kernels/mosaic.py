"""Mosaic GPU, the language of the kernels for Hopper: whether it is here and takes them.

It is no stable interface, and nothing stops where it is missing or has changed: Triton kernels do the work then, in up
to twice the time.  Importing it takes half a second, so only what needs it does.
"""

import functools
import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import jax
from jax.sharding import AxisType

from pallas_kernels.triton_call import device


def prepare() -> None:
    """Readies this process for stored programs with these kernels in them.  XLA finds Mosaic's run-time library by a
    variable that the import sets."""
    if jax.default_backend() == "gpu" and device()[1] == 90:
        try:
            importlib.import_module("jax.experimental.mosaic.gpu")
        except Exception:  # then no program here has such a kernel
            pass


@functools.cache
def lowers(module: str, what: str, *arguments) -> bool:
    """Whether `lower(*arguments)` of a module here works; if not, warns, once, that `what` ("... is") slower."""
    mesh = None
    if jax.default_backend() != "gpu":  # the GPU that is compiled for is not here, and is known by the mesh
        mesh = jax.sharding.get_abstract_mesh()
        mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))  # in shard_map they are manual

    def attempt():
        lower = importlib.import_module(f"pallas_kernels.{module}").lower
        _ask_once()
        with jax.sharding.use_abstract_mesh(mesh) if mesh else nullcontext():
            lower(*arguments)

    try:
        with ThreadPoolExecutor(1) as thread:  # its own, to be outside of the trace that asks
            thread.submit(attempt).result()
    except Exception as problem:  # ImportError, AttributeError, an error of MLIR, ...
        reason = f"{type(problem).__name__}: {str(problem).strip()[:200]}"
        warnings.warn(f"{what} slower: the kernel for Hopper cannot be used ({reason})", stacklevel=4)
        return False
    return True


@functools.cache
def _ask_once() -> None:
    """Has Mosaic ask for ptxas' version once.  It would run `ptxas --version` for every truth value of a kernel that
    becomes a number, up to 56 times a program, 20 ms each, and keep all of Python waiting."""
    try:
        extension = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext
        extension._get_ptxas_isa_version = functools.cache(extension._get_ptxas_isa_version)
    except (ImportError, AttributeError):  # another Mosaic, which asks as it likes
        pass
