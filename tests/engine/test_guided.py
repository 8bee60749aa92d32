"""Guided decoding against masks computed naively, and with all that may happen to a request."""

import itertools
import json
import random
import re
import threading

import jax
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

from jaxserve.engine import gate as gates
from jaxserve.engine import matchers, turns
from jaxserve.engine.guide import Guide
from jaxserve.engine.request import Request, SamplingParams
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build
from tests.engine.test_engine import compiled, random_requests  # noqa: F401

REGEX = r"(yes|no|yet)(, (very|not) (much|little))?( [0-9]{2})?"
LANGUAGE = {
    a + b + c
    for a in ("yes", "no", "yet")
    for b in ("", *(f", {x} {y}" for x in ("very", "not") for y in ("much", "little")))
    for c in ("", *(f" {i:02}" for i in range(100)))
}
STARTS = {word[:i] for word in LANGUAGE for i in range(len(word) + 1)}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "n": {"type": "integer", "minimum": -50, "maximum": 99},
        "ok": {"type": "boolean"},
        "list": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "n", "ok", "list"],
    "additionalProperties": False,
}
STOP = frozenset([build.EOS])


def regex(pattern=REGEX):
    return LLMatcher.grammar_from_regex(pattern)


def schema(value=SCHEMA):
    return LLMatcher.grammar_from_json_schema(value, overrides={"whitespace_flexible": False})


def naive(folder, prompt, count):
    """Greedy tokens within LANGUAGE, and whether the answer is complete: every token is tried."""
    weights, config = oracle.load(folder)
    tokens = list(prompt)
    for _ in range(count):
        so_far = build.text(tokens[len(prompt) :])
        can_end = so_far in LANGUAGE
        allowed = [t for t in range(build.VOCAB) if t != build.EOS and so_far + build.text([t]) in STARTS]
        if not allowed:
            return tokens[len(prompt) :], "stop"
        logits = oracle.logits(weights, config, tokens, rope_len=len(prompt))[-1]
        allowed += [build.EOS] * can_end
        tokens.append(max(allowed, key=lambda t: logits[t]))
        if tokens[-1] == build.EOS:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, build.HF)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with build.engine(folder, guide=build.table) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(folder):
    return [(prompt, *naive(folder, prompt, 20)) for prompt, _ in random_requests(7, seed=5, longest=24)]


@pytest.fixture(scope="module")
def free(engine):
    """Requests without a grammar, and their tokens alone."""
    requests, params = random_requests(6, seed=6), SamplingParams(temperature=0.9, presence_penalty=0.4, seed=3)
    return [(r, p, build.run(engine, [r], p)[0]) for r, p in zip(requests, itertools.cycle([params, build.GREEDY]))]


def check(engine, expected, free=()):
    """Guided requests and free ones, all at once."""
    guided = [build.submit(engine, prompt, 20, stop_ids=STOP, grammar=regex()) for prompt, *_ in expected]
    others = [build.submit(engine, *request, params) for request, params, _ in free]
    for answer, (_, tokens, finish) in zip(guided, expected, strict=True):
        assert answer.wait() == tokens and answer.finish == finish
    assert [answer.wait() for answer in others] == [tokens for *_, tokens in free]
    assert engine.stats()["pages_used"] == 0


def test_equals_the_naive_way(engine, expected):
    assert {finish for *_, finish in expected} == {"stop"} and len({len(t) for _, t, _ in expected}) > 1
    for one in expected:
        check(engine, [one])
    check(engine, expected)


def test_beside_free_requests(engine, expected, free, compiled):  # noqa: F811
    check(engine, expected, free)
    assert compiled == []


@pytest.mark.parametrize("gpu", [False, True])
def test_two_steps_ahead_and_preempted(folder, expected, free, gpu, monkeypatch):
    if gpu:
        build.like_a_gpu(monkeypatch)
    with build.engine(folder, guide=build.table, cache_max_entry_count=15, session_len=56) as engine:
        engine.turns.ahead = 2
        check(engine, expected, free)
        assert engine.stats()["preemptions"] > 0


