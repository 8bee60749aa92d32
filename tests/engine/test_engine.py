"""The whole engine against a decoder that has no cache, no pages and no batch."""

import random
from collections import Counter

import jax
import numpy as np
import pytest

from jaxserve.engine.engine import EngineDead
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.runner import Runner
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build

GRAMMAR = '{"grammars": [{"lark_grammar": "start: /[a-c]{20}/"}]}'


def random_requests(count=9, seed=1, longest=40):
    draw = random.Random(seed)
    return [
        ([draw.randrange(build.VOCAB) for _ in range(draw.randint(1, longest))], draw.randint(1, 12))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return [oracle.greedy(folder, None, tokens, count) for tokens, count in random_requests()]


@pytest.fixture(scope="module")
def engine(folder):
    with build.engine(folder) as engine:
        yield engine


@pytest.fixture
def compiled():
    """Counts programs compiled while a test runs."""
    found = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def test_batch_equals_oracle(engine, expected):
    assert build.run(engine, random_requests()) == expected
    stats = engine.stats()
    assert stats["pages_used"] == 0 and stats["running"] == 0


def test_alone_equals_oracle(engine, expected):
    for request, want in zip(random_requests(), expected):
        assert build.run(engine, [request]) == [want]


def test_few_rows_picked_equal_oracle(folder, expected, monkeypatch):
    """Steps of few requests compute logits for as many, as on a GPU; steps of more for all that fit."""
    monkeypatch.setattr(Runner, "_picked", lambda self, rows: (2, rows) if rows > 2 else (rows,))
    with build.engine(folder) as engine:
        call, ran = engine.runner._call, set()
        engine.runner._call = lambda key, *arguments: (ran.add(key), call(key, *arguments))[1]
        assert build.run(engine, random_requests()) == expected
        assert build.run(engine, random_requests()[:1]) == expected[:1]
        assert {key[2] == 2 for key in ran if key[0] == "pick" and key[1] > 2} == {True, False}


def test_preempted_equals_oracle(folder, expected):
    with build.engine(folder, cache_max_entry_count=15, session_len=56) as engine:
        assert build.run(engine, random_requests()) == expected
        assert engine.stats()["preemptions"] > 0
        assert engine.stats()["pages_used"] == 0


@pytest.mark.parametrize("pages", [150, 15])
def test_two_steps_ahead_equal_oracle(folder, expected, pages):
    with build.engine(folder, cache_max_entry_count=pages, session_len=56) as engine:
        engine.turns.ahead = 2  # as on a GPU
        assert build.run(engine, random_requests()) == expected
        params = SamplingParams(temperature=1.0, repetition_penalty=1.3, seed=2, logprobs=1)
        sampled = build.run(engine, random_requests(), params)
        assert sampled == [build.run(engine, [request], params)[0] for request in random_requests()]
        assert (engine.stats()["preemptions"] > 0) == (pages == 15)


def test_fused_as_on_a_gpu(folder, engine, expected, monkeypatch):
    """Where a step is one program, it gives what the two give."""
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=2, logprobs=1)
    sampled = build.run(engine, random_requests(), params)
    build.like_a_gpu(monkeypatch)
    with build.engine(folder, guide=build.table, num_tokens_per_iter=400) as fused:
        assert fused.runner.sizes.whole and len(fused.runner.sizes.scored) == 2
        fused.runner.on_cpu = False
        call, ran = fused.runner._call, Counter()
        monkeypatch.setattr(fused.runner, "_call", lambda key, *given: (ran.update([key]), call(key, *given))[1])
        fused.runner.warm_up()
        once = {"empty", "seat"}  # copies, and no graph worth recording
        assert ran.keys() | once == fused.runner.programs.keys() and min(ran[key] for key in ran.keys() - once) == 2
        sizes = fused.runner.sizes.tokens
        assert tuple(fused.runner.costs) == sizes and not set(fused.runner.costs.values()) & set(sizes)  # timed
        assert build.run(fused, random_requests()) == expected
        assert build.run(fused, random_requests(), params) == sampled


