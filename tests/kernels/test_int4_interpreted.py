"""The int4 kernels in Triton's interpreter, their instructions by asm.py, against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import int4_dequantize, int4_pack, int4_tiles
from pallas_kernels.int4_mma import int4_values
from tests.kernels import asm
from tests.kernels.emulated import Launcher
from tests.kernels.test_int4_matmul import Matrix
from tests.kernels.test_interpreted import interpreter  # noqa: F401  the whole module is skipped with it

values = int4_values.__wrapped__  # not under jit, for the interpreter
tiles, pack, dequantize = (
    jax.jit(function, static_argnames=names)
    for function, names in ((int4_tiles, ()), (int4_pack, "group"), (int4_dequantize, ("group", "dtype")))
)


@pytest.fixture(autouse=True)
def assembly(interpreter, monkeypatch):  # noqa: F811
    """Triton's interpreter with inline assembly; all that kernels read and write must be in their arguments."""
    from triton.runtime.interpreter import InterpreterBuilder

    launcher = Launcher(monkeypatch)

    def checked(function):
        def inside(self, pointers, *arguments):
            mask = arguments[1 if function.__name__ == "create_masked_store" else 0].data
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            launcher.memory.check(*np.broadcast_arrays(pointers.data, mask), size)
            return function(self, pointers, *arguments)

        return inside

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name)))
    monkeypatch.setitem(values.__globals__, "triton_call", launcher)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("D, F, group", [(64, 32, 32), (192, 48, 64), (640, 16, 128)])
def test_values(D, F, group, dtype):
    m = Matrix(D, F, group)
    q, zero = jnp.asarray(m.q), jnp.asarray(m.zero)
    want = dequantize(pack(q, group=group), m.scale, zero, group=group, dtype=dtype)
    found = values(tiles(q), m.scale, zero, group=group, dtype=dtype)
    np.testing.assert_array_equal(found.T, want)
    if F > 32:
        part = values(tiles(q), m.scale, zero, group=group, dtype=dtype, first=16, outputs=32)
        np.testing.assert_array_equal(part.T, want[:, 16:])


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hopper_unit(dtype, scale_dtype, group):
    """A warpgroup's registers of a unit are wgmma's first operand."""
    pytest.importorskip("jax.experimental.mosaic.gpu")
    from jax.experimental.mosaic.gpu import WGMMA_LAYOUT

    from pallas_kernels import hopper_lanes

    m, shape = Matrix(64, 64, group, scale_dtype), (64, 64)
    arrays = [np.array(tiles(jnp.asarray(m.q)))]  # then zero, scale of the first half, those of the second
    arrays += [np.array(a[i]) for i in range(64 // group) for a in (m.zero, m.scale)]
    at = 4096 * np.arange(len(arrays))
    thread = np.arange(128, dtype=np.int32)
    row = thread // 32 * 16 + thread % 32 // 4
    inputs = [thread * 16, *((at[i] + row * a.itemsize).astype(np.int32) for i, a in enumerate(arrays) if i)]
    text = hopper_lanes._values(jnp.dtype(dtype).name, jnp.dtype(scale_dtype).name, group)
    kinds = ",".join(["=&r"] * 16 + ["r"] * len(inputs)) + ",~{memory}"
    found = np.stack(asm.run(text, kinds, inputs, shared=asm.Memory(*arrays, at=at)), 1)  # [threads, registers]

    tiling = WGMMA_LAYOUT.tiling
    steps = np.indices(tiling.tile_shape(shape))
    place = sum(i * step for i, step in zip(steps, tiling.tile_strides((64, 1)), strict=True))
    place = np.moveaxis(place, (*WGMMA_LAYOUT.warp_dims, *WGMMA_LAYOUT.lane_dims), (0, 1, 2))
    matrix = np.zeros(64 * 64)
    matrix[place.ravel()] = found.view(dtype).astype(np.float64).ravel()

    q, zero, scale = (np.asarray(a, np.float64) for a in (m.q, m.zero, m.scale.astype(dtype)))
    want = jnp.asarray(((q - np.repeat(zero, group, 0)) * np.repeat(scale, group, 0)).T, dtype)
    np.testing.assert_array_equal(matrix.reshape(shape), np.asarray(want, np.float64))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_silu(dtype):
    """Of values that no exponential of float32 has room for, too."""
    pytest.importorskip("jax.experimental.mosaic.gpu")
    from pallas_kernels import hopper_lanes

    gate, up = np.random.default_rng(0).normal(scale=4, size=(2, 64)).astype(dtype)
    gate[:4] = [-200, 200, 0, -20]
    words = [a.view(np.uint32) for a in (gate, up)]
    (found,) = asm.run(hopper_lanes._silu(jnp.dtype(dtype).name), "=r,r,r", words)
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    want = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(found.view(dtype).astype(np.float64), want, rtol=jnp.finfo(dtype).eps, atol=1e-6)
