"""Products of many tokens by wgmma: in Pallas' interpreter of a GPU, and on one."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_matmul, gates, skinny_matmul_reference, triton_call


@pytest.fixture
def gated_wgmma(monkeypatch):
    """The kernel for a GPU of three cores, interpreted."""
    module = pytest.importorskip("pallas_kernels.hopper_gated")
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(module, "cores", lambda: 3)
    assert module.TOKENS == module.OUTPUTS == sys.modules["pallas_kernels.gated_matmul"].BLOCK
    interpreted = functools.partial(module.plgpu.kernel, interpret=params.InterpretGPUParams())
    monkeypatch.setattr(module.plgpu, "kernel", interpreted)
    return module.gated_wgmma


def case(T, D, F, dtype="bfloat16"):
    x = jax.random.normal(jax.random.key(T), (T, D), dtype)
    return x, jax.random.normal(jax.random.key(F), (D, 2, F), dtype) * D**-0.5


def close(found, x, weight):
    want = np.asarray(skinny_matmul_reference(x, weight, gated=True), np.float32)
    assert found.dtype == x.dtype and found.shape == want.shape
    assert np.linalg.norm(np.asarray(found, np.float32) - want) < 5e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(
    "T, D, F",
    [
        (300, 256, 256),  # six blocks, of which a core has two; the last tokens fill no block
        (256, 320, 384),  # a number of turns that the stages do not divide
        (5, 256, 128),  # one block, most of it padding
    ],
)
def test_blocks_and_turns(gated_wgmma, T, D, F):
    x, weight = case(T, D, F)
    close(gated_wgmma(x, weight), x, weight)


def test_what_it_takes(monkeypatch):
    """Without a GPU nothing is asked of Mosaic."""
    capability, module = 90, sys.modules["pallas_kernels.gated_matmul"]  # its name is that of the function, too
    monkeypatch.setattr(module, "device", lambda: ("NVIDIA", capability))
    monkeypatch.setattr(module, "cores", lambda: 132)
    monkeypatch.setattr(module, "lowers", lambda *_: True)
    taken = (1024, 2048, 8192), (512, 2048, 8192), (384, 4096, 14336), (896, 4096, 14336), (1400, 576, 1536)
    assert all(gates(*sizes, jnp.bfloat16) for sizes in taken) and gates(4096, 256, 8192, jnp.float16)
    idle = (384, 2048, 8192), (640, 4096, 14336), (768, 4096, 14336), (1536, 576, 1536)  # cores, in the last round
    refused = (*idle, (128, 4096, 14336), (1024, 192, 8192), (1024, 2080, 8192), (1024, 2048, 8200))
    assert not any(gates(*sizes, jnp.bfloat16) for sizes in refused)
    assert not gates(1024, 2048, 8192, jnp.float32)
    capability = 80
    assert not gates(1024, 2048, 8192, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("T, D, F", [(256, 2048, 8192), (448, 2048, 8192), (1400, 576, 1536), (4096, 4096, 14336)])
def test_gpu(T, D, F, dtype):
    if triton_call.device()[1] != 90:
        pytest.skip("needs Hopper")
    x, weight = case(T, D, F, dtype)
    assert gates(T, D, F, x.dtype)
    close(jax.jit(gated_matmul)(x, weight), x, weight)
