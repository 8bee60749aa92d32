"""Scoring known sequences: right in any company, and fair to it."""

import random
import threading
import time

import numpy as np
import pytest

from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.scoring import WANTS, Job, Scorer, Sent
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build
from tests.engine.test_engine import compiled, random_requests  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with build.engine(folder) as engine:
        yield engine


def sequences(count, longest=100, seed=2):
    draw = random.Random(seed)
    return [[draw.randrange(build.VOCAB) for _ in range(draw.choice([1, 2, 17, longest]))] for _ in range(count)]


def logprobs(folder, tokens):
    logits = oracle.logits(folder, None, tokens)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:-1]


def test_many_at_once_of_every_kind(engine, folder, compiled):  # noqa: F811
    asked = [(tokens, WANTS[i % len(WANTS)]) for i, tokens in enumerate(sequences(25))]
    requests = random_requests(5, seed=4)
    answers = [build.submit(engine, *request) for request in requests]
    futures = [engine.score_async(*one) for one in asked]
    for (tokens, want), future in zip(asked, futures):
        found = future.result(60)
        if want == "logits":
            np.testing.assert_allclose(found, oracle.logits(folder, None, tokens), atol=1e-3)
        elif want == "hidden":
            assert found.shape == (len(tokens), 64) and found.dtype == np.float32
            np.testing.assert_allclose(found[-1], engine.score(tokens, "last"), atol=1e-5)
        elif want == "last":
            assert found.shape == (64,) and found.dtype == np.float32
        else:
            expected = logprobs(folder, tokens)
            values = found if want == "logprobs" else found[0]
            np.testing.assert_allclose(values, expected[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
            if want == "alternatives":
                np.testing.assert_array_equal(found[1], np.argsort(-expected, -1, kind="stable")[:, :20])
                np.testing.assert_allclose(found[2], -np.sort(-expected, -1)[:, :20], atol=1e-4)
    assert [a.wait() for a in answers] == [build.run(engine, [request])[0] for request in requests]
    assert engine.stats()["pages_used"] == engine.stats()["scoring"] == 0
    assert compiled == []


def test_like_a_gpu(folder, monkeypatch):
    build.like_a_gpu(monkeypatch)
    tokens = sequences(9)[4]
    with build.engine(folder) as engine:
        want = logprobs(folder, tokens)
        np.testing.assert_allclose(engine.score(tokens), want[np.arange(len(want)), tokens[1:]], atol=1e-4)


def test_refusals(engine):
    with pytest.raises(ValueError, match="1 to 100 tokens, not 101"):
        engine.score([1] * 101)
    with pytest.raises(ValueError, match="not 0"):
        engine.score([])
    with pytest.raises(ValueError, match="'loss'"):
        engine.score([1], "loss")
    for wrong in (-1, build.VOCAB):
        with pytest.raises(ValueError, match=f"0 to 96, not {wrong}"):
            engine.score([1, wrong])
        with pytest.raises(ValueError, match=f"0 to 96, not {wrong}"):
            build.submit(engine, [1, wrong], 1)


def test_the_whole_cache_and_no_more(folder):
    with build.engine(folder, cache_max_entry_count=15, session_len=60) as engine:
        assert engine.score([7] * 60).shape == (59,)
        engine.session_len = 100
        with pytest.raises(ValueError, match="1 to 60 tokens, not 61"):
            engine.score([7] * 61)


def test_requests_do_not_starve_scoring(folder):
    """A job that needs all pages gets them although requests keep coming."""
    with build.engine(folder, cache_max_entry_count=15, session_len=60) as engine:
        going = True

        def keep_asking():
            while going:
                build.run(engine, [([3] * 20, 8)])

        threads = [threading.Thread(target=keep_asking) for _ in range(5)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                assert engine.score_async([5] * 60).result(60).shape == (59,)
        finally:
            going = False
            for thread in threads:
                thread.join()
        assert engine.stats()["pages_used"] == 0


def test_scoring_does_not_starve_requests(folder):
    with build.engine(folder, cache_max_entry_count=15, session_len=60) as engine:
        futures = [engine.score_async([5] * 60) for _ in range(60)]
        answers = [build.submit(engine, [3] * 20, 8) for _ in range(3)]
        later = [engine.score_async([5] * 60) for _ in range(60)]
        for answer in answers:
            answer.wait()
        assert not later[-1].done()  # of those that came after it most still wait
        for future in futures + later:
            assert future.result(60).shape == (59,)


def test_a_prompt_that_came_before_is_read_on_while_a_job_waits():
    scheduler = Scheduler(PagePool(41, 4), lanes=4, budget=8)
    scorer = Scorer(None, scheduler)
    stream, prompt, later = Request([1] * 4, 60), Request([2] * 60, 5), Request([3] * 4, 5)
    read = dict.fromkeys((stream, prompt, later), 0)

    def turn():
        scorer.admit()
        chunks = scheduler.plan()
        scheduler.commit(chunks, [5] * len(chunks))
        for chunk in chunks:
            read[chunk.request] = chunk.stop

    scheduler.add(stream)
    turn()
    scheduler.add(prompt)
    turn()
    scorer.waiting.append(Job([4] * 150, "logprobs", arrival=1))
    later.arrival = 2
    scheduler.add(later)
    for _ in range(9):
        turn()
    assert read[prompt] >= 60 and stream in scheduler.running  # a token of each step was the stream's
    assert not read[later] and scorer.waiting  # which has to wait for the job


def test_jobs_are_counted_while_steps_are_sent():
    """Whoever asks is on another thread."""
    scorer = Scorer(None, Scheduler(PagePool(9, 4), lanes=4, budget=8))
    jobs = [Job([1, 2], "logprobs") for _ in range(2)]

    class Pieces:
        def __iter__(self):
            scorer.sent.append(Sent([(jobs[1], 0, 2)], {}, []))
            return iter([(jobs[0], 0, 2)])

    scorer.sent += [Sent(Pieces(), {}, []), Sent([], {}, [])]
    assert scorer.jobs == 1


def test_short_ones_pass_long_ones(engine):
    long = [engine.score_async([i] * 100) for i in range(3)]
    short = engine.score_async([4, 5, 6])
    short.result(60)
    assert not all(future.done() for future in long)
    for future in long:
        future.result(60)


def test_cancelled(engine):
    futures = [engine.score_async([3] * 90, WANTS[i % 5]) for i in range(12)]
    kept = [f for i, f in enumerate(futures) if i % 3]
    cancelled = [f.cancel() for f in futures if f not in kept]
    for future in kept:
        future.result(60)
    assert any(cancelled)
    deadline = time.monotonic() + 10
    while engine.stats()["scoring"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats()["pages_used"] == engine.stats()["scoring"] == 0
