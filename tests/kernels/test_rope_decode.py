"""Decode attention with the rotation in it, against its definition: in Triton's interpreter, and on a GPU."""

import importlib
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triton_call, tuning
from tests.kernels.cases import Case
from tests.kernels.emulated import on_the_host

module = importlib.import_module("pallas_kernels.rope_decode")
interpreted = pytest.mark.skipif(
    bool(triton_call.MISSING) or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)
EPS = 1e-5


def arguments(lengths, dtype, window=None, norms=False, page_size=16, kv_heads=2, group=3, head_dim=80):
    """(Positional arguments, keywords) of a step with one token in each row that has a length."""
    case = Case(lengths, [min(n, 1) for n in lengths], dtype=np.float32, window=window, page_size=page_size,
                kv_heads=kv_heads, group=group, head_dim=head_dim)  # fmt: skip
    random, R = np.random.default_rng(1), len(lengths)

    def draw(*shape, to=dtype):
        return jnp.asarray(random.standard_normal(shape), to)

    known = {"pages": jnp.asarray(case.pages), "length": jnp.asarray(case.length), "scale": 0.2, "window": window}
    if norms:
        known |= {"q_norm": 1 + draw(head_dim), "k_norm": 1 + draw(head_dim), "eps": EPS}
    angle = random.uniform(0, 6, (R, head_dim // 2))
    qkv, turn = draw(R, kv_heads, group + 2, head_dim), (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    return (jnp.asarray(case.k, dtype), jnp.asarray(case.v, dtype), qkv, *turn, 1), known


def compare(got, expected, error):
    """Attention, and the pools but for page 0, where rows without a request write."""
    for a, b in zip(got, expected, strict=True):
        a, b = (np.asarray(x[:, 1:] if x.ndim == 5 else x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=error, atol=error)


@interpreted
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "lengths, options",
    [
        ([5, 300, 0, 128, 1, 65], {"head_dim": 64, "norms": True}),
        ([5, 300, 0, 129, 1, 65], {"window": 50}),
        ([33, 2], {"window": 1, "group": 20, "head_dim": 16, "page_size": 64}),
        ([97], {"kv_heads": 1, "group": 1}),  # pieces, of which the last has one key
    ],
)
def test_interpreted(monkeypatch, lengths, options, dtype):
    from tests.kernels.test_interpreted import SIZES, run

    on_the_host(monkeypatch)
    monkeypatch.setattr(module, "triton_call", run)
    monkeypatch.setattr("pallas_kernels.pieces.triton_call", run)
    monkeypatch.setattr(tuning, "lookup", lambda *_: SIZES | {"smallest": 32})
    args, known = arguments(lengths, dtype, **options)
    compare(module.rope_decode(*args, **known), module.rope_decode_reference(*args, **known),
            1e-5 if dtype == np.float32 else 6e-3)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    "lengths, options",
    [
        ([640, 641], {"group": 2, "head_dim": 128, "kv_heads": 8, "page_size": 64}),
        ([5, 3000, 0, 128, 1, 65, *range(60, 120)], {"group": 4, "head_dim": 128, "norms": True}),
        ([700, 0, 33], {"window": 100, "head_dim": 64}),
    ],
)
def test_gpu(lengths, options, dtype):
    args, known = arguments(lengths, dtype, **options)
    static = {k: v for k, v in known.items() if k in ("scale", "window", "eps")}
    arrays = {k: v for k, v in known.items() if k not in static}
    ways = (jax.jit(partial(f, **static), static_argnums=5) for f in (module.rope_decode, module.rope_decode_reference))
    got, expected = (way(*args, **arrays) for way in ways)
    compare(got, expected, 1e-4 if dtype == jnp.float32 else 2e-2)
