"""Faults put into an engine that runs: they cost what they hit, and nobody else notices."""

from functools import partial

import numpy as np
import pytest

from jaxserve.engine import gate, recovery, turns
from jaxserve.engine.engine import EngineDead
from jaxserve.engine.request import Request, SamplingParams
from scripts import tiny_checkpoint
from tests.engine import build
from tests.engine.test_engine import random_requests
from tests.engine.test_guided import STOP, regex

PARAMS = SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=4)


class Once:
    """In the place of a method: the nth call goes wrong, `times` in a row; the others are as ever."""

    def __init__(self, owner, name, go_wrong, nth=3, times=1):
        self.real, self.go_wrong, self.calls, self.wrong = getattr(owner, name), go_wrong, 0, range(nth, nth + times)
        setattr(owner, name, self)

    def __call__(self, *args):
        self.calls += 1
        if self.calls in self.wrong:
            return self.go_wrong(self.real, *args)
        return self.real(*args)


def before(message):
    """Raises, with nothing done."""

    def go_wrong(real, *args):
        raise RuntimeError(message)

    return go_wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@pytest.fixture
def engine(folder, caplog):
    with build.engine(folder, guide=build.table) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(folder):
    with build.engine(folder, guide=build.table) as engine:
        return everything(engine)


def everything(engine):
    """Requests of all kinds at once; their tokens."""
    requests = random_requests(8, seed=8, longest=30)
    kinds = [{}, {"params": PARAMS}, {"grammar": regex("[a-z ]{30}"), "stop_ids": STOP}]
    answers = [build.submit(engine, tokens, count + 4, **kinds[i % 3]) for i, (tokens, count) in enumerate(requests)]
    found = [answer.wait() for answer in answers]
    assert [answer.finish for answer in answers] == ["length"] * 8, [answer.outputs[-1] for answer in answers]
    return found


def sound(engine, expected):
    """Whether nothing is left of the fault."""
    assert everything(engine) == expected
    assert engine.alive and engine.stats()["pages_used"] == 0 and not engine.scheduler.running
    assert sorted(engine.scheduler.lanes) == [0, 1, 2, 3]
    return True


@pytest.mark.parametrize("nth", [1, 2, 5, 9])
@pytest.mark.parametrize("name", ["advance", "draw"])
def test_a_step_that_does_not_start_is_started_again(engine, expected, name, nth):
    Once(engine.runner, name, before("not now"), nth)
    assert everything(engine) == expected
    assert engine.stats()["failed_steps"] == 1 and engine.stats()["recovered"] == 0
    assert sound(engine, expected)


def test_pages_that_were_promised_in_a_step_that_does_not_start(engine):
    """All but the first of these have one token to compute, like a stream, after pages that the first would write."""
    prompt = list(range(20, 29))
    (alone,) = build.run(engine, [(prompt, 12)])
    engine.scheduler.pool.forget(list(engine.scheduler.pool.entry_of))
    once = Once(engine.runner, "advance", before("not now"), nth=1)
    assert build.run(engine, [(prompt, 12)] * 3, group="one") == [alone] * 3
    assert engine.stats()["failed_steps"] == 1 and once.calls > 1


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("nth", [1, 4, 8])
def test_a_lost_state_costs_no_tokens(engine, expected, nth, ahead):
    def lose(real, *args):
        real(*args)
        engine.runner.state.cache.k.delete()
        raise RuntimeError("the device fell off")

    engine.turns.ahead = ahead
    Once(engine.runner, "advance", lose, nth)
    assert everything(engine) == expected
    assert engine.stats()["failed_steps"] == 1 and engine.stats()["recovered"] > 0
    assert sound(engine, expected)


@pytest.mark.parametrize("nth", [2, 6])
def test_a_step_that_cannot_be_read_is_computed_again(engine, expected, nth):
    def unreadable(real, *args):
        step = real(*args)
        step.read = partial(before("no answer"), None)
        return step

    Once(engine.runner, "draw", unreadable, nth)
    assert everything(engine) == expected
    assert engine.stats()["failed_steps"] == 1
    assert sound(engine, expected)


def test_faults_while_steps_wait_for_their_masks(folder, expected, monkeypatch):
    """Whatever becomes of steps that are launched, the gate opens for them, and those after them get their masks."""
    build.waits(monkeypatch)
    monkeypatch.setattr(gate, "PATIENCE", 20.0)
    with build.engine(folder, guide=build.table) as engine:

        def lose(real, *args):
            real(*args)
            engine.runner.state.cache.k.delete()
            raise RuntimeError("the device fell off")

        def unreadable(real, *args):
            step = real(*args)
            step.read = partial(before("no answer"), None)
            return step

        faults = [("draw", before("not now"), 2), ("dispatch", before("not now"), 7), ("advance", before("not now"), 2)]
        faults += [("dispatch", lose, 4), ("advance", lose, 1), ("dispatch", unreadable, 6), ("draw", unreadable, 1)]
        for count, (name, fault, nth) in enumerate(faults):
            engine.turns.ahead = 1 + count % 2
            once = Once(engine.runner, name, fault, nth)
            assert everything(engine) == expected, (name, nth)
            setattr(engine.runner, name, once.real)
            assert engine.stats()["failed_steps"] == count + 1
        assert sound(engine, expected)