def test_steps_that_wait_for_their_masks(folder, expected, free, monkeypatch):
    build.waits(monkeypatch)
    monkeypatch.setattr(gates, "PATIENCE", 5.0)
    with build.engine(folder, guide=build.table, cache_max_entry_count=15, session_len=56) as engine:
        engine.turns.ahead, launched, call = 2, set(), engine.runner._call
        monkeypatch.setattr(engine.runner, "_call", lambda key, *rest: launched.add(key[:2]) or call(key, *rest))
        monkeypatch.setattr(turns, "SHORT", 0)  # no step is so short that a free one would have two ahead of it
        ahead, dispatch, pending = [], engine.runner.dispatch, engine.turns.pending

        def counted(packed, *ticket):
            ahead.append(sum(step.masks is not None for step in pending))
            return dispatch(packed, *ticket)

        monkeypatch.setattr(engine.runner, "dispatch", counted)
        check(engine, expected, free)
        assert engine.stats()["preemptions"] > 0
        assert max(ahead) == 2
        assert {shape.tokens == shape.rows for name, shape in launched if name == "sampled"} == {True}  # one launch
        assert {shape.tokens == shape.rows for name, shape in launched if name == "advance"} == {False}
        test_ends(engine)
        test_aborted(engine)


def test_lanes_change_hands(engine):
    """Penalties are counted in tables of the lane, which the next request may get while a step is half done."""
    params = SamplingParams(temperature=1.5, frequency_penalty=1.0, seed=1)
    guided = [
        build.submit(engine, [i + 1] * 5, 30, params, stop_ids=STOP, grammar=regex("[a-f]{3,}")) for i in range(4)
    ]
    free = [build.submit(engine, [i + 1] * 5, 30 + i, params) for i in range(4)]
    for answer in guided + free:
        answer.wait()
    assert {answer.finish for answer in guided} == {"stop"} and {answer.finish for answer in free} == {"length"}
    counts = np.asarray(engine.runner.state.tables.output_count)
    for lane, (request, _) in enumerate(engine.runner.seats.taken):
        assert request in [answer.request for answer in free]
        assert np.bincount(request.output, minlength=build.VOCAB).tolist() == counts[lane].tolist()


def test_tensor_parallel(folder, engine, expected, free):
    with build.engine(folder, guide=build.table, tp=2) as split:  # the vocabulary is padded to 98
        check(split, expected, free)
        for want in ("logits", "alternatives", "last"):
            for found, other in zip(split.score([5, 6, 7], want), engine.score([5, 6, 7], want)):
                np.testing.assert_allclose(found, other, atol=1e-4)


def test_always_matches_its_schema(engine):
    answers = [
        build.submit(
            engine,
            [i + 1, 5],
            90,
            SamplingParams(temperature=2.0, seed=i),
            stop_ids=STOP,
            grammar=schema(),
            group=i // 4,
        )
        for i in range(16)
    ]
    names = set()
    for answer in answers:
        tokens = answer.wait()
        assert answer.finish == "stop", answer.outputs[-1]
        found = json.loads(build.text(t for t in tokens if t != build.EOS))
        assert list(found) == ["name", "n", "ok", "list"]
        assert len(found["name"]) <= 6 and -50 <= found["n"] <= 99 and found["ok"] in (True, False)
        assert len(found["list"]) <= 3 and set(found["list"]) <= {"a", "bc"}
        names.add(found["name"])
    assert len(names) > 4


