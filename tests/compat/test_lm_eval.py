"""lm-evaluation-harness: its log-likelihoods are those that the pipeline computes in this process.

The tasks are tests/data/lm_eval, small and local.
"""

import dataclasses
import logging
import math
from pathlib import Path

import pytest

from jaxserve import EngineConfig, pipeline
from tests.compat.conftest import MODEL, OPTIONS

pytest.importorskip("lm_eval", reason="lm-eval is not installed: scripts/compat installs it")
TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
CLOSE = 1e-3


@pytest.fixture(scope="module")
def evaluate(url, tmp_path_factory):
    """evaluate(names of tasks, ...) -> ({task: its samples}, {task: its metrics}); the rest: model_args."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("huggingface")))
        patch.setenv("TQDM_DISABLE", "1")
        patch.chdir(TASKS)  # where they look for their questions
        import lm_eval
        from lm_eval.tasks import TaskManager

        def run(*names, limit=None, **options):
            found = lm_eval.simple_evaluate(
                model="local-completions",
                model_args={"model": MODEL, "base_url": f"{url}/completions", "max_retries": 1, **options},
                tasks=list(names),
                task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
                bootstrap_iters=0,
                limit=limit,
            )
            return found["samples"], found["results"]

        yield run
        logging.getLogger("lm_eval").handlers.clear()


@pytest.fixture(scope="module")
def pipe():
    names = (field.name for field in dataclasses.fields(EngineConfig))
    same = {name: OPTIONS[option] for name in names if (option := name.replace("_", "-")) in OPTIONS}
    with pipeline(None, EngineConfig(**same)) as made:  # the server's own programs, which are in the cache
        yield made


def likelihood(pipe, context, text):
    """(sum of the log-probabilities of text's tokens, whether each is the likeliest).  context, text: token ids."""
    tokens = [*context, *text]
    chances, likeliest, _ = pipe.engine.score(tokens, want="alternatives")
    start = len(context) - 1
    return math.fsum(chances[start:].tolist()), bool((likeliest[start:, 0] == tokens[start + 1 :]).all())


def ids(pipe, text):
    return pipe.tokenizer.encode(text, bos=False)


# model_args of local-completions, and how many of the questions are asked; without a tokenizer (None) it has no
# log-likelihoods, only continuations.
WAYS = {
    "token ids, several at once": ({"tokenizer_backend": "remote", "num_concurrent": 4}, None),
    "token ids in batches": ({"tokenizer_backend": "remote", "batch_size": 4}, 2),
    "texts": ({"tokenizer_backend": "remote", "tokenized_requests": False}, 2),
    "the tokenizer is found out": ({}, 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_likelihoods_are_those_of_the_pipeline(way, evaluate, pipe):
    options, limit = WAYS[way]
    samples, results = evaluate("jaxserve_choice", limit=limit, **options)
    flags = []
    for sample in samples["jaxserve_choice"]:
        for (context, text), ((told, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            both, start = ids(pipe, context + text), len(ids(pipe, context))
            expected, likeliest = likelihood(pipe, both[:start], both[start:])
            assert told == pytest.approx(expected, abs=CLOSE), (context, text)
            assert greedy is likeliest, (context, text)
            flags.append(greedy)
    assert len(flags) == 3 * (limit or 6) and {*flags} == {True, False}
    assert results["jaxserve_choice"]["acc,none"] >= 0.5


def test_likelihoods_of_whole_texts(evaluate, pipe):
    samples, results = evaluate("jaxserve_rolling", tokenizer_backend="remote")
    (first,) = ids(pipe, pipe.tokenizer.named["bos_token"])
    for sample in samples["jaxserve_rolling"]:
        ((text,),) = sample["arguments"]
        assert sample["resps"][0][0] == pytest.approx(likelihood(pipe, [first], ids(pipe, text))[0], abs=CLOSE)
    assert 0 < results["jaxserve_rolling"]["bits_per_byte,none"] < 3


def test_continuations(evaluate):
    found = []
    for backend in ("remote", "None"):
        samples, _ = evaluate("jaxserve_continue", tokenizer_backend=backend, num_concurrent=4)
        found.append([sample["resps"][0][0] for sample in samples["jaxserve_continue"]])
    assert found[0] == found[1] and found[0][0].startswith(" Paris")
    assert not any("." in text or "\n" in text for text in found[0])