def test_out_of_memory_makes_steps_smaller(engine, expected):
    Once(engine.runner, "advance", before("RESOURCE_EXHAUSTED: Out of memory"), nth=3)
    assert everything(engine) == expected
    assert engine.scheduler.budget == 8
    for _ in range(4):
        assert sound(engine, expected)
    assert engine.scheduler.budget == 16


def test_out_of_memory_twice_fails_the_newest(engine, expected):
    requests = [build.submit(engine, [i], 20) for i in range(4)]
    for request in requests:
        request.outputs.append(request.get(timeout=60))
    Once(engine.runner, "advance", before("RESOURCE_EXHAUSTED: Out of memory"), nth=1, times=2)
    for request in requests:
        request.wait()
    assert [request.finish for request in requests] == ["length", "length", "error", "error"]
    assert requests[3].outputs[-1].error.startswith("overloaded")
    assert sound(engine, expected)


def test_three_times_in_a_row_end_the_engine(folder, caplog):
    engine = build.engine(folder)
    Once(engine.runner, "advance", before("no device"), nth=1, times=99)
    answers = [build.submit(engine, [1] * 10, 5) for _ in range(9)]
    engine.on_turn.append(lambda: engine.alive or engine.abort(answers[0].request))  # late: no error
    score = engine.score_async([1] * 50)
    for answer in answers:
        answer.wait()
        assert answer.finish == "error"
    with pytest.raises((EngineDead, RuntimeError)):
        score.result(60)
    engine._thread.join(60)
    assert not engine.alive and "a hook" not in caplog.text
    with pytest.raises(EngineDead, match="no device"):
        build.submit(engine, [1], 1)
    engine.close()


def test_nobody_waits_for_an_engine_that_cannot_recover(folder, monkeypatch):
    monkeypatch.setattr(recovery, "undo", partial(before("the books are wrong"), None))
    with build.engine(folder) as engine:
        Once(engine.runner, "advance", before("not now"), nth=2)
        answers = [build.submit(engine, [i] * 10, 5) for i in range(6)]
        for answer in answers:
            answer.wait()
            assert answer.finish == "error" and "not now" in answer.outputs[-1].error
        engine._thread.join(60)
        with pytest.raises(EngineDead, match="not now"):
            build.submit(engine, [1], 1)


@pytest.mark.parametrize("where", ["seat", "words"])
def test_a_request_that_cannot_be_packed_fails_alone(engine, expected, where):
    answer = build.submit(engine, [3, 4], 30)
    answer.outputs.append(answer.get(timeout=60))  # it runs
    if where == "words":
        answer.request.tokens.append("no number")
    else:
        answer = build.submit(engine, [3, 4], 30)
        object.__setattr__(answer.request, "params", None)
    assert sound(engine, expected)
    answer.wait()
    assert answer.finish == "error" and "could not be computed" in answer.outputs[-1].error


@pytest.mark.parametrize("nth", [1, 3])
def test_an_outbox_that_raises_ends_its_request_only(engine, expected, nth):
    class Broken(build.Answer):
        def put(self, output):
            super().put(output)
            if self.qsize() >= nth:
                raise ValueError("full")

    request = Request([5, 6], 40)
    answer = Broken(request)
    engine.submit(request)
    assert sound(engine, expected)
    assert answer.qsize() == nth and engine.stats()["failed_steps"] == 0
    assert request.finish == "error"


def test_an_outbox_that_raises_when_all_starts_over(engine, expected, monkeypatch):
    class Broken(build.Answer):
        def put(self, output):
            super().put(output)
            if output.finish:
                raise ValueError("full")

    def lose(real, *args):
        engine.runner.state.cache.k.delete()
        raise RuntimeError("the device fell off")

    answer = Broken(Request([5, 6], 40))
    monkeypatch.setattr(recovery, "RECOVERIES", 0)  # its step is lost once too often
    once = Once(engine.runner, "advance", lose, nth=1)
    engine.submit(answer.request)
    answer.wait()
    assert answer.finish == "error" and "fell off" in answer.outputs[-1].error and once.calls == 1
    assert sound(engine, expected)


