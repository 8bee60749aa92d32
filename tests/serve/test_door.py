import random
import threading
import time
from queue import SimpleQueue

import pytest

from jaxserve.engine.request import EngineDead, Output, Overloaded, Request
from jaxserve.serve.door import KEPT_BYTES, KEPT_ENTRIES, Door
from tests.serve.stub import StubEngine
from tests.waiting import soon


class Sink:
    """An outbox that remembers, and can be waited for."""

    def __init__(self):
        self.outputs, self.ended = [], threading.Event()

    def put(self, output):
        self.outputs.append(output)
        if output.finish:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(20)
        return self.outputs[-1]


def ask(tokens=4, new=3):
    return Request([7] * tokens, new, outbox=Sink())


def settled(door):
    """Waits until nobody is inside, and nothing is counted any more."""
    counts = ("inside", "queued", "queued_tokens", "running", "waiting", "pages_used")
    soon(lambda: door.idle and not any(door.stats()[name] for name in counts))


@pytest.fixture
def engine():
    with StubEngine(rate=0, lanes=4) as engine:
        yield engine


@pytest.fixture
def still():
    """An engine whose turns do not come while a test runs."""
    with StubEngine(rate=0.2, lanes=2) as engine:
        yield engine
        engine.kill()


def test_passes_everything_through(engine):
    door, request = Door(engine), ask()
    outbox = request.outbox
    door.submit(request)
    assert outbox.wait() == Output(9, "length")
    assert [output.token for output in outbox.outputs] == [7, 8, 9]
    settled(door)
    assert door.alive and door.state == "ready" and door.info == engine.info
    assert len(door.score([1, 2, 3])) == 2
    settled(door)


def test_the_queue_is_bound_in_requests(still):
    """Beyond what the free seats take."""
    door = Door(still, max_queued=3)
    for _ in range(2 + 3):
        door.submit(ask())
    with pytest.raises(Overloaded, match="the queue is full: 3 requests wait") as error:
        door.submit(ask())
    assert 1 <= error.value.retry_after <= 30
    assert door.meter.rejected["requests"] == door.stats()["rejected"] == 1


def test_the_queue_is_bound_in_tokens(still):
    door = Door(still, max_queued_tokens=100)
    door.submit(ask(tokens=200))  # alone it may be as long as it likes
    with pytest.raises(Overloaded, match="200 prompt tokens wait, and with 1 more it is over 100"):
        door.submit(ask(tokens=1))
    with pytest.raises(Overloaded):
        door.score([1] * 10)
    assert door.meter.rejected["tokens"] == 2


def test_the_default_bound_follows_the_cache(engine):
    assert Door(engine).max_queued_tokens == 4 * engine.info["cache_tokens"]


def test_at_most_so_many_inside(still):
    door = Door(still, max_concurrent=1)
    request = ask()
    outbox = request.outbox
    door.submit(request)
    with pytest.raises(Overloaded, match="1 requests"):
        door.submit(ask())
    door.abort(request)
    assert outbox.wait().finish in ("abort", "length")
    door.submit(ask())


def test_a_refused_request_leaves_no_trace(engine):
    door, request = Door(engine), ask(tokens=10_000)
    outbox = request.outbox
    with pytest.raises(ValueError, match="do not fit"):
        door.submit(request)
    assert request.outbox is outbox
    settled(door)


def test_draining(engine):
    engine.rate = 50
    door = Door(engine)
    first = ask(new=10)
    outbox = first.outbox
    door.submit(first)
    door.drain()
    assert door.state == "draining"
    with pytest.raises(Overloaded, match="shutting down"):
        door.submit(ask())
    assert outbox.wait().finish == "length" and len(outbox.outputs) == 10
    settled(door)


def test_abort_is_idempotent_and_spares_strangers(engine):
    engine.rate = 50
    door, request, stranger = Door(engine), ask(new=1000), ask()
    outbox = request.outbox
    door.abort(stranger)
    door.submit(request)
    for _ in range(3):
        door.abort(request)
    assert outbox.wait() == Output(None, "abort")
    door.abort(request)
    assert stranger.finish is None
    door.submit(stranger)
    settled(door)
    assert door.meter.ended["abort"] == 1 and door.meter.ended["length"] == 1