def test_as_many_rows_as_a_step_has_tokens_but_one(folder, expected):
    """The program that draws has a row more than the one before it."""
    with build.engine(folder, guide=build.table, num_tokens_per_iter=5) as engine:
        (shape,) = [shape for shape in engine.runner._apart() if shape.tokens == 5]
        assert (shape.rows, shape.drawn) == (4, 5)
        guided = build.submit(engine, [1, 2, 3], 9, grammar=GRAMMAR)
        assert build.run(engine, random_requests()) == expected
        assert set(build.text(guided.wait())) <= set("abc")


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_equals_oracle(folder, expected, tp):
    with build.engine(folder, tp=tp) as engine:
        assert build.run(engine, random_requests()) == expected
        params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=7, logprobs=3)
        sampled = build.run(engine, random_requests(4), params)
    with build.engine(folder) as engine:
        assert build.run(engine, random_requests(4), params) == sampled


def test_prefix_is_computed_once(engine):
    prompt = list(range(40, 75))
    first = build.run(engine, [(prompt, 5)])
    before = engine.stats()
    assert build.run(engine, [(prompt, 5)]) == first
    after = engine.stats()
    assert after["cached_tokens"] - before["cached_tokens"] == 32  # whole pages of 4, short of the last token


def test_siblings_share_the_prompt(folder):
    prompt = list(range(40, 75))
    with build.engine(folder, enable_prefix_caching=False) as engine:
        params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4)]
        apart = [build.run(engine, [(prompt, 6)], p)[0] for p in params]
        assert engine.stats()["cached_tokens"] == 0
        answers = [build.submit(engine, prompt, 6, p, group="one") for p in params]
        assert [a.wait() for a in answers] == apart
        assert engine.stats()["cached_tokens"] == 3 * 32


def test_nothing_compiles_after_the_start(engine, compiled):
    draw = random.Random(3)
    for _ in range(30):
        params = SamplingParams(
            temperature=draw.choice([0, 0.7]), top_k=draw.choice([0, 1, 5]), top_p=draw.choice([1, 0.5]),
            min_p=draw.choice([0, 0.1]), repetition_penalty=draw.choice([1, 1.3]),
            presence_penalty=draw.choice([0, 1]), seed=draw.randrange(9),
            logit_bias=draw.choice([(), ((5, 2.0), (6, -50.0))]), bad_words=draw.choice([(), ((3,), (4, 5, 6))]),
            min_new_tokens=draw.choice([0, 3]), logprobs=draw.choice([None, 0, 20]),
        )  # fmt: skip
        build.run(engine, random_requests(draw.randint(1, 6), seed=draw.random()), params)
    engine.score(list(range(70)))
    assert compiled == []


def test_sampling_does_not_depend_on_the_batch(engine):
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=5)
    requests = random_requests()
    together = build.run(engine, requests, params)
    assert together == [build.run(engine, [request], params)[0] for request in requests]
    assert together != build.run(
        engine, requests, SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5, seed=6)
    )


def test_sampling_survives_preemption(folder, engine):
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.3, seed=2)
    want = build.run(engine, random_requests(), params)
    with build.engine(folder, cache_max_entry_count=15, session_len=56) as small:
        assert build.run(small, random_requests(), params) == want
        assert small.stats()["preemptions"] > 0