def test_a_guide_that_fails_fails_guided_requests_only(engine, expected):
    free, guided = build.submit(engine, [5] * 9, 30), build.submit(engine, [6] * 9, 30, grammar=regex("[a-z]{30}"))
    guided.outputs.append(guided.get(timeout=60))
    Once(engine.guide, "_masks", before("no masks"), nth=1)
    guided.wait(), free.wait()
    assert guided.finish == "error" and "no masks" in guided.outputs[-1].error and free.finish == "length"
    assert sound(engine, expected)


def test_a_matcher_that_panics_fails_its_request_only(engine, expected):
    answers = [build.submit(engine, [6] * 9, 30, grammar=regex("[a-z]{30}")) for _ in range(3)]
    answers[1].outputs.append(answers[1].get(timeout=60))
    matcher = answers[1].request.matcher.matcher

    class Panics:
        def consume_token(self, token):
            raise BaseException("rust panicked")

        def __getattr__(self, name):
            return getattr(matcher, name)

    answers[1].request.matcher.matcher = Panics()
    for answer in answers:
        answer.wait()
    assert [answer.finish for answer in answers] == ["length", "error", "length"]
    assert "rust panicked" in answers[1].outputs[-1].error
    assert sound(engine, expected)


def test_masks_are_filled_one_by_one_where_all_at_once_fails(engine, expected, monkeypatch):
    def panic(*_):
        raise BaseException("rust panicked")

    monkeypatch.setattr("jaxserve.engine.guide.fill_next_token_bitmask_par", panic)
    assert sound(engine, expected)


def test_scoring_that_fails_is_done_again(engine, expected):
    want = engine.score([4] * 60)
    Once(engine.runner, "score", before("not now"), nth=2)
    answers = [build.submit(engine, [i], 9) for i in range(3)]
    futures = [engine.score_async([4] * 60) for _ in range(3)]
    for future in futures:
        np.testing.assert_array_equal(future.result(60), want)
    assert [answer.wait() and answer.finish for answer in answers] == ["length"] * 3
    engine.runner.score.wrong = range(99)
    with pytest.raises(RuntimeError, match="not now"):
        engine.score([4] * 60)
    engine.runner.score.wrong = range(0)
    assert engine.stats()["failed_steps"] == 0
    assert sound(engine, expected)


def test_failures_with_scores_between_them_are_not_in_a_row(engine, expected):
    def lose(real, *args):
        engine.runner.state.cache.k.delete()
        raise RuntimeError("the device fell off")

    want = engine.score([4] * 60)
    for count in range(turns.GIVE_UP):
        once = Once(engine.runner, "score", lose, nth=1)
        np.testing.assert_array_equal(engine.score([4] * 60), want)
        engine.runner.score = once.real
        assert engine.stats()["failed_steps"] == count + 1
    assert sound(engine, expected)


@pytest.mark.parametrize("want", ["logprobs", "logits"])
def test_scores_that_cannot_be_read_are_computed_again(engine, expected, want):
    sequences = [[4, i, 6] for i in range(5)]  # all in one step
    right = [engine.score(tokens, want) for tokens in sequences]

    class Unreadable:
        def copy_to_host_async(self):
            pass

        def __array__(self, *args, **kwargs):
            raise RuntimeError("no answer")

    def unreadable(real, *args):
        real(*args)
        return (Unreadable(), *[None] * 3) if want == "logprobs" else Unreadable()

    name, nth = {"logprobs": ("score", 1), "logits": ("logits", 3)}[want]  # the first two of them have got theirs
    Once(engine.runner, name, unreadable, nth)
    with engine._wake:  # so that they come at once
        futures = [engine.score_async(tokens, want) for tokens in sequences]
    for future, scores in zip(futures, right):
        np.testing.assert_allclose(future.result(60), scores, atol=1e-5)
    engine.runner.__dict__[name].wrong = range(99)
    with pytest.raises(RuntimeError, match="no answer"):
        engine.score_async([4, 5, 6], want).result(60)
    del engine.runner.__dict__[name]
    assert sound(engine, expected) and engine.stats()["scoring"] == 0


@pytest.mark.parametrize("vocab", [build.VOCAB, 8192])
def test_not_a_number_is_counted(tmp_path, vocab):
    tiny_checkpoint.write(tmp_path, build.HF | {"vocab_size": vocab})
    with build.engine(tmp_path) as engine:
        embed = engine.runner.params.embed
        engine.runner.params = engine.runner.params.replace(embed=embed.at[42].set(np.nan))
        answers = [build.submit(engine, prompt, 8) for prompt in ([1, 3, 1], [1, 42, 3], [1, 2, 3])]
        assert [len(answer.wait()) for answer in answers] == [8, 0, 8]
        assert answers[1].finish == "error" and "NaN" in answers[1].outputs[-1].error
        assert engine.stats()["corrupted"] == 1