def test_an_abort_that_overtakes_its_request(engine):
    """The engine must not hear of the end before it hears of the request."""
    door, request = Door(engine), ask(new=1_000)
    outbox, submit = request.outbox, engine.submit

    def slowly(request):
        door.abort(request)
        submit(request)

    engine.submit = slowly
    door.submit(request)
    assert outbox.wait() == Output(None, "abort")
    settled(door)


def test_a_request_has_a_time_limit(engine):
    engine.rate = 50
    door = Door(engine, request_timeout=0.1)
    request = ask(new=10_000)
    outbox = request.outbox
    door.submit(request)
    last = outbox.wait()
    assert last.finish == "error" and last.error.startswith("timeout") and "0.1 s" in last.error
    assert door.meter.timeouts == 1 and door.meter.ended["error"] == 1
    settled(door)
    door.close()


def test_a_dead_engine(engine):
    engine.rate = 50
    door, request = Door(engine), ask(new=1_000)
    outbox = request.outbox
    door.submit(request)
    engine.kill()
    last = outbox.wait()
    assert last.finish == "error" and last.error.startswith("the engine has stopped")
    assert door.state == "dead" and not door.alive
    door.abort(request)
    with pytest.raises(EngineDead):
        door.submit(ask())
    settled(door)


def test_corrupted_answers_are_counted(engine):
    door, request = Door(engine), ask()
    outbox = request.outbox
    engine.submit = lambda request: request.outbox.put(
        Output(None, "error", error="the model's logits were not numbers (NaN): the weights overflowed")
    )
    door.submit(request)
    assert outbox.wait().error
    assert door.meter.corrupted == 1


def test_ten_thousand_of_everything(engine):
    """Random submits, aborts, ends and refusals by many threads leave nothing behind."""
    door, threads, results = Door(engine, max_queued=40, max_queued_tokens=3_000), 5, SimpleQueue()

    def client(seed):
        draw, done = random.Random(seed), 0
        open_ones = []
        while done < 10_000 / threads:
            done += 1
            request = ask(tokens=draw.choice((1, 10, 100, 5_000)), new=draw.choice((0, 1, 5, 50)))
            outbox = request.outbox
            try:
                door.submit(request)
            except (Overloaded, ValueError):
                time.sleep(0.001)
                continue
            open_ones.append((request, outbox))
            if draw.random() < 0.3:
                for _ in range(draw.randint(1, 2)):
                    door.abort(draw.choice(open_ones)[0])
            if len(open_ones) > 20:
                open_ones.pop(0)[1].wait()
        results.put(all(outbox.ended.wait(20) for _, outbox in open_ones))

    crowd = [threading.Thread(target=client, args=(seed,)) for seed in range(threads)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    assert all(results.get() for _ in crowd)
    settled(door)
    meter = door.meter
    assert sum(meter.ended.values()) == sum(meter.total.counts) > 1_000
    assert meter.ended["abort"] and meter.ended["length"] and not meter.ended["error"]
    assert meter.rejected["requests"] or meter.rejected["tokens"]
    assert not door._live and not door._queue
    assert meter.tokens == engine.stats()["generated_tokens"]


def test_what_is_kept_is_bound(engine):
    door = Door(engine)
    assert door.recall("session", "a") is None
    door.keep("session", "a", b"1")
    door.keep("session", "a", b"22")
    door.keep("response", "a", b"3")
    assert door.recall("session", "a") == b"22" and door.recall("response", "a") == b"3"
    door.forget("session", "a")
    door.forget("session", "a")
    assert door.recall("session", "a") is None and door.stats()["kept_bytes"] == 1
    for i in range(KEPT_ENTRIES + 5):
        door.keep("session", str(i), b"x")
        door.recall("response", "a")  # asked for, so it stays
    stats = door.stats()
    assert stats["kept"] == KEPT_ENTRIES and stats["kept_bytes"] == KEPT_ENTRIES
    assert door.recall("session", "0") is None and door.recall("response", "a") == b"3"
    door.keep("session", "big", bytes(KEPT_BYTES))
    assert door.stats()["kept"] == 1
    with pytest.raises(ValueError, match="at most"):
        door.keep("session", "bigger", bytes(KEPT_BYTES + 1))