def test_with_the_other_knobs(engine):
    bias = SamplingParams(logit_bias=((build.BYTES.index(b"n"), 100.0), (build.BYTES.index(b"Z"), 100.0)))
    answer = build.submit(engine, [9, 8], 20, bias, stop_ids=STOP, grammar=regex("(yes|no|yet)Z?"))
    assert build.text(t for t in answer.wait() if t != build.EOS) == "noZ"
    words = SamplingParams(bad_words=((build.BYTES.index(b"n"),), tuple(build.BYTES.index(c) for c in (b"e", b"t"))))
    answer = build.submit(engine, [9, 8], 20, words, stop_ids=STOP, grammar=regex("(yes|no|yet)"))
    assert build.text(answer.wait()) == "yes" and answer.finish == "stop"
    least = SamplingParams(min_new_tokens=7, temperature=1.0, logprobs=3)
    for seed in range(4):
        answer = build.submit(engine, [9, seed], 30, least, stop_ids=STOP, grammar=regex("[ab]+"))
        assert len(answer.wait()) > 7
    repeated = SamplingParams(frequency_penalty=2.0, presence_penalty=2.0)
    answer = build.submit(engine, [9, 8], 26, repeated, stop_ids=STOP, grammar=regex("[a-z]{26}"))
    assert len(set(answer.wait())) > 20


