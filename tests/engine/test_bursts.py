"""Several steps in one launch give what single steps give, whatever happens among them."""

import dataclasses
import random
from functools import partial

import jax
import numpy as np
import pytest

from jaxserve.engine import turns
from jaxserve.engine.request import SamplingParams
from jaxserve.engine.sizes import Sizes
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build
from tests.engine.test_engine import random_requests
from tests.engine.test_faults import Once, before
from tests.engine.test_guided import STOP, regex

STEPS = 4
SAMPLED = SamplingParams(
    temperature=1.0, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4, seed=2, logprobs=2, min_new_tokens=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@pytest.fixture(scope="module")
def patched():
    """Engines have bursts, however long they take; on the CPU they would have none."""
    choose = Sizes.choose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "LONG", 60.0)
        patch.setattr(
            Sizes, "choose", lambda *given: dataclasses.replace(choose(*given), bursts=((2, STEPS), (4, STEPS - 1)))
        )
        yield


@pytest.fixture(scope="module")
def engine(folder, patched):
    with build.engine(folder, guide=build.table) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(engine):
    """What single steps give."""
    engine.turns._steps = lambda: 1
    before = engine.stats()
    found = everything(engine)
    del engine.turns._steps
    after = engine.stats()
    assert after["steps"] - before["steps"] == after["launches"] - before["launches"]
    return found


def everything(engine):
    """What requests of all kinds get that come at once: tokens, logprobs, alternatives."""
    kinds = (SamplingParams(), SAMPLED, SamplingParams(temperature=0.7, top_k=5, seed=9), SamplingParams(logprobs=1))
    requests = [(tokens, count + 9) for tokens, count in random_requests(8, longest=30)]
    answers = [build.submit(engine, *request, kinds[i % 4]) for i, request in enumerate(requests)]
    for answer in answers:
        answer.wait()
    return [[(o.token, o.finish, o.logprob, o.top) for o in answer.outputs] for answer in answers]


def same(got, want):
    """Whether two results of `everything` are equal, apart from roundings."""
    for one, other in zip(got, want, strict=True):
        assert [o[:2] for o in one] == [o[:2] for o in other]
        for (*_, logprob, top), (*_, wanted, likeliest) in zip(one, other, strict=True):
            assert logprob == pytest.approx(wanted, abs=1e-4)
            assert [i for i, _ in top] == [i for i, _ in likeliest]
            assert [p for _, p in top] == pytest.approx([p for _, p in likeliest], abs=1e-4)
    return True


def sound(engine):
    stats = engine.stats()
    assert stats["pages_used"] == 0 and not engine.scheduler.running and len(engine.scheduler.lanes) == 4
    return stats


def test_equals_single_steps(engine, plain):
    before = engine.stats()
    assert same(everything(engine), plain)
    after = sound(engine)
    steps, launches = (after[key] - before[key] for key in ("steps", "launches"))
    assert launches < steps / 1.5


def test_greedy_equals_the_oracle(engine, folder):
    requests = random_requests()
    assert build.run(engine, requests) == [oracle.greedy(folder, None, *request) for request in requests]


def test_preempted_equals_single_steps(folder, patched, plain):
    with build.engine(folder, cache_max_entry_count=15, session_len=56) as engine:
        assert same(everything(engine), plain)
        stats = sound(engine)
        assert stats["preemptions"] and stats["launches"] < stats["steps"]


def test_split_over_devices_equals_one(folder, patched, plain):
    """What a burst leaves of the state lies as the next program takes it, the counts of tokens too."""
    with build.engine(folder, tp=2) as split:
        assert same(everything(split), plain)
        for key, program in split.runner.programs.items():
            if key[0] == "step":
                state, _ = program.output_shardings
                where = jax.tree.map(
                    lambda array, of: of.is_equivalent_to(array.sharding, array.ndim), split.runner.state, state
                )
                assert all(jax.tree.leaves(where))


def test_stops_within_a_burst(engine):
    tokens = [7, 8, 9]
    (free,) = build.run(engine, [(tokens, 30)], SAMPLED)
    for at in (3, 4, 5, 6, 7):
        stop = free[at]
        cut = free[: free.index(stop, SAMPLED.min_new_tokens) + 1]
        answer = build.submit(engine, tokens, 30, dataclasses.replace(SAMPLED, min_new_tokens=0), stop_ids={stop})
        assert answer.wait() == cut[: cut.index(stop) + 1] and answer.finish == "stop"
    for count in range(1, 10):
        answer = build.submit(engine, tokens, count, SAMPLED)
        assert answer.wait() == free[:count] and answer.finish == "length"
    answer = build.submit(engine, [5] * 94, 50)
    assert len(answer.wait()) == 6 and answer.finish == "length"  # session_len is 100
    sound(engine)