def test_logprobs_are_the_models(engine, folder):
    tokens, count = random_requests()[0]
    answer = build.submit(engine, tokens, count, SamplingParams(logprobs=4))
    generated = answer.wait()
    logits = oracle.logits(folder, None, tokens + generated)[len(tokens) - 1 : -1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for output, row in zip(answer.outputs, logprobs):
        assert output.logprob == pytest.approx(row[output.token], abs=1e-4)
        best = np.argsort(-row)[:4]
        assert [i for i, _ in output.top] == best.tolist()
        assert [p for _, p in output.top] == pytest.approx(row[best].tolist(), abs=1e-4)


def test_score_equals_oracle(engine, folder):
    tokens = random_requests()[0][0] * 3
    logits = oracle.logits(folder, None, tokens)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(engine.score(tokens), logprobs[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    got = engine.score(tokens, "logits")
    assert got.shape[0] == len(tokens)
    np.testing.assert_allclose(got[:, : build.VOCAB], logits, atol=1e-3)
    assert engine.stats()["pages_used"] == 0
    with pytest.raises(ValueError, match="101"):
        engine.score([1] * 101)


def test_score_turns_all_chunks_alike(tmp_path):
    """Dynamic NTK: the length of the whole sequence fixes the rotations, not where a chunk ends."""
    scaling = {"max_position_embeddings": 32, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    tiny_checkpoint.write(tmp_path, build.HF | scaling)
    tokens = list(range(90))  # two chunks
    with build.engine(tmp_path, max_batch_size=1) as engine:
        got = engine.score(tokens, "logits")[:, : build.VOCAB]
    np.testing.assert_allclose(got, oracle.logits(tmp_path, None, tokens), atol=1e-3)


def test_stop_ids_and_lengths(engine, expected):
    tokens, count = random_requests()[1]
    want = expected[1]
    stop = want[len(want) // 2]
    answer = build.submit(engine, tokens, count, stop_ids=frozenset([stop]))
    assert answer.wait() == want[: want.index(stop) + 1] and answer.finish == "stop"
    answer = build.submit(engine, tokens, count)
    assert answer.wait() == want and answer.finish == "length"
    answer = build.submit(engine, [5] * 98, 50)
    assert len(answer.wait()) == 2 and answer.finish == "length"  # session_len is 100


def test_min_new_tokens_and_bad_words(engine, expected):
    tokens, _ = random_requests()[1]
    free = build.run(engine, [(tokens, 12)])[0]
    stop = frozenset(free[:2])
    answer = build.submit(engine, tokens, 12, SamplingParams(min_new_tokens=6), stop_ids=stop)
    assert len(answer.wait()) >= 6 and not stop & set(answer.wait()[:6])
    assert free[3] not in build.run(engine, [(tokens, 12)], SamplingParams(bad_words=((free[3],),)))[0]
    pair = build.run(engine, [(tokens, 12)], SamplingParams(bad_words=(tuple(free[2:4]),)))[0]
    assert pair[:3] == free[:3] and pair[3] != free[3]


def test_abort_at_any_time(engine):
    answers = [build.submit(engine, [i + 1] * 20, 70) for i in range(8)]
    answers[0].get(timeout=60)  # it runs
    for answer in answers:
        engine.abort(answer.request)
    for answer in answers:
        answer.wait()
        assert answer.finish == "abort"
    assert engine.stats()["pages_used"] == 0 and build.run(engine, [([1, 2, 3], 4)])


def test_a_request_that_can_never_fit_is_refused(folder):
    with (
        build.engine(folder, cache_max_entry_count=15, session_len=56) as engine,
        pytest.raises(ValueError, match="shorten the prompt"),
    ):
        engine.scheduler.session_len = None
        build.submit(engine, [1] * 59, 10)


def test_closing_ends_everything(folder):
    engine = build.engine(folder)
    answers = [build.submit(engine, [i] * 20, 70) for i in range(6)]
    engine.close()
    engine.close()
    for answer in answers:
        answer.wait()
        assert answer.finish in ("abort", "length")
    with pytest.raises(EngineDead, match="closed"):
        build.submit(engine, [1], 1)


def test_quantized_weights_are_refused_by_name(tmp_path):
    tiny_checkpoint.write(tmp_path, build.HF | {"quantization_config": {"quant_method": "aqlm", "bits": 4}})
    with pytest.raises(ValueError, match=r"quantized \(aqlm\)"):
        build.engine(tmp_path)


def test_the_state_is_donated(engine):
    old = engine.runner.state.cache.k
    build.run(engine, [([1, 2, 3], 3)])
    assert old.is_deleted()


def test_hooks_run_after_every_turn(folder, caplog):
    with build.engine(folder) as engine:
        seen = []

        def broken():
            raise RuntimeError("not my day")

        engine.on_turn += [broken, lambda: seen.append(len(answer.outputs) + answer.qsize())]
        answer = build.submit(engine, [1, 2, 3], 5)
        assert len(answer.wait()) == 5
        assert {1, 2, 3, 4} <= set(seen) and "hook" in caplog.text


def test_what_an_engine_says_of_itself(engine, folder):
    assert engine.info["path"] == str(folder) and engine.info["vocab"] == build.VOCAB
    assert engine.info["cache_tokens"] == 600 and engine.info["session_len"] == 100
    assert engine.info["width"] == 64 and engine.info["checkpoint_config"]["vocab_size"] == build.VOCAB
