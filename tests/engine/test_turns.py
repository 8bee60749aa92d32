"""Whole turns against a device that only remembers what was written where: random requests, aborts and faults.

Everything of the host is real: turns, scheduler, pages, scoring, recovery, and the words that `Runner.pack` makes,
which are all that the device knows of a plan.  A slot holds a number that stands for its token and for all before it,
so that a wrong page, a stale table or a token too many shows in an answer.
"""

import dataclasses
import logging
import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from jaxserve.engine import recovery
from jaxserve.engine import turns as engine_turns
from jaxserve.engine.launch import InFlight
from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.runner import Runner
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.scoring import Job, Scorer
from jaxserve.engine.seats import Seats
from jaxserve.engine.sizes import Sizes, bucket
from jaxserve.engine.turns import Turns
from jaxserve.sampling import Sampling
from jaxserve.step import LANE, NO_LANE, ROW
from tests.engine import test_pages

VOCAB = 5  # few tokens, so that prefixes meet
SEED, STEP, TABLES = (len(ROW) + Sampling.STEP + i for i in (-1, 0, 1))  # words of a row
FAULTS = "RESOURCE_EXHAUSTED", "boom"
BEFORE = zlib.crc32(b"")  # what stands before the first token


def mixed(*parts):
    return zlib.crc32(repr(parts).encode())


def drawn(value, seed, step, tables):
    """The token after what a slot stands for; now and then -1: the device found no number."""
    found = mixed(value, seed, step if seed else 0, tables)
    return -1 if found % 389 == 0 else (found >> 4) % VOCAB


class Transferred(np.ndarray):
    """An array that comes from the device, or, where it is `lost`, does not."""

    lost = False

    def copy_to_host_async(self):
        pass

    def __array__(self, *args, **kwargs):
        if self.lost:
            raise RuntimeError("unreadable")
        return super().__array__(*args, **kwargs)


def transferred(array, lost=False):
    out = np.asarray(array).view(Transferred)
    out.lost = lost
    return out