def test_siblings_and_their_order(engine):
    prompt = list(range(40, 75))
    params = [dataclasses.replace(SAMPLED, seed=seed) for seed in range(4)]
    alone = [build.run(engine, [(prompt, 11)], p)[0] for p in params]
    answers = [build.submit(engine, prompt, 11, p, group="one") for p in params]
    assert [answer.wait() for answer in answers] == alone
    sound(engine)


def test_those_who_come_later_and_those_who_leave(engine):
    draw = random.Random(5)
    requests = random_requests(20, seed=5, longest=30)
    alone = [build.run(engine, [request])[0] for request in requests]
    answers = []
    for request in requests:
        answers.append(build.submit(engine, *request))
        leaving = build.submit(engine, [draw.randrange(build.VOCAB)] * 5, 60)
        leaving.outputs.append(leaving.get(timeout=60))
        engine.abort(leaving.request)
        leaving.wait()
        assert leaving.finish == "abort"
    assert [answer.wait() for answer in answers] == alone
    sound(engine)


def test_guided_answers_have_single_steps(engine):
    free = build.run(engine, [([5, 6, 7], 20)])[0]
    other = build.submit(engine, [5, 6, 7], 20)
    guided = build.submit(engine, [1, 2, 3], 20, grammar=regex("[a-c]{5}"), stop_ids=STOP)
    assert set(build.text(guided.wait()[:5])) <= set("abc") and guided.finish == "stop"
    assert other.wait() == free
    sound(engine)


@pytest.mark.parametrize("nth", [2, 4])
@pytest.mark.parametrize("fault", ["not started", "not read", "lost"])
def test_a_burst_that_fails_is_done_again(engine, plain, fault, nth, monkeypatch):
    def unreadable(real, *args):
        step = real(*args)
        step.read = partial(before("no answer"), None)
        return step

    def lose(real, *args):
        real(*args)
        engine.runner.state.cache.k.delete()
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(engine.runner, "dispatch", engine.runner.dispatch)  # taken back at the end
    wrong = {"not started": before("not now"), "not read": unreadable, "lost": lose}[fault]
    failed = engine.stats()["failed_steps"]
    once = Once(engine.runner, "dispatch", wrong, nth)
    assert same(everything(engine), plain)
    assert engine.stats()["failed_steps"] == failed + 1 and once.calls > nth
    sound(engine)


def test_an_outbox_that_raises_ends_its_request_only(engine, plain):
    class Broken(build.Answer):
        def put(self, output):
            super().put(output)
            if self.qsize() == 3:
                raise ValueError("full")

    request = build.Request([5, 6], 40)
    answer = Broken(request)
    engine.submit(request)
    assert same(everything(engine), plain)
    assert answer.qsize() == 3 and request.finish == "error"
    sound(engine)


def test_scoring_and_bursts(engine):
    want = engine.score([4] * 60)
    (free,) = build.run(engine, [([3, 4], 40)])
    answer = build.submit(engine, [3, 4], 40)
    for _ in range(3):
        np.testing.assert_array_equal(engine.score([4] * 60), want)
    assert answer.wait() == free


def test_what_is_no_number_ends_the_answer_there(engine, monkeypatch):
    params = engine.runner.params
    monkeypatch.setattr(engine.runner, "params", params.replace(embed=params.embed.at[42].set(np.nan)))
    forced = SamplingParams(logit_bias=((42, 1e6),))
    answers = [build.submit(engine, [1, i, 3], 9, params) for i, params in ((5, SamplingParams()), (6, forced))]
    assert [len(answer.wait()) for answer in answers] == [9, 1]
    assert "NaN" in answers[1].outputs[-1].error and sound(engine)["corrupted"] == 1


def test_bursts_that_last_are_left_for_a_while(engine, plain, monkeypatch):
    monkeypatch.setattr(turns, "LONG", 0.0)
    before = engine.stats()
    assert same(everything(engine), plain)
    after = engine.stats()
    assert after["steps"] - before["steps"] <= after["launches"] - before["launches"] + 2 * (STEPS - 1)
    engine.turns._single = 0
