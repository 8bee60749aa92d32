"""Matrices of experts, and of 8 bits: definitions against NumPy, the kernel in Triton's interpreter, and on a GPU."""

import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import (
    eight_bit_matmul,
    eight_bit_matmul_reference,
    grouped_eight_bit,
    grouped_eight_bit_reference,
    grouped_matmul,
    grouped_matmul_reference,
    int4_grouped,
    int4_grouped_reference,
    int4_matmul,
    int4_pack,
    int4_tiles,
    triton_call,
)
from pallas_kernels.eight_bit_matmul import quantize
from pallas_kernels.int4_few import int4_few
from pallas_kernels.triton_call import device
from tests.kernels.emulated import on_the_host

E4M3 = ml_dtypes.float8_e4m3fn
SIZES = {"even": (5, 5, 5, 5), "uneven": (0, 40, 1, 0, 7, 0), "one": (0, 0, 3), "full": (16, 32)}


def matrices(kind, experts, D, F, group, zero=False, seed=0):
    """Elements [E, F, D], scale and zero [D / group, E, F], and the values in float64 [E, D, F]."""
    rng = np.random.default_rng(seed)
    if kind == "int8":
        q = rng.integers(-128, 128, (experts, F, D)).astype(np.int8)
    else:
        q = rng.normal(size=(experts, F, D)).astype(E4M3)
    scale = rng.uniform(0.01, 0.02, (D // group, experts, F)).astype(np.float32)
    zeros = rng.integers(-128, 129, (D // group, experts, F)).astype(np.int16) if zero else None
    values = np.empty((experts, D, F))
    for k in range(D):
        element = q[:, :, k].astype(np.float64)
        values[:, k] = (element - (zeros[k // group] if zero else 0)) * scale[k // group]
    return q, scale, zeros, values


def product(x, values, sizes):
    """Row by row in float64."""
    expert = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([np.asarray(row, np.float64) @ values[e] for row, e in zip(x, expert, strict=True)])


def tokens(count, D, dtype=np.float32):
    return np.random.default_rng(count).normal(size=(count, D)).astype(dtype)


def close(found, want, error):
    assert np.linalg.norm(np.asarray(found, np.float64) - want) <= error * np.linalg.norm(want)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("group", [32, 64])
def test_definition(group, activations):
    q, scale, zero, values = matrices("int8", 3, 64, 5, group, zero=activations is None)
    x, sizes = tokens(8, 64), np.array((3, 0, 5), np.int32)
    error = 0.02 if activations else 1e-5
    how = {"group": group, "activations": activations}
    close(grouped_eight_bit_reference(x, q, scale, sizes, zero, **how), product(x, values, sizes), error)
    flat = (a if a is None else a[:, 1] for a in (scale, zero))
    close(eight_bit_matmul_reference(x, q[1], *flat, **how), x.astype(np.float64) @ values[1], error)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_activations_are_rounded(kind):
    x = tokens(4, 64)
    x[1] = 0
    q, scale = quantize(jnp.asarray(x), kind)
    assert scale.shape == (4, 1) and np.abs(q).max() <= (127 if kind == "int8" else 448)
    assert (np.abs(q * scale - x) <= np.abs(x).max(1, keepdims=True) / (254 if kind == "int8" else 28)).all()
    want = np.round(np.asarray(q)) if kind == "int8" else np.asarray(q).astype(E4M3).astype(np.float32)
    np.testing.assert_array_equal(q, want)
    q, scale = quantize(jnp.asarray(x), kind, known=jnp.float32(0.001))
    assert (scale == np.float32(0.001)).all() and np.abs(q).max() == (127 if kind == "int8" else 448)  # cut off


class Memory:
    """A NumPy array as the interpreter wants it."""

    def __init__(self, array):
        self.array = array
        kind, bits = array.dtype.kind, 8 * array.dtype.itemsize
        self.dtype = f"fp{bits}" if kind == "f" else f"{kind}{bits}"

    def data_ptr(self):
        return self.array.ctypes.data


def run(kernel, *inputs, out, grid, in_place=(), warps, stages, **constants):
    """`triton_call` by the interpreter; what a kernel leaves unwritten is NaN."""
    inputs = [x if isinstance(x, int) else Memory(np.array(x)) for x in inputs]
    outputs = [Memory(np.full(x.shape, np.nan, x.dtype)) for x in out]
    kernel[grid](*inputs, *outputs, **constants)
    return tuple(jnp.asarray(x.array) for x in [*outputs, *(inputs[i] for i in in_place)])


@pytest.fixture
def interpreter(monkeypatch):
    """The kernels run in Triton's interpreter."""
    if triton_call.MISSING or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton and TRITON_INTERPRET=1")
    on_the_host(monkeypatch)
    monkeypatch.setitem(grouped_matmul.__wrapped__.__globals__, "triton_call", run)
    monkeypatch.setitem(eight_bit_matmul.__wrapped__.__globals__, "multiplies", lambda kind: kind == "int8")
    with jax.disable_jit():
        yield


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(interpreter, sizes, transposed):
    x, weight = tokens(sum(sizes), 48, np.float16), tokens(len(sizes) * 40, 48, np.float16).reshape(-1, 40, 48)
    weight = weight if transposed else weight.swapaxes(1, 2)
    args = (jnp.asarray(x), jnp.asarray(weight), jnp.asarray(sizes, jnp.int32))
    found = grouped_matmul(*args, transposed=transposed)
    close(grouped_matmul_reference(*args, transposed=transposed), np.asarray(found, np.float64), 2e-3)
    values = weight.swapaxes(1, 2) if transposed else weight
    close(found, product(x, values.astype(np.float64), sizes), 2e-3)


@pytest.mark.parametrize("first, count", [(0, 2), (2, 1), (3, 3)])
def test_some_experts(interpreter, first, count):
    """Tokens of the others keep what they had."""
    sizes = np.array(SIZES["uneven"], np.int32)
    x, weight = tokens(48, 32, np.float16), tokens(6 * 16, 32, np.float16).reshape(6, 16, 32)
    before = tokens(48, 16, np.float16)
    found = grouped_matmul(
        jnp.asarray(x), jnp.asarray(weight[first : first + count]), jnp.asarray(sizes), transposed=True,
        out=jnp.asarray(before), first=first, experts=6,
    )  # fmt: skip
    expert = np.repeat(np.arange(6), sizes)
    mine = (expert >= first) & (expert < first + count)
    np.testing.assert_array_equal(np.asarray(found)[~mine], before[~mine])
    if mine.any():
        close(np.asarray(found)[mine], product(x, weight.swapaxes(1, 2).astype(np.float64), sizes)[mine], 2e-3)


EIGHT = [  # kind, group, zero, activations
    ("int8", 32, True, None),
    ("int8", 64, True, None),
    ("int8", 64, False, None),
    ("int8", 32, False, "int8"),
    ("int8", 64, False, "int8"),
    ("fp8", 32, False, None),
    ("fp8", 64, False, "fp8"),
]


@pytest.mark.parametrize("kind, group, zero, activations", EIGHT)
def test_eight_bits(interpreter, kind, group, zero, activations):
    """Where the device has no fp8 activations stay as they are."""
    q, scale, zeros, values = matrices(kind, 3, 64, 40, group, zero)
    x, sizes = tokens(20, 64, np.float16), np.array((17, 0, 3), np.int32)
    q, scale, zeros, sizes = (a if a is None else jnp.asarray(a) for a in (q, scale, zeros, sizes))
    how = {"group": group, "activations": activations}
    error = 2e-2 if activations else 2e-3
    found = grouped_eight_bit(jnp.asarray(x), q, scale, sizes, zeros, **how)
    close(found, product(x, values, np.asarray(sizes)), error)
    flat = (a if a is None else a[:, 0] for a in (scale, zeros))
    close(eight_bit_matmul(jnp.asarray(x), q[0], *flat, **how), x.astype(np.float64) @ values[0], error)


# ---- On a GPU.

MANY = [SIZES["uneven"], (700, 0, 3, 321), (1,) * 128]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", MANY, ids=["uneven", "large", "single"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("D, F", [(2048, 1536), (768, 2048), (64, 96)])
def test_gpu_experts(D, F, dtype, sizes):
    x = jnp.asarray(tokens(sum(sizes), D), dtype)
    weight = jnp.asarray(tokens(len(sizes) * D, F).reshape(-1, D, F), dtype) / D**0.5
    want = grouped_matmul_reference(x, weight, jnp.asarray(sizes), dtype=jnp.float32)
    close(grouped_matmul(x, weight, jnp.asarray(sizes), dtype=jnp.float32), np.asarray(want, np.float64), 2e-3)
    turned = jnp.swapaxes(weight, 1, 2)
    found = grouped_matmul(x, turned, jnp.asarray(sizes), transposed=True, dtype=jnp.float32)
    close(found, np.asarray(want, np.float64), 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 16, 100, 1000])
@pytest.mark.parametrize("kind, activations", [("int8", None), ("int8", "int8"), ("fp8", None), ("fp8", "fp8")])
@pytest.mark.parametrize("D, F, group", [(2048, 2048, 2048), (2048, 2048, 128), (576, 960, 64)])
def test_gpu_eight_bits(D, F, group, kind, activations, T):
    q, scale, zero, _ = matrices(kind, 1, D, F, group, zero=kind == "int8" and not activations)
    x = jnp.asarray(tokens(T, D), jnp.bfloat16)
    q, scale, zero = jnp.asarray(q[0]), *(None if a is None else jnp.asarray(a[:, 0]) for a in (scale, zero))
    how = {"group": group, "activations": activations}
    want = eight_bit_matmul_reference(x, q, scale, zero, **how, dtype=jnp.float32)
    close(eight_bit_matmul(x, q, scale, zero, **how), np.asarray(want, np.float64), 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind, activations", [("int8", None), ("int8", "int8"), ("fp8", None), ("fp8", "fp8")])
@pytest.mark.parametrize("sizes", MANY, ids=["uneven", "large", "single"])
@pytest.mark.parametrize("D, F, group", [(2048, 768, 128), (768, 2048, 768)])
def test_gpu_experts_of_eight_bits(D, F, group, kind, activations, sizes):
    q, scale, _, _ = matrices(kind, len(sizes), D, F, group)
    x, arrays = jnp.asarray(tokens(sum(sizes), D), jnp.bfloat16), [jnp.asarray(a) for a in (q, scale)]
    how = {"group": group, "activations": activations}
    want = grouped_eight_bit_reference(x, *arrays, jnp.asarray(sizes), **how)
    close(grouped_eight_bit(x, *arrays, jnp.asarray(sizes), **how), np.asarray(want, np.float64), 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", MANY, ids=["uneven", "large", "single"])
@pytest.mark.parametrize("D, F, group", [(2048, 768, 128), (768, 2048, 64), (64, 128, 32)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gpu_experts_of_four_bits(D, F, group, dtype, sizes, monkeypatch):
    rng, E = np.random.default_rng(0), len(sizes)
    q = rng.integers(0, 16, (D, E, F)).astype(np.uint8)
    scale = jnp.asarray(rng.uniform(0.005, 0.015, (D // group, E, F)), jnp.float16)
    zero = jnp.asarray(rng.integers(0, 17, (D // group, E, F)), jnp.uint8)
    x, sizes = jnp.asarray(tokens(sum(sizes), D), dtype), jnp.asarray(sizes)
    tiles, packed = jax.jit(int4_tiles)(q), int4_pack(jnp.asarray(q), group=group)
    want = np.asarray(int4_grouped_reference(x, packed, scale, zero, sizes, group=group), np.float64)
    close(int4_grouped(x, tiles, scale, zero, sizes, group=group), want, 1e-2)
    flat = [tiles.reshape(-1, *tiles.shape[2:]), *(a.reshape(len(a), -1) for a in (scale, zero))]
    close(int4_few(x, *flat, sizes, group=group), want, 1e-2)
    if F % 128 == 0 and device()[1] == 90:
        from pallas_kernels.hopper_int4 import int4_experts

        close(int4_experts(x, *flat, sizes, group=group), want, 1e-2)
    elsewhere = {"EXPERTS_SKINNY_ELSEWHERE": 0, "PIECE": 2 * D * F * 2, "_hopper": lambda *_: False}
    for name, value in elsewhere.items():  # through values, two experts at once
        monkeypatch.setitem(int4_matmul.__globals__, name, value)
    close(int4_grouped(x, tiles, scale, zero, sizes, group=group), want, 1e-2)
