"""The scheduler against a device that is only a dictionary of slots, one step behind as in the engine."""

from collections import deque
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine import recovery
from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import Output, Request
from jaxserve.engine.scheduler import Scheduler
from tests.engine.test_pages import check

VOCAB = 3  # few tokens, so that prefixes meet


class Box(list):
    put = list.append


def prefix(request, tokens):
    """What the slots of `tokens` must hold: for each a number that stands for it and all before it."""
    value, values = request.salt or 0, []
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


def draw(request, value):
    """The next token after a prefix: any fixed function will do."""
    return hash((value, int(request.id))) % VOCAB


def oracle(request, prompt, new):
    """Answer and finish of a request that has no cache and shares nothing."""
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(draw(request, prefix(request, tokens)[-1]))
        if tokens[-1] in request.stop_ids:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


class Device:
    """Slots that remember what was written into them, and the newest token of each lane."""

    def __init__(self, size):
        self.size, self.slots, self.newest, self.drawn = size, {}, {}, {}

    def run(self, chunks):
        """All steps of a plan; the tokens that each sampled."""
        return [self.step(chunks, i) for i in range(max(1, *(chunk.emits for chunk in chunks)))]

    def step(self, chunks, i):
        """Writes all positions of the i-th step, then looks at what each row would attend to."""
        rows = []
        for chunk in chunks:
            request, start, stop = chunk.request, chunk.start, chunk.stop
            assert chunk.unknown == (len(request.tokens) <= start)
            if chunk.emits > 1:
                start, stop = start + i, start + i + 1
            if i >= max(1, chunk.emits):
                rows.append(None)
                continue
            tokens = request.tokens[:stop]
            if len(tokens) < stop:
                tokens += self.drawn[request][len(tokens) - stop :]  # what the host has not seen
                assert tokens[-1] == self.newest[request.lane]
            values = prefix(request, tokens)
            places = [(request.pages[at // self.size], at % self.size) for at in range(stop)]
            assert len(values) == stop and (0, 0) not in places
            for at in range(start, stop):
                self.slots[places[at]] = values[at]
            rows.append((places, values))
        for places, values in filter(None, rows):
            assert [self.slots.get(place) for place in places] == values
        sampled = [draw(chunk.request, row[1][-1]) if row else -1 for chunk, row in zip(chunks, rows, strict=True)]
        for chunk, token in zip(chunks, sampled, strict=True):
            if chunk.emits > i:
                self.newest[chunk.request.lane] = token
                self.drawn.setdefault(chunk.request, []).append(token)
        return sampled


class Bench:
    """The engine's loop, one step ahead or more, checking after every turn what must always hold."""

    def __init__(self, pages=32, size=4, lanes=4, budget=16, ahead=1, steps=1, **options):
        self.steps = steps
        self.scheduler = Scheduler(PagePool(pages, size), lanes, budget, **options)
        self.lanes, self.device = lanes, Device(size)
        self.ahead, self.flight = ahead, deque()  # (chunks, tokens of each step) of the plans in flight, oldest first
        self.prompts = {}  # request -> its prompt and the tokens it may get, in the order of arrival
        self.tables = {}  # request -> pages at its last chunk

    def add(self, tokens, new=4, **fields):
        fields.setdefault("id", str(len(self.prompts)))
        request = Request(list(tokens), new, outbox=Box(), **fields)
        self.scheduler.add(request)
        self.prompts[request] = list(tokens), request.max_new_tokens
        return request

    def turn(self):
        chunks = self.scheduler.plan(self.steps)
        self.check_plan(chunks)
        if chunks:
            self.flight.append((chunks, self.device.run(chunks)))
        for _ in range(max(0, len(self.flight) - self.ahead) if chunks else 1):
            self.commit()
        self.check_state()
        return chunks

    def commit(self):
        if self.flight:
            chunks, told = self.flight.popleft()
            for i, tokens in enumerate(told):
                self.scheduler.commit(chunks, tokens, step=i)
                self.check_state()
        self.check_state()

    @property
    def pending(self):
        """The newest step in flight."""
        return self.flight[-1] if self.flight else None

    def restart(self):
        """The step in flight failed, and with it all that was on the device."""
        self.flight, self.device = deque(), Device(self.device.size)
        recovery.restart(self.scheduler, "the step failed", list(self.scheduler.running))
        self.check_state()

    def run(self, most=5000):
        """Turns until nobody is left, and all answers are right."""
        for _ in range(most):
            nothing_in_flight = self.pending is None
            if not self.turn() and nothing_in_flight:
                assert self.scheduler.idle, "nothing in flight, nothing planned, yet not done"
                self.check_answers()
                return self
        raise AssertionError(f"not done after {most} steps: {self.scheduler.stats()}")

    def check_plan(self, chunks):
        assert sum(chunk.stop - chunk.start - max(0, chunk.emits - 1) for chunk in chunks) <= self.scheduler.budget
        assert len({chunk.request.lane for chunk in chunks}) == len(chunks) <= self.lanes
        assert all(chunk.emits <= self.steps for chunk in chunks)
        streams = [chunk.emits and chunk.stop - chunk.start == chunk.emits for chunk in chunks]
        prompts = chunks[(*streams, False).index(False) :]
        for chunk in prompts:
            assert not chunk.unknown, "a stream after a prompt"
        assert not prompts or all(chunk.emits <= 1 for chunk in chunks), "several steps beside a prompt"
        for chunk in chunks:
            request = chunk.request
            assert 0 <= chunk.start < chunk.stop <= request.limit
            assert chunk.stop == request.length - 1 if chunk.emits else chunk.stop < request.length
            assert chunk.grew or request.pages == self.tables[request], "pages changed unsaid"
            self.tables[request] = list(request.pages)

    def check_state(self):
        scheduler = self.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        check(scheduler.pool, [page for request in running for page in request.pages])
        free = min(self.lanes, scheduler.budget) - len(running)
        assert len({*scheduler.lanes, *(request.lane for request in running)}) == free + len(running)
        assert len(scheduler.lanes) == free
        order = {request: i for i, request in enumerate(self.prompts)}
        places = [order[request] for request in running + waiting]
        assert places == sorted(places), "somebody was overtaken"
        for request in running:
            assert not request.finish and (request.computed - 1) // scheduler.pool.size < len(request.pages)
        for request in waiting:
            assert not request.finish and request.lane == -1 and not request.pages and not request.computed
        assert set(self.prompts) - set(running + waiting) == {r for r in self.prompts if r.finish}
        stats = scheduler.stats()
        assert (stats["running"], stats["waiting"]) == (len(running), len(waiting))
        assert stats["pages_used"] + stats["pages_cached"] + stats["pages_free"] == scheduler.pool.count - 1

    def check_answers(self):
        for request, (prompt, new) in self.prompts.items():
            answer, finish = oracle(request, prompt, new)
            box = request.outbox
            assert request.tokens == prompt + request.output
            assert [output.token for output in box if output.token is not None] == request.output
            assert [output.finish for output in box] == [None] * (len(box) - 1) + [request.finish]
            if request.finish in ("stop", "length"):
                assert (request.output, request.finish) == (answer, finish)
            else:
                assert request.output == answer[: len(request.output)] and box[-1].token is None
        assert self.scheduler.stats()["pages_used"] == 0


def spans(chunks):
    return [(chunk.start, chunk.stop, chunk.emits) for chunk in chunks]


def test_a_long_prompt_rides_along_with_streams():
    bench = Bench(budget=8)
    stream = bench.add([0, 1], 9)
    bench.turn()
    long = bench.add([1] * 20, 3)
    assert spans(bench.turn()) == [(2, 3, True), (0, 7, False)]
    assert spans(bench.turn()) == [(3, 4, True), (7, 14, False)]
    assert spans(bench.turn()) == [(4, 5, True), (14, 20, True)]
    chunks = bench.turn()
    assert [chunk.request for chunk in chunks] == [stream, long]
    assert spans(chunks) == [(5, 6, True), (20, 21, True)] and all(chunk.unknown for chunk in chunks)
    bench.run()


def filling(costs, streams, length):
    """Spans of a prompt's chunks where so many streams run already."""
    bench, found = Bench(pages=400, lanes=16, budget=512, costs=costs), []
    for i in range(streams):
        bench.add([i % 3] * 2, 60)
    bench.turn()
    bench.add([1] * length, 3)
    while not found or not found[-1][-1]:
        found.append(spans(bench.turn())[-1])
    bench.run()
    return found


def test_a_prompt_that_closes_a_step_fills_a_size_where_that_is_cheaper():
    even = {128: 128, 256: 256, 512: 512}
    assert filling(even, 1, 130) == [(0, 127, False), (127, 130, True)]  # or 125 tokens of padding
    assert filling(even, 1, 230) == [(0, 230, True)]  # 25 of padding
    assert filling(even, 4, 256) == [(0, 252, False), (252, 256, True)]
    dear = {128: 128, 256: 480, 512: 512}  # a step of 256 takes hardly less than one of 512
    assert filling(dear, 1, 250) == [(0, 127, False), (127, 250, True)]
    cheap = {128: 250, 256: 256, 512: 512}
    assert filling(cheap, 1, 130) == [(0, 130, True)]


def test_a_prompt_is_not_read_a_token_at_a_time():
    """It waits for others once, in a step that has room for a little of it."""
    costs = {8: 8, 128: 1280, 512: 5120}
    assert filling(costs, 7, 50) == [(0, 1, False), (1, 50, True)]
    assert filling(costs, 4, 12) == [(0, 4, False), (4, 8, False), (8, 12, True)]  # a third is no delay


def test_a_prompt_alone_is_not_cut():
    assert filling({128: 128, 256: 256, 512: 512}, 0, 130) == [(0, 130, True)]


def test_prompts_are_admitted_in_order_within_the_budget():
    bench = Bench(budget=10, lanes=4)
    for tokens in ([0] * 4, [1] * 9, [2]):
        bench.add(tokens)
    assert spans(bench.turn()) == [(0, 4, True), (0, 6, False)]
    # nobody starts while another is in the middle of its prompt, then the short one rides along
    assert spans(bench.turn()) == [(4, 5, True), (6, 9, True), (0, 1, True)]
    bench.run()


def test_no_more_rows_than_lanes_or_tokens_in_a_step():
    for lanes, budget in ((2, 16), (16, 2)):
        bench = Bench(lanes=lanes, budget=budget)
        for _ in range(5):
            bench.add([0, 1], 3)
        bench.turn()
        bench.turn()
        assert len(bench.scheduler.running) == 2
        bench.run()
    with pytest.raises(ValueError, match="0 rows"):
        Scheduler(PagePool(4, 4), 0, 16)


def test_the_last_sampled_token_is_never_fed_back():
    bench = Bench(pages=3)  # two pages: positions 0 to 7
    request = bench.add([0] * 4, 5)
    bench.turn()
    while chunks := bench.turn():
        assert chunks[0].stop <= 8
    assert request.finish == "length" and len(request.tokens) == 9


def test_a_request_that_can_never_fit_is_refused():
    bench = Bench(pages=3)
    with pytest.raises(ValueError, match=r"4 prompt tokens and 6 new ones .* holds 9 tokens"):
        bench.add([0] * 4, 6)
    assert bench.scheduler.idle
    bench.add([0] * 4, 5)
    bench.add([0] * 9, 0)  # nothing to compute
    bench.run()
    refused = Request([0] * 9, 1, outbox=Box())
    with pytest.raises(ValueError):
        bench.scheduler.add(refused)
    bench.scheduler.abort(refused)  # comes too late, harms nothing
    assert refused.finish == "error" and not refused.outbox


def test_session_len():
    bench = Bench(pages=4, session_len=8)
    short, long = bench.add([0] * 3, 100), bench.add([0] * 8, 100)
    assert long.finish == "length" and list(long.outbox) == [Output(None, "length")]
    bench.run()
    assert short.finish == "length" and len(short.tokens) == 8


def test_a_stop_token_ends_it_and_the_step_in_flight_is_dropped():
    bench = Bench()
    request = bench.add([0, 1, 2], 50, stop_ids=frozenset([1]))
    answer, _ = oracle(request, [0, 1, 2], 50)
    assert answer[-1] == 1 and len(answer) < 50
    while not request.finish:
        bench.turn()
    assert bench.pending[0][0].request is request  # wasted
    assert bench.scheduler.stats()["pages_used"] == 0
    bench.run()
    assert request.outbox[-1] == Output(1, "stop") and request.output == answer
    assert bench.scheduler.stats()["generated_tokens"] == len(answer)


def preempting(new=9, **options):
    """Two streams; in the fifth plan the older one takes a page from the younger, whose fourth token is in flight."""
    bench = Bench(pages=5, lanes=3, **options)
    old, young = bench.add([0] * 5, 7), bench.add([1] * 3, new)
    for _ in range(4):
        assert len(bench.turn()) == 2
    assert young.in_flight == 1 and len(young.output) == 3
    assert [chunk.request for chunk in bench.turn()] == [old]
    return bench, old, young


def test_the_youngest_gives_way_and_is_not_admitted_in_the_same_plan():
    bench, old, young = preempting()
    assert (young.preemptions, young.lane, young.pages) == (1, -1, [])
    assert (young.in_flight, len(young.output)) == (0, 4)  # what was in flight is recorded while it waits
    late = bench.add([2] * 3)
    assert list(bench.scheduler.running) == [old] and list(bench.scheduler.waiting) == [young, late]
    bench.run()
    assert old.preemptions == 0 and bench.scheduler.stats()["preemptions"] == 1


def test_a_preempted_request_may_end_with_the_token_in_flight():
    bench, _, young = preempting(new=4)
    assert young.finish == "length" and not bench.scheduler.waiting
    bench.run()


def test_a_preempted_request_finds_its_pages_again():
    bench, _, young = preempting()
    while young.lane < 0:
        bench.turn()
    assert bench.pending[0][-1].start == 4
    bench.run()
    assert young.cached == 0  # what it had computed itself is no hit
    bench, _, young = preempting(prefix_caching=False)
    while young.lane < 0:
        bench.turn()
    assert bench.pending[0][-1].start == 0
    bench.run()


def test_the_youngest_waits_for_a_page_instead_of_giving_up_its_own():
    bench = Bench(pages=5, lanes=3)  # four pages of four
    old, young = bench.add([0] * 10, 2), bench.add([1] * 3, 4)
    bench.scheduler.watermark = 0
    bench.turn()
    assert [chunk.request for chunk in bench.turn()] == [old, young]
    assert bench.turn() == []  # the older one has sampled its last token; it isn't known yet
    assert young.lane >= 0 and old.finish == "length"
    bench.run()
    assert bench.scheduler.preemptions == 0


def test_admission_keeps_pages_for_streams():
    bench = Bench(pages=8, lanes=3)  # seven pages
    bench.add([0] * 9, 3)
    bench.turn()
    big = bench.add([1] * 13, 3)
    assert bench.scheduler.watermark == 1
    assert len(bench.turn()) == 1 and big.lane == -1  # four pages are free, and it needs four
    bench.scheduler.watermark = 0
    assert len(bench.turn()) == 2
    bench.scheduler.watermark = 1
    bench.run()
    big = bench.add([1] * 25, 3)  # all seven: nobody runs, so none is kept back
    bench.run()
    assert big.finish == "length"


def test_who_comes_after_a_refused_head_is_looked_at_anew():
    bench = Bench(pages=8, lanes=3, budget=32)
    bench.add([0] * 9, 9)
    big, small = bench.add([1] * 16), bench.add([2])
    assert len(bench.turn()) == 1  # the big one lacks pages, and the small one does not overtake it
    bench.scheduler.abort(big)
    assert bench.turn()[1].request is small
    bench.run()


def test_a_prompt_takes_the_pages_there_are_and_waits_for_more():
    bench = Bench(pages=8, lanes=3, budget=8)
    bench.add([0] * 8, 8)
    bench.turn()
    long = bench.add([1] * 20, 1)
    while long.finish is None:
        bench.turn()
    bench.run()
    assert bench.scheduler.preemptions == 0


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_abort(turns):
    bench = Bench(budget=6)
    other = bench.add([1] * 5)
    request = bench.add([0] * 9)  # queued, in the middle of its prompt, with a token in flight
    for _ in range(turns):
        bench.turn()
    bench.scheduler.abort(request)
    bench.check_state()
    assert request.finish == "abort" and request.outbox[-1] == Output(None, "abort")
    said = len(request.outbox)
    bench.scheduler.abort(request)
    bench.run()
    assert len(request.outbox) == said and other.finish == "length"


def test_abort_of_a_preempted_request():
    bench, old, young = preempting()
    bench.scheduler.abort(young)
    bench.run()
    assert young.finish == "abort" and old.finish == "length"


def test_an_unknown_request_is_not_aborted_twice_over():
    bench = Bench()
    done = bench.add([0])
    bench.run()
    bench.scheduler.abort(done)
    bench.scheduler.fail(done, "too late")
    assert done.finish == "length" and done.outbox[-1].finish == "length"


def test_a_known_prefix_is_not_computed_again():
    bench = Bench()
    first = bench.add([0, 1, 2] * 6, 3)
    bench.run()
    again = bench.add([0, 1, 2] * 6, 3)
    assert spans(bench.turn()) == [(16, 18, True)]
    bench.run()
    # the next turn of the chat finds the answer too, but for its last token, which was never fed back
    chat = bench.add([*again.tokens, 1, 1], 3)
    assert spans(bench.turn()) == [(20, 23, True)]
    bench.run()
    assert [request.cached for request in (first, again, chat)] == [0, 16, 20]
    stats = bench.scheduler.stats()
    assert (stats["prompt_tokens"], stats["cached_tokens"]) == (18 + 18 + 23, 16 + 20)
    assert stats["generated_tokens"] == 9


def test_a_prefix_is_shared_within_the_plan_that_computes_it():
    bench = Bench(budget=32)
    bench.add([0] * 9)
    bench.add([0] * 9)
    assert spans(bench.turn()) == [(0, 9, True), (8, 9, True)]
    bench.run()


def test_only_equal_salts_share():
    bench = Bench(budget=64)
    for salt in (1, 2, 1):
        bench.add([0] * 9, salt=salt)
    assert spans(bench.turn()) == [(0, 9, True), (0, 9, True), (8, 9, True)]
    bench.run()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_siblings_wait_for_the_first_and_share_its_pages(prefix_caching):
    bench = Bench(budget=6, prefix_caching=prefix_caching)
    group = object()
    siblings = [bench.add([0] * 10, 3, group=group, id=str(seed)) for seed in range(3)]
    assert spans(bench.turn()) == [(0, 6, False)]
    assert spans(bench.turn()) == [(6, 10, True), (8, 10, True)]
    assert spans(bench.turn()) == [(10, 11, True), (10, 11, True), (8, 10, True)]
    assert siblings[1].pages[:2] == siblings[0].pages[:2] and siblings[1].pages[2] != siblings[0].pages[2]
    bench.run()
    stranger = bench.add([0] * 10, 3, group=object())
    bench.turn()
    assert stranger.cached == (8 if prefix_caching else 0)
    bench.run()


def test_without_prefix_caching_nothing_is_kept():
    bench = Bench(prefix_caching=False)
    for _ in range(2):
        request = bench.add([0] * 9)
        bench.run()
        assert request.cached == 0
    assert bench.scheduler.stats()["pages_cached"] == 0


def test_what_a_failed_request_wrote_is_not_shared():
    for prompt, turns in (([0] * 9, 1), ([0] * 3, 2)):  # the second fills its page with what it sampled
        bench = Bench()
        request = bench.add(prompt)
        for _ in range(turns):
            bench.turn()
        bench.scheduler.fail(request, "not a number")
        assert request.outbox[-1] == Output(None, "error", error="not a number")
        bench.add([*request.tokens, 1, 1])
        assert spans(bench.turn())[0][0] == 0
        bench.run()


def test_restart():
    bench, old, young = preempting()
    young.tokens.pop(), young.outbox.pop()
    young.in_flight = 1  # as if it was preempted in the plan whose step failed: its token is lost
    bench.restart()
    assert old.finish == "error" and young.finish is None
    bench.run()
    assert young.finish == "length"


def test_logprobs_go_out_with_their_tokens():
    scheduler = Scheduler(PagePool(8, 4), 2, 8)
    first, second = Request([1], 1, outbox=Box()), Request([2], 2, outbox=Box())
    scheduler.add(first)
    scheduler.add(second)
    scheduler.commit(scheduler.plan(), [5, 6], [-0.5, None], [((5, -0.5), (7, -1.0)), ()])
    assert list(first.outbox) == [Output(5, "length", -0.5, ((5, -0.5), (7, -1.0)))]
    assert list(second.outbox) == [Output(6)]


def test_several_steps_at_once():
    bench = Bench(steps=4, lanes=2)
    first, second = bench.add([0] * 5, 11), bench.add([1] * 3, 7)
    assert spans(bench.turn()) == [(0, 5, 1), (0, 3, 1)]
    assert spans(bench.turn()) == [(5, 9, 4), (3, 7, 4)]
    third = bench.add([2] * 3, 6)  # no lane is free, so it would not start earlier after one step
    assert spans(bench.turn()) == [(9, 13, 4), (7, 9, 2)]
    assert spans(bench.turn()) == [(13, 15, 2)]  # all tokens of the second are in flight
    assert second.finish == "length" and third.lane < 0
    assert spans(bench.turn()) == [(0, 3, 1)] and first.finish == "length"
    bench.run()


def test_one_step_at_a_time_beside_prompts():
    bench = Bench(steps=4, budget=8)
    bench.add([0] * 5, 20)
    assert [spans(bench.turn()) for _ in range(2)] == [[(0, 5, 1)], [(5, 9, 4)]]
    bench.add([1] * 12, 20)
    assert spans(bench.turn()) == [(9, 10, 1), (0, 7, 0)]
    assert spans(bench.turn()) == [(10, 11, 1), (7, 12, 1)]
    assert spans(bench.turn()) == [(11, 15, 4), (12, 16, 4)]
    bench.run()


def test_one_step_at_a_time_where_grammars_pages_or_lengths_ask_for_it():
    bench = Bench(steps=4)
    guided = bench.add([0] * 5, 8, grammar="{}")
    bench.turn()
    assert spans(bench.turn()) == [(5, 6, 1)]
    bench.scheduler.abort(guided)
    assert bench.turn() == []
    bench = Bench(steps=4, pages=5, size=2)  # eight tokens
    bench.scheduler.watermark = 0
    bench.add([0] * 3, 4)
    bench.add([1] * 3, 4)
    bench.turn()
    assert spans(bench.turn()) == [(3, 4, 1), (3, 4, 1)]  # more would need pages of each other
    bench.run()
    bench = Bench(steps=4)
    bench.add([0] * 3, 2)
    bench.turn()
    assert spans(bench.turn()) == [(3, 4, 1)]  # three of four steps would be for nothing
    bench.run()


def test_a_stop_among_several_steps_drops_the_rest():
    bench = Bench(steps=4)
    request = bench.add([0, 1, 2], 50, stop_ids=frozenset([1]))
    answer, _ = oracle(request, [0, 1, 2], 50)
    bench.run()
    assert request.output == answer and request.outbox[-1] == Output(1, "stop")
    assert bench.scheduler.stats()["generated_tokens"] == len(answer) < 50


def test_a_step_may_be_read_before_the_next_is_planned():
    bench = Bench()
    bench.add([0] * 5, 9)
    for _ in range(5):
        assert not any(chunk.unknown for chunk in bench.turn())
        bench.commit()
    bench.run()


@st.composite
def traces(draw):
    """A small machine, and what happens to it between turns."""
    options = {
        "ahead": draw(st.sampled_from([1, 1, 2, 3])),
        "steps": draw(st.sampled_from([1, 1, 2, 4, 7])),
        "pages": draw(st.integers(3, 24)),
        "size": draw(st.integers(1, 4)),
        "lanes": draw(st.integers(1, 5)),
        "budget": draw(st.integers(1, 14)),
        "prefix_caching": draw(st.booleans()),
        "session_len": draw(st.none() | st.integers(2, 30)),
        "costs": {size: draw(st.integers(1, 10)) * 1000**size for size in sorted(draw(st.sets(st.integers(1, 14))))},
    }
    tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24)
    ask = st.fixed_dictionaries(
        {
            "tokens": tokens | st.integers(1, 24).map(lambda n: [0] * n),
            "new": st.integers(1, 20),
            "stop_ids": st.sampled_from([frozenset(), frozenset([0])]),
            "salt": st.sampled_from([None, None, 7]),
            "n": st.sampled_from([1, 1, 1, 3]),
            "follows": st.booleans(),
            "fits": st.sampled_from([True, True, True, False]),
        }
    )
    which = st.integers(0, 20)
    event = st.one_of(
        st.just(("turn", None)),
        st.just(("turn", None)),
        st.tuples(st.just("add"), ask),
        st.tuples(st.just("add"), ask),
        st.tuples(st.sampled_from(["abort", "fail"]), which),
        st.sampled_from([("drain", None), ("restart", None)]),
    )
    return options, draw(st.lists(event, min_size=draw(st.sampled_from([0, 30])), max_size=60))


def play(bench, events):
    for kind, what in events:
        alive = [*bench.scheduler.running, *bench.scheduler.waiting]
        if kind == "add":
            add(bench, **what)
        elif kind == "drain":
            bench.commit()
        elif kind == "restart":
            bench.restart()
        elif kind in ("abort", "fail") and alive:
            request = alive[what % len(alive)]
            bench.scheduler.abort(request) if kind == "abort" else bench.scheduler.fail(request, "broken")
        bench.check_state()
        bench.turn()
    return bench.run()


def add(bench, tokens, new, n=1, follows=False, fits=True, **fields):
    """n answers to one prompt, which may go on from an earlier answer; if `fits`, cut to what the pool holds."""
    finished = [request for request in bench.prompts if request.finish]
    if follows and finished:
        tokens = finished[-1].tokens[:30] + tokens
    most, session_len = (bench.scheduler.pool.count - 1) * bench.device.size + 1, bench.scheduler.session_len
    if fits:
        new = min(new, most - 1)
        tokens = tokens[: most - new]
    if session_len is not None:
        fits = fits or len(tokens) + min(new, max(0, session_len - len(tokens))) <= most or len(tokens) >= session_len
    else:
        fits = fits or len(tokens) + new <= most
    for _ in range(n):
        if fits:
            bench.add(tokens, new, group=len(bench.prompts) if n > 1 else None, **fields)
        else:
            with pytest.raises(ValueError, match=f"holds {most} tokens"):
                bench.add(tokens, new, **fields)


@settings(max_examples=500)
@given(traces())
def test_random_traces(trace):
    options, events = trace
    play(Bench(**options), events)


@pytest.mark.parametrize("seed", range(6))
def test_long_random_traces(seed):
    """Enough of everything that preemptions, hits and evictions meet."""
    random = Random(seed)
    bench = Bench(
        pages=random.choice([12, 40]),
        size=random.choice([1, 2, 4]),
        lanes=8,
        budget=random.choice([8, 12, 40]),
        ahead=1 + seed % 2,
        steps=(1, 4, 3)[seed % 3],
        costs={4: 1, 8: 400, 24: 2500, 40: 9000},  # where chunks are cut
    )
    for _ in range(150):
        for _ in range(random.choice([0, 0, 1, 2])):
            tokens = [random.randrange(VOCAB)] * random.randint(1, 6) + random.choices(range(VOCAB), k=9)
            add(bench, tokens, random.randint(1, 25), n=random.choice([1, 1, 4]), follows=random.random() < 0.3)
        if random.random() < 0.2 and (alive := [*bench.scheduler.running, *bench.scheduler.waiting]):
            bench.scheduler.abort(random.choice(alive))
        bench.turn()
    bench.run()
    stats = bench.scheduler.stats()
    assert stats["preemptions"] and stats["cached_tokens"]
    assert stats["generated_tokens"] == sum(len(request.output) for request in bench.prompts)