class Remembering(Runner):
    """A runner whose programs are written out in Python; with a chance of `faults` they fail, before or after."""

    def __init__(self, plan, sizes, draw, faults):
        self.plan, self.sizes, self.random, self.faults = plan, sizes, draw, faults
        self.on_cpu = draw.random() < 0.6
        self.cfg, self.costs, self.programs = SimpleNamespace(vocab=VOCAB), plan.costs, {}
        self.gate, self.scores_only, self.one_at_a_time = None, False, False
        self.vocab, self.mask_words = 32, 1
        self.seats = Seats(plan.lanes, sizes.pages[-1], self.vocab, plan.session_len)
        self.reset()

    def reset(self):
        self.state, self.lost = SimpleNamespace(), False
        self.slots, self.newest, self.tables = {}, {}, {}
        self.seats.leave()

    @property
    def intact(self):
        return not self.lost

    def _put(self, array):
        return array

    def _call(self, key, state, lane, ids, prompt, length, *_):
        assert key == "seat"
        self.tables[int(lane)] = tuple(ids[prompt:length].tolist()), tuple(sorted(set(ids[:prompt].tolist())))
        return state

    def _fault(self):
        """Raises, or says what goes wrong when the program has run."""
        if self.random.random() < self.faults:
            fault = self.random.choice(FAULTS)
            if self.random.random() < 0.5:
                raise RuntimeError(fault)
            return fault
        return None

    def _end(self, fault):
        if fault:
            self.lost = True
            raise RuntimeError(fault)

    def dispatch(self, packed, ticket=None):
        if not packed.whole:
            return self.draw(self.advance(packed), ticket)
        fault, shape = self._fault(), packed.shape
        self._sit(packed.seats)
        rows, pages, token = self._sections(packed)
        tokens = np.zeros((shape.steps, shape.rows), np.int64)
        for i in range(shape.steps):
            live = [r for r in range(shape.rows) if rows[r][ROW.index("count")] > i]
            for r in live:
                given = int(token[r]) if i == 0 else -1
                self._write(pages[r], int(rows[r][0]) + i, self.newest[rows[r][LANE]] if given < 0 else given)
            for r in live:
                tokens[i, r] = self._draw(rows[r], self._slot(pages[r], int(rows[r][0]) + i), i)
        self._end(fault)
        return self._flight(packed, tokens)

    def advance(self, packed):
        fault, shape, at = self._fault(), packed.shape, 0
        self._sit(packed.seats)
        rows, pages, token = self._sections(packed)
        values = [None] * shape.drawn
        for r in range(shape.rows):
            start, count = int(rows[r][0]), int(rows[r][1])
            first = r if shape.tokens == shape.rows else at
            for j in range(count):
                given = int(token[first + j])
                self._write(pages[r], start + j, self.newest[rows[r][LANE]] if given < 0 else given)
            at += count
        for r in range(shape.rows):  # when all have written: some read what others wrote in this step
            if rows[r][1]:
                values[r] = self._slot(pages[r], int(rows[r][0]) + int(rows[r][1]) - 1)
        self._end(fault)
        return packed, values

    def draw(self, half, allowed):
        (packed, values), fault = half, self._fault()
        rows, _, _ = self._sections(packed)
        tokens = np.zeros((1, packed.shape.drawn), np.int64)
        for r, value in enumerate(values):
            if value is not None:
                tokens[0, r] = self._draw(rows[r], value, 0)
        self._end(fault)
        return self._flight(packed, tokens)

    def score(self, pieces, alternatives=False):
        fault, size = self._fault(), bucket(sum(len(p.tokens) for p in pieces), self.sizes.scored)
        assert len(pieces) <= self.rows_of(size)
        found = []
        for piece in pieces:
            for j, (token, target) in enumerate(zip(piece.tokens, [*piece.targets, None], strict=False)):
                self._write(piece.pages, piece.start + j, token)
                found.append(mixed(self._slot(piece.pages, piece.start + j), target) % 2**20)
        self._end(fault)
        scores = np.array(found + [0] * (size - len(found)), np.float32)
        none = transferred(np.zeros((size, 20)))
        return transferred(scores, self.random.random() < self.faults / 2), none, none, transferred(np.zeros((size, 2)))

    def _sections(self, packed):
        shape, words = packed.shape, packed.words
        pages = words[shape.sections[1] :].reshape(shape.rows, shape.pages)
        return shape.row_words(words), pages, words[: shape.tokens]

    def _slot(self, table, position):
        page = int(table[position // self.plan.page_size])
        assert page > 0, "page 0 holds no tokens"
        return self.slots[page, position % self.plan.page_size]

    def _write(self, table, position, token):
        page, size = int(table[position // self.plan.page_size]), self.plan.page_size
        assert page > 0, "page 0 holds no tokens"
        self.slots[page, position % size] = mixed(self._slot(table, position - 1) if position else BEFORE, token)

    def _draw(self, row, value, i):
        lane, tables = int(row[LANE]), None
        if row[TABLES]:
            tables = self.tables.get(lane)
        token = drawn(value, int(row[SEED]), int(row[STEP]) + i, tables)
        if lane != NO_LANE:
            self.newest[lane] = max(token, 0)
            if tables is not None:
                self.tables[lane] = (*tables[0], max(token, 0)), tables[1]
        return token

    def _flight(self, packed, tokens):
        found = SimpleNamespace(
            tokens=transferred(tokens),
            logprob=transferred(np.zeros(tokens.shape)),
            top_ids=transferred(np.zeros((*tokens.shape, 20), int)),
            top_logprobs=transferred(np.zeros((*tokens.shape, 20))),
        )
        step = InFlight(packed, found)
        if self.random.random() < self.faults / 2:
            step.read = lambda: self._end("unreadable")
        return step


class Guide:
    """Ends a guided request after so many tokens, and allows all until then."""

    def allow(self, rows, count):
        assert all(request.in_flight == 1 and not request.finish for _, request in rows)
        ended = [(request, "") for _, request in rows if len(request.output) >= request.grammar]
        return np.full((count, 1), -1, np.int32), ended


class Box(list):
    """An outbox; one that is broken raises in the end, and gets nothing after that."""

    def __init__(self, broken=None):
        self.broken, self.raised = broken, False

    def put(self, output):
        assert not self.raised and not (self and self[-1].finish), "it had ended"
        self.append(output)
        if len(self) == self.broken:
            self.raised = True
            raise ValueError("the client is gone")


def expected(request):
    """The tokens that a request gets, and how it ends, by a decoder of three lines."""
    value, out = BEFORE, []
    for token in request.tokens[: request.prompt_len]:
        value = mixed(value, token)
    seen = tuple(sorted(set(request.tokens[: request.prompt_len])))
    while len(out) < request.max_new_tokens:
        if request.grammar is not None and len(out) >= request.grammar:
            return out, "stop"
        token = drawn(value, request.params.seed, len(out), (tuple(out), seen) if request.params.tables else None)
        if token < 0:
            return out, "error"
        out.append(token)
        value = mixed(value, token)
        if token in request.stop_ids:
            return out, "stop"
    return out, "length"


class World:
    """An engine without its thread, and the requests and jobs that it was given."""

    def __init__(self, seed):
        self.random = draw = random.Random(seed)
        lanes, size = draw.choice((1, 2, 3, 4, 6)), draw.choice((1, 2, 4, 4, 8))
        pages = max(lanes + 1, draw.choice((3, 8, 12, 24, 60)))
        budget = max(lanes, draw.choice((1, 2, 3, 4, 8, 16, 30)))
        tokens = (pages - 1) * size
        self.plan = SimpleNamespace(
            pages=pages, page_size=size, lanes=lanes, budget=budget, tokens=tokens, weights=10**9, cache=10**9,
            session_len=min(tokens, draw.choice((5, 20, 40, 60))),
        )  # fmt: skip
        sizes = self._sizes()
        self.plan.costs = {n: n * draw.choice((1, 1, 0.2, 3)) + draw.choice((0, 10, 100)) for n in sizes.tokens}
        self.faults = draw.choice((0, 0, 0.01, 0.05))
        self.runner = Remembering(self.plan, sizes, draw, self.faults)
        self.scheduler = Scheduler(
            PagePool(pages, size), lanes, budget, session_len=self.plan.session_len,
            prefix_caching=draw.random() < 0.7, costs=self.plan.costs,
        )  # fmt: skip
        self.scorer = Scorer(self.runner, self.scheduler)
        self.guided, self.broken = draw.random() < 0.4, draw.choice((0, 0, 0.1))
        self.turns = Turns(self.runner, self.scheduler, self.scorer, Guide() if self.guided else None)
        self.turns.ahead = draw.choice((1, 2))
        self.prefixes = [[draw.randrange(VOCAB) for _ in range(self.plan.session_len)] for _ in range(2)]
        self.requests, self.boxes, self.jobs, self.arrivals = [], [], [], 0

    def _sizes(self):
        """As on a GPU, with bursts, or as on a CPU."""
        draw, budget, lanes = self.random, self.plan.budget, self.plan.lanes
        if draw.random() < 0.5:
            sizes = Sizes.choose("gpu", self.plan, draw.choice((1, 2)))
            bursts = tuple((rows, draw.choice((2, 4, 8))) for rows in (1, 2, 4, 8) if rows <= max(2, lanes))
            return dataclasses.replace(sizes, scored=(min(5, budget),), bursts=bursts)
        tokens = tuple(sorted({min(4, budget), min(9, budget), budget}))
        return dataclasses.replace(Sizes.choose("cpu", self.plan), tokens=tokens, scored=tokens[:1])

    def arrive(self):
        """One request, or three that share a prompt."""
        draw, session = self.random, self.plan.session_len
        prompt = draw.choice(self.prefixes)[: draw.randint(1, session)]
        if draw.random() < 0.5:
            prompt = prompt + [draw.randrange(VOCAB) for _ in range(draw.randint(0, 6))]
        elif draw.random() < 0.4 and self.requests:  # a conversation goes on
            prompt = draw.choice(self.requests).tokens[: session + 1]
        count, most, group = draw.choice((1, 1, 1, 3)), draw.choice((0, 1, 2, 5, 20, 50)), self.arrivals
        for _ in range(count):
            seed = draw.choice((0, 0, draw.randrange(1, 1000)))
            params = SamplingParams(
                temperature=1.0 if seed else 0.0, seed=seed, logprobs=draw.choice((None, None, 2)),
                repetition_penalty=draw.choice((1.0, 1.0, 1.1)),
            )  # fmt: skip
            box = Box(draw.randint(1, 6) if draw.random() < self.broken else None)
            request = Request(
                list(prompt), most, params, outbox=box, stop_ids=frozenset(draw.choice(((), (), (0,)))),
                group=group if count > 1 else None, salt=draw.choice((None, None, 3)),
            )  # fmt: skip
            if self.guided and draw.random() < 0.3:
                request.grammar = draw.randint(0, 8)
            self.arrivals += 1
            request.arrival = self.arrivals
            self.requests.append(request)
            self.boxes.append(box)
            recovery.safely(self.scheduler.add, request)

    def happen(self):
        """What comes from outside between two turns."""
        draw = self.random
        for _ in range(draw.choice((0, 0, 1, 2))):
            self.arrive()
        if draw.random() < 0.1:
            length = draw.randint(1, min(self.plan.session_len, self.plan.tokens))
            self.arrivals += 1
            self.jobs.append(job := Job([draw.randrange(VOCAB) for _ in range(length)], "logprobs"))
            job.arrival = self.arrivals
            self.scorer.waiting.append(job)
        if draw.random() < 0.03 and self.jobs:
            draw.choice(self.jobs).done.cancel()
        alive = [*self.scheduler.running, *self.scheduler.waiting]
        if draw.random() < 0.15 and alive:
            recovery.safely(self.scheduler.abort, draw.choice(alive))

    def turn(self):
        try:
            self.turns.turn()
        except RuntimeError as error:
            assert str(error) in (*FAULTS, "unreadable")
            failures = self.turns._failures
            if not self.turns.recover(error):
                assert failures + 1 >= 3, "it gave up early"
                self.turns._failures = 0
                if not self.runner.intact:
                    self.runner.reset()

    def check(self):
        """Pages and lanes have one owner each, nobody was overtaken, and who has ended is nowhere."""
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        test_pages.check(self.scheduler.pool, [page for one in (*running, *self.scorer.active) for page in one.pages])
        lanes = [*self.scheduler.lanes, *(request.lane for request in running)]
        assert sorted(lanes) == list(range(min(self.plan.lanes, self.plan.budget)))
        order = [request.arrival for request in running + waiting]
        assert order == sorted(order)
        assert all(not request.pages and request.lane == -1 for request in waiting)
        live = {*running, *waiting}
        assert all((request in live) != bool(request.finish) for request in self.requests)

    def check_answers(self):
        for request, box in zip(self.requests, self.boxes, strict=True):
            tokens, finish = expected(request)
            assert request.output == tokens[: len(request.output)]
            if box.raised:
                continue
            assert [output.token for output in box if output.token is not None] == request.output
            assert [output.finish for output in box if output.finish] == [request.finish]
            if request.finish in ("stop", "length"):
                assert (request.output, request.finish) == (tokens, finish)
            elif request.finish == "error":
                assert self.faults or (request.output, finish) == (tokens, "error")
        for job in self.jobs:
            assert job.done.done()
            if job.done.cancelled() or (job.done.exception() and self.faults):
                continue
            value, scores = BEFORE, []
            for token, target in zip(job.tokens, job.tokens[1:], strict=False):
                value = mixed(value, token)
                scores.append(mixed(value, target) % 2**20)
            assert job.done.result().tolist() == scores


@pytest.mark.parametrize("hundred", range(4))
def test_random_worlds(hundred, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, "jaxserve")  # of every fault
    monkeypatch.setattr(engine_turns, "LONG", 1e9)  # seconds of a turn that is reported
    for seed in range(100 * hundred, 100 * hundred + 100):
        world = World(seed)
        for _ in range(world.random.randint(5, 120)):
            world.happen()
            world.check()
            world.turn()
        world.runner.faults, turns = 0, 0
        while world.turns.busy:
            world.check()
            world.turn()
            turns += 1
            assert turns < 6000, f"world {seed} never ends"
        world.check()
        world.check_answers()
