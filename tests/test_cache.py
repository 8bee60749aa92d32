"""Engines with a quantized KV cache against the oracle, in which keys and values go through the same quantizer."""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

from jaxserve import cache, mesh, ops
from jaxserve.config import EngineConfig
from jaxserve.engine import memory
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build, test_guided
from tests.engine.test_engine import random_requests
from tests.engine.test_memory import GIB, MEDIUM, SMALL, devices, model

POLICIES = (8, 4, 16)


def roundtrip(x, policy):
    """What is left of keys or values [..., H]: float16 scale and zero, codes made with these."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if policy == 16:
        scale = (np.abs(x).max(-1, keepdims=True) / 448).astype(np.float16).astype(float)
        return (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(float) * scale
    scale = ((high - low) / (2**policy - 1)).astype(np.float16).astype(float)
    zero = low.astype(np.float16).astype(float)
    return np.floor((x - zero) / scale + 0.5).clip(0, 2**policy - 1) * scale + zero


def spread(x):
    """x times a Hadamard matrix, which undoes itself: across the halves, and within them in blocks."""
    half = x.shape[-1] // 2
    block = half & -half
    matrix = np.kron(scipy.linalg.hadamard(2), np.kron(np.eye(half // block), scipy.linalg.hadamard(block)))
    return x @ matrix / np.sqrt(2 * block)


def cached(policy):
    def through(k, v):
        k = spread(roundtrip(spread(k), policy)) if policy == 4 else roundtrip(k, policy)
        return k, roundtrip(v, policy)

    return through


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@functools.cache
def expected(folder, policy):
    return [oracle.greedy(folder, None, *request, cached(policy)) for request in random_requests()]


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_prefixes_and_scores_equal_the_oracle(folder, policy):
    """Chunks of 16 tokens in pages of 4; prompts come twice, the second time from pages that are there."""
    with build.engine(folder, quant_policy=policy) as engine:
        assert engine.plan.kv in str(engine.plan)
        for again in (False, True):
            assert build.run(engine, random_requests()) == expected(folder, policy)
            assert (engine.stats()["cached_tokens"] > 100) == again
        tokens = list(range(60))
        logits = oracle.logits(folder, None, tokens, cached=cached(policy))
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        plain = oracle.logits(folder, None, tokens)
        found = engine.score(tokens, want="logits")
        assert np.abs(found - logits).mean() < 0.05 * np.abs(plain - logits).mean()
        np.testing.assert_allclose(engine.score(tokens), logprobs[np.arange(59), tokens[1:]], atol=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_and_split_equal_the_oracle(folder, policy):
    pages = {"cache_max_entry_count": 15, "session_len": 56}
    with build.engine(folder, quant_policy=policy, tp=4, **pages) as engine:
        assert build.run(engine, random_requests()) == expected(folder, policy)
        assert engine.stats()["preemptions"] > 0


def test_guided_with_int4(folder, monkeypatch):
    monkeypatch.setattr(oracle, "logits", functools.partial(oracle.logits, cached=cached(4)))
    prompts = [prompt for prompt, _ in random_requests(4, seed=5, longest=24)]
    answers = [(prompt, *test_guided.naive(folder, prompt, 20)) for prompt in prompts]
    with build.engine(folder, guide=build.table, quant_policy=4) as engine:
        test_guided.check(engine, answers)


@pytest.mark.parametrize("kind", cache.KINDS.values())
@pytest.mark.parametrize("shape", [MEDIUM, SMALL])
def test_bytes_of_a_token(shape, kind):
    """What is counted is what is allocated."""
    cfg = model(shape)
    made = cache.PagedKV.shape(cfg, 3, 16, mesh.make_mesh(1), jnp.bfloat16, kind)
    arrays = [made.k, made.v] if kind is None else [x for p in (made.k, made.v) for x in (p.codes, p.parameters)]
    allocated = sum(x.size * x.dtype.itemsize for x in arrays)
    assert allocated == 48 * cache.PagedKV.bytes_per_token(cfg, jnp.bfloat16, kind)


@pytest.mark.parametrize("policy, more", [(0, 1), (8, 256 / 132), (4, 256 / 68), (16, 256 / 132)])
def test_more_tokens_fit(policy, more, monkeypatch):
    """1.94 and 3.76 times as many with heads of 128."""
    monkeypatch.setattr(memory, "free_bytes", lambda _: 40 * GIB)
    plans = [
        memory.make_plan(model(MEDIUM), EngineConfig(quant_policy=p), devices("gpu"), 4 * GIB, jnp.bfloat16)
        for p in (0, policy)
    ]
    assert plans[1].tokens / plans[0].tokens == pytest.approx(more, rel=1e-3)


def test_fp8_is_refused_where_the_device_lacks_it(monkeypatch):
    monkeypatch.setattr(ops, "kernels", lambda: True)
    for capability, reason in ((80, "fp8 needs compute capability 8.9, and this GPU has 8.0"), (90, None)):
        monkeypatch.setattr(ops.pk.triton_call, "device", lambda capability=capability: ("toy", capability))
        assert ops.kv_refuses("fp8") == reason
        assert ops.kv_refuses("int4") is None