def test_logprobs_are_the_models_own(engine, folder):
    answer = build.submit(engine, [7, 8, 9], 20, SamplingParams(logprobs=2), stop_ids=STOP, grammar=regex())
    tokens = answer.wait()
    logits = oracle.logits(folder, None, [7, 8, 9, *tokens])[2:-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = [output for output in answer.outputs if output.token is not None]
    assert [o.logprob for o in found] == pytest.approx([row[t] for row, t in zip(logprobs, tokens)], abs=1e-4)
    assert [o.top[0][0] for o in found] == logprobs.argmax(-1).tolist()


def test_ends(engine):
    never = build.submit(engine, [3, 4], 12, grammar=regex("[a-z]+"))  # no stop ids: the end is not allowed
    assert len(never.wait()) == 12 and never.finish == "length" and build.text(never.wait()).islower()
    only = build.submit(engine, [3, 4], 12, grammar=regex("ab"))
    assert build.text(only.wait()) == "ab" and only.finish == "stop"
    empty = build.submit(engine, [3, 4], 12, grammar=regex(""))
    assert empty.wait() == [] and empty.finish == "stop"
    own = frozenset([build.BYTES.index(b"c")])  # a stop id in the middle of what the grammar allows
    early = build.submit(engine, [3, 4], 12, SamplingParams(), stop_ids=own, grammar=regex("abcd"))
    assert build.text(early.wait()) == "abc" and early.finish == "stop"
    other = frozenset([build.BYTES.index(b"#")])  # a stop id that the grammar does not know
    params = SamplingParams(logit_bias=((build.BYTES.index(b"#"), 100.0),))
    ended = build.submit(engine, [3, 4], 12, params, stop_ids=other, grammar=regex("[ab]+"))
    assert build.text(ended.wait())[1:] == "#" and ended.finish == "stop"


def test_a_grammar_that_allows_nothing_fails_its_row_only(engine, expected, free):
    stuck = build.submit(engine, [3], 9, stop_ids=STOP, grammar=regex(r"[^\x00-\U0010FFFF]"))
    banned = SamplingParams(bad_words=((build.BYTES.index(b"a"),),))
    excluded = build.submit(engine, [3], 9, banned, stop_ids=STOP, grammar=regex("ba"))
    check(engine, expected[:3], free[:2])
    for answer, why in ((stuck, "cannot follow its grammar"), (excluded, "no token was left")):
        answer.wait()
        assert answer.finish == "error" and why in answer.outputs[-1].error
    assert engine.stats()["corrupted"] == 0


def test_a_matcher_that_fails_fails_its_row_only(engine, expected, monkeypatch):
    consumed = itertools.count()

    class Broken:
        def __init__(self, matcher):
            self.matcher = matcher

        def consume_token(self, token):
            return next(consumed) < 2 and self.matcher.consume_token(token)

        def is_error(self):
            return next(consumed) > 2

        def get_error(self):
            return "too complex\n<state> secrets"

        def __getattr__(self, name):
            return getattr(self.matcher, name)

    answer = build.submit(engine, [1] * 14, 12, stop_ids=STOP, grammar=regex("[xyz]{9}"))
    answer.request.matcher.matcher = Broken(answer.request.matcher.matcher)  # no llguidance matcher: filling raises
    answer.request.matcher.alone = True
    check(engine, expected[:3])
    answer.wait()
    assert answer.finish == "error" and "secrets" not in answer.outputs[-1].error


def test_refusals(engine, folder):
    with pytest.raises(ValueError, match="the grammar does not work"):
        build.submit(engine, [1], 3, grammar=regex("(a"))
    with pytest.raises(ValueError, match="the grammar does not work"):
        build.submit(engine, [1], 3, grammar="{")
    with build.engine(folder) as plain, pytest.raises(ValueError, match="without guided"):
        build.submit(plain, [1], 3, grammar=regex())


def test_aborted(engine):
    answers = [build.submit(engine, [i], 90, stop_ids=STOP, grammar=regex("[a-z]{80}")) for i in range(6)]
    answers[1].get(timeout=60)
    for answer in answers:
        engine.abort(answer.request)
    for answer in answers:
        answer.wait()
        assert answer.finish == "abort"
    assert engine.stats()["pages_used"] == 0


# The guide alone


def request(grammar, stop_ids=STOP, made=None):
    made = Request([1, 2], 99, stop_ids=stop_ids, grammar=grammar)
    return made


def ids(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def shown(mask):
    """What a mask allows; $ is the end."""
    return "all" if (mask == -1).all() else "".join(sorted(build.text([i]) or "$" for i in ids(mask)))


def follow(guide, one, text=""):
    one.tokens += [build.BYTES.index(c.encode()) for c in text]
    masks, ended = guide.allow([(1, one)], 3)
    assert (masks[[0, 2]] == -1).all()
    return shown(masks[1]), ended


@pytest.mark.parametrize("vocab", [97, 64, 300])
def test_masks(vocab):
    guide, one = Guide(build.table(), vocab), request(regex("ab[bc]*|a1"))
    one.matcher = guide.open(one)
    if vocab == 64:  # a model with fewer embeddings than the tokenizer has tokens
        assert follow(guide, one)[0] == ""  # "a" is beyond them
        return
    assert follow(guide, one) == ("a", [])
    assert follow(guide, one, "a") == ("1b", [])
    assert follow(guide, one, "bb") == ("$bc", [])
    twin = request(regex("ab[bc]*|a1"))
    twin.matcher = guide.open(twin)
    twin.tokens += [build.BYTES.index(b"a"), build.BYTES.index(b"1")]
    masks, ended = guide.allow([(0, one), (2, twin)], 3)
    assert ended == [(twin, "")] and (masks[[1, 2]] == -1).all() and len(ids(masks[0])) == 3


def lexers(guide):
    """How many there are of each grammar."""
    return {json.loads(g)["grammars"][0]["lark_grammar"]: len(found) for g, found in guide.sources.of.items()}


def test_answers_that_run_at_once_have_lexers_of_their_own(monkeypatch):
    guide = Guide(build.table, 97)
    first = [request(regex("[ab]+")) for _ in range(3)]
    for one in first:
        one.matcher = guide.open(one)
    assert lexers(guide) == {"start: /[ab]+/": 3} and len({one.matcher.source for one in first}) == 3
    first[0].finish, first[1] = "stop", None  # ended, and gone
    again = [request(regex("[ab]+")) for _ in range(3)]
    for one in again:
        one.matcher = guide.open(one)
        assert follow(guide, one, "ab") == ("$ab", [])
    assert lexers(guide) == {"start: /[ab]+/": 4} and len({one.matcher.source for one in [first[2], *again]}) == 4
    monkeypatch.setattr(matchers, "MANY", 4)
    last = request(regex("[ab]+"))
    last.matcher = guide.open(last)
    assert lexers(guide) == {"start: /[ab]+/": 4} and follow(guide, last, "b") == ("$ab", [])


def test_lexers_are_worn_out(monkeypatch):
    monkeypatch.setattr(matchers, "WORN", 5)
    guide, used = Guide(build.table, 97), []
    for _ in range(5):
        one = request(regex("[ab]+"))
        one.matcher = guide.open(one)
        used.append(one.matcher.source)
        assert follow(guide, one, "abb") == ("$ab", []) and lexers(guide) == {"start: /[ab]+/": 1}
        one.finish = "stop"
    assert [used[0] is source for source in used[1:4]] == [True, False, False] and used[2] is used[3] is not used[4]


def test_dear_grammars_are_compiled_a_few_times(monkeypatch):
    monkeypatch.setattr(matchers, "DEAR", 0)
    monkeypatch.setattr(matchers, "FEW", 2)
    monkeypatch.setattr(matchers, "KEPT", 3)
    guide, running = Guide(build.table, 97), []
    for pattern in ("ab", "cd", "ab", "ab", "ef", "ab", "ab"):
        one = request(regex(pattern))
        running.append(one)
        one.matcher = guide.open(one)
        assert follow(guide, one) == (pattern[0], [])
        assert follow(guide, one, pattern[0]) == (pattern[1], [])
    assert lexers(guide) == {"start: /ef/": 1, "start: /ab/": 2}
    monkeypatch.setattr(matchers, "KEPT_BYTES", 10)
    guide.open(request(regex("gh")))
    assert not guide.sources.of


def test_a_lexer_that_others_have_filled_is_given_up(monkeypatch):
    limits = LLParserLimits(max_lexer_states=60, verbose_errors=False)
    monkeypatch.setattr(matchers, "LIMITS", limits)
    guide, pattern, draw = Guide(build.table, 97), "[ab]*a[ab]{6}c", random.Random(1)
    failed, renewed = 0, 0
    for _ in range(40):
        one = request(regex(pattern))
        one.matcher = guide.open(one)
        masks, ended = guide.allow([(0, one)], 1)
        for _ in range(9):
            if ended:
                break
            one.tokens.append(build.BYTES.index(draw.choice([b"a", b"b"])))
            masks, ended = guide.allow([(0, one)], 1)
            assert ended or set(ids(masks[0])) >= {build.BYTES.index(b"a"), build.BYTES.index(b"b")}
        one.finish = "stop"
        renewed += one.matcher.alone
        failed += bool(ended)
        if ended:  # as it would have alone
            assert "lexer" in ended[0][1].lower() or "state" in ended[0][1].lower()
    assert renewed and failed < 40


class Gate:
    """Of one step, in the host's memory; tells who comes through it."""

    def __init__(self, rows, words):
        self.masks, self.bound, self.opened = np.zeros((rows, words), np.int32), np.ones(rows, np.int32), {}

    def next(self):
        self.opened[number := len(self.opened)] = threading.Event()
        return number, str(number)

    def open(self, number):
        assert all(self.opened[before].is_set() for before in range(number))
        self.opened[number].set()

    def found(self, job):
        assert self.opened[job.number].wait(60)
        return [shown(mask) for mask in np.where(self.bound[:, None], self.masks, -1)], job.ended


class Step:
    """A step in flight."""

    def __init__(self, drawn):
        self.drawn, self.done = drawn, threading.Event()

    def drew(self):
        assert self.done.wait(60)
        return self.drawn


def steps(*drawn):
    """Steps that are done."""
    made = [Step(each) for each in drawn]
    for step in made:
        step.done.set()
    return made


def test_masks_of_steps_that_wait_for_them():
    guide, gate = Guide(build.table, 97), Gate(6, 4)
    some = [request(regex("ab[bc]*|a1")) for _ in range(5)]
    for one in some:
        one.matcher = guide.open(one)
    a, b, one, end = (build.BYTES.index(c) for c in (b"a", b"b", b"1", b""))
    some[3].tokens.append(a)  # known, and not followed yet
    rows, step = [(4 - i, each) for i, each in enumerate(some)], Step({some[0]: a, some[1]: -1, some[3]: one})
    job = guide.start(rows, [step], gate)
    assert job.ticket == "0" and not gate.opened[0].wait(0.05)
    step.done.set()
    masks, ended = gate.found(job)
    assert ended == [(some[3], "")] and masks == ["a", "all", "a", "all", "1b", "all"]
    # The token comes, or is lost with its step, or another one comes.
    for given, expected in (([a], "1b"), ([], "a"), ([a, one], "")):
        some[0].tokens[2:] = given
        masks, ended = guide.allow([(0, some[0])], 1)
        if expected:
            assert not ended and shown(masks[0]) == expected
        else:
            assert ended == [(some[0], "")]
    # Two steps wait: a token that was followed, one that was not, and one that ends its request.
    others = [request(regex("ab[bc]*|a1")) for _ in range(4)]
    for each in others:
        each.matcher = guide.open(each)
    rows, first = list(enumerate(others)), Step(dict(zip(others, [a, a, end])))
    second = Step({others[0]: b, others[1]: one, others[3]: a})
    jobs = [guide.start(rows, [first], gate), guide.start(rows, [first, second], gate)]
    first.done.set()
    assert gate.found(jobs[0]) == (["1b", "1b", "all", "a", "all", "all"], [])
    assert not gate.opened[jobs[1].number].is_set()
    second.done.set()
    assert gate.found(jobs[1]) == (["$bc", "all", "all", "1b", "all", "all"], [(others[1], "")])
    # What has ended stays so, whatever its free row draws, as long as it is not told otherwise.
    job = guide.start(rows[1:2], [first, second, *steps({others[1]: b})], gate)
    assert gate.found(job) == (["all"] * 6, [(others[1], "")])
    others[1].tokens += [a, b]
    assert follow(guide, others[1]) == ("$bc", []) and others[1].matcher.alone
    # Two tokens were followed, others have come.
    job = guide.start(rows[:1], steps({others[0]: a}, {others[0]: one}), gate)
    assert gate.found(job) == (["all"] * 6, [(others[0], "")])
    others[3].tokens += [a, b, b]
    assert follow(guide, others[3])[0] == "$bc" and not others[3].matcher.alone
    some[2].finish = "abort"
    assert gate.found(guide.start([(0, some[2])], [], gate)) == (["all"] * 6, [])
    guide.close()
    guide._thread.join(60)
    assert not guide._thread.is_alive()


def test_the_gate_opens_whatever_happens(monkeypatch):
    guide, gate = Guide(build.table, 97), Gate(2, 4)
    some = [request(regex("[ab]+")) for _ in range(2)]
    for one in some:
        one.matcher = guide.open(one)
    rows = list(enumerate(some))

    class Lost:
        def drew(self):
            raise RuntimeError("the device is gone")

    masks, ended = gate.found(guide.start(rows, [Lost()], gate))
    assert masks == ["all", "all"]
    assert set(ended) == {(one, "no mask could be made: the device is gone") for one in some}
    good, some[0].matcher.matcher = some[0].matcher.matcher, None
    masks, ended = gate.found(guide.start(rows, [], gate))
    assert masks == ["all", "ab"] and [who for who, _ in ended] == some[:1]
    some[0].matcher.matcher, some[0].matcher.over = good, None
    with monkeypatch.context() as broken:
        broken.setattr(guide, "_fill", lambda *_: 1 / 0)
        masks, ended = gate.found(guide.start(rows, [], gate))
    assert masks == ["all", "all"] and set(ended) == {(one, "no mask could be made: division by zero") for one in some}
    assert gate.found(guide.start(rows, [], gate)) == (["ab", "ab"], [])  # the next goes on
    guide.close()


def test_masks_that_are_waited_for_are_those_of_allow():
    guide, draw, patterns = Guide(build.table, 97), random.Random(3), ["[a-z]{1,9}=(yes|no)", "(ab|ba)+c", "[0-9]{3}-x"]
    gate, many = Gate(21, 4), [request(regex(patterns[i % 3])) for i in range(21)]
    for one in many:
        one.matcher = guide.open(one)
    rows, drawn, at = list(enumerate(many)), {}, 0
    while rows:
        masks, ended = gate.found(guide.start(rows, steps(drawn), gate))
        for one, token in drawn.items():
            one.tokens.append(token)
        twins = [(row, request(one.grammar)) for row, one in rows]
        for (_, one), (_, twin) in zip(rows, twins, strict=True):
            twin.matcher, twin.tokens[2:] = guide.open(twin), one.output
        expected, over = guide.allow(twins, 21)
        assert masks == [shown(mask) for mask in expected] and len(ended) == len(over)
        ended = {one for one, _ in ended}
        rows = [(row, one) for row, one in rows if one not in ended]
        drawn, at = {one: draw.choice(ids(gate.masks[row])) for row, one in rows}, at + 1
        rows = [(row, one) for row, one in rows if drawn[one] != build.EOS]
        drawn = {one: token for one, token in drawn.items() if token != build.EOS}
    for one in many:
        assert any(re.fullmatch(pattern, build.text(one.output)) for pattern in patterns)
    guide.close()


def test_forced_texts():
    """What a grammar leaves no choice about, and what is lost with its step in the midst of it."""
    guide, one = Guide(build.table, 97), request(regex("(a|bcde)fg+"))
    one.matcher = guide.open(one)
    assert follow(guide, one)[0] == "ab"
    for typed, expected in ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f"), ("f", "g"), ("", "g"), ("g", "$g"):
        assert follow(guide, one, typed) == (expected, [])
    other = request(regex("(a|bcde)fg+"))
    other.matcher = guide.open(other)
    assert follow(guide, other, "bc")[0] == "d"
    gate = Gate(3, 4)
    gate.found(guide.start([(1, other)], steps({other: build.BYTES.index(b"d")}), gate))
    assert other.matcher.followed == [build.BYTES.index(c) for c in (b"b", b"c", b"d")]
    assert follow(guide, other, "d") == ("e", []) and not other.matcher.alone
    gate.found(guide.start([(1, other)], steps({other: build.BYTES.index(b"e")}), gate))
    assert follow(guide, other)[0] == "e" and other.matcher.alone
    _, ended = follow(guide, other, "x")
    assert ended and ended[0][0] is other and ended[0][1]


def test_random_walks_through_a_regex():
    guide, pattern, draw = Guide(build.table, 97), r"-?(0|[1-9]\d{0,4})(\.\d{1,3})?(e[+-]?\d\d)?", random.Random(1)
    for _ in range(30):
        one = request(regex(pattern))
        one.matcher = guide.open(one)
        while True:
            masks, ended = guide.allow([(0, one)], 1)
            token = None if ended else draw.choice(ids(masks[0]))
            if token in (None, build.EOS):
                break
            one.tokens.append(token)
        assert re.fullmatch(pattern, build.text(one.output)) and not (ended and ended[0][1])


def test_the_engine_of_the_cpu_has_no_programs_of_its_own_for_it(engine, folder):
    with build.engine(folder) as plain:
        assert plain.runner.programs.keys() == engine.runner.programs.keys()
    assert not any(jax.tree.leaves(engine.runner.state.newest.is_deleted()))
