"""The door of the engine: who may enter, how long a request may take, and what is counted on the way.

`Door` has the engine's interface and stands in its process.  It also keeps the server's small shared memory
(interactive sessions, stored responses), since the web workers share no other.
"""

import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from concurrent.futures import Future
from time import perf_counter

from jaxserve.engine.request import EngineDead, Output, Overloaded, Request
from jaxserve.serve.metrics import Meter, render

log = logging.getLogger("jaxserve")

DRAINING_RETRY = 5  # seconds until another server may have taken over
KEPT_BYTES = 64 << 20
KEPT_ENTRIES = 10_000
LOOK = 0.25  # seconds between two looks at the deadlines
CACHES_QUEUED = 4  # the queue holds at most that many times the tokens of the KV cache


class Ticket:
    """Stands in for the outbox of a request while the request is inside; takes the times of its tokens."""

    __slots__ = (
        *("arrived", "door", "expired", "first", "gap", "last"),
        *("outbox", "request", "started", "submitted", "tokens", "unwanted"),
    )

    def __init__(self, door, request, now):
        self.door, self.request, self.outbox = door, request, request.outbox
        self.arrived, self.started, self.first, self.last = now, 0.0, 0.0, 0.0
        self.submitted = self.unwanted = self.expired = False
        self.tokens = 0
        self.gap = door.meter.gap

    def put(self, output):
        """What the engine calls for every token: under a microsecond, but for the first and the last."""
        now = perf_counter()
        if output.token is not None:
            if self.tokens:
                gap, histogram = now - self.last, self.gap
                histogram.counts[bisect_left(histogram.edges, gap)] += 1
                histogram.sum += gap
            else:
                self.first = now
                self.door._first(self, now)
            self.tokens += 1
            self.last = now
        if output.finish:
            output = self.door._last(self, output, now)
        if self.outbox is not None:
            self.outbox.put(output)


class Door:
    """Guards an engine.  Same interface; safe to call from any thread."""

    def __init__(
        self,
        engine,
        *,
        max_queued: int = 512,
        max_queued_tokens: int | None = None,
        max_concurrent: int | None = None,
        request_timeout: float | None = None,
        meter: Meter | None = None,
    ):
        """max_queued, max_queued_tokens: bounds of the queue, beyond what the engine's free seats take at once; the
        default in tokens is four times the KV cache.  max_concurrent: requests inside, running or queued.
        request_timeout: seconds from arrival to the last token.
        """
        self.engine = engine
        self.meter = Meter() if meter is None else meter
        self.max_queued, self.max_concurrent, self.request_timeout = max_queued, max_concurrent, request_timeout
        self.max_queued_tokens = max_queued_tokens or CACHES_QUEUED * engine.info["cache_tokens"]
        self._seats = engine.info["max_batch_size"]
        self.meter.model = self.meter.model or str(engine.info["path"]).rstrip("/").rpartition("/")[2]
        self._lock = threading.Lock()  # held for microseconds: the engine's thread takes it too
        self._live: dict[Request, Ticket] = {}
        self._queue: OrderedDict[Ticket, None] = OrderedDict()  # not started yet, oldest first
        self._queued_tokens = self._scoring = self._scoring_tokens = 0
        self._typical_wait = 1.0  # seconds in the queue, a running mean
        self._steps = self._step_tokens = 0.0
        self._draining = False
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._kept_bytes = 0
        self._keeping = threading.Lock()
        self._closed = threading.Event()
        engine.on_turn.append(self._turn)
        if request_timeout:
            threading.Thread(target=self._watch, name="jaxserve-deadlines", daemon=True).start()

    # The engine's interface -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request.  Overloaded if a bound is met, else what the engine raises."""
        ticket = Ticket(self, request, perf_counter())
        with self._lock:
            self._check(len(request.tokens))
            self._live[request] = ticket
            self._queue[ticket] = None
            self._queued_tokens += request.prompt_len
        request.outbox = ticket
        try:
            self.engine.submit(request)
        except BaseException:
            request.outbox = ticket.outbox
            with self._lock:
                self._leave(ticket)
            raise
        with self._lock:
            ticket.submitted, unwanted = True, ticket.unwanted
        if unwanted:
            self._abort(request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is.  Does nothing for one that has ended, or was never let in."""
        with self._lock:
            ticket = self._live.get(request)
            if ticket is None:
                return
            ticket.unwanted = True
            if not ticket.submitted:  # another thread is about to: the engine must not hear of its end before
                return
        self._abort(request)

    def _abort(self, request):
        try:
            self.engine.abort(request)
        except EngineDead:
            pass  # which ends every request

    def score(self, tokens, want: str = "logprobs"):
        """As the engine's; waits.  Sequences to score count like queued requests."""
        future = self.score_async(tokens, want)
        try:
            return future.result()
        except BaseException:  # whoever waits is interrupted
            future.cancel()
            raise

    def score_async(self, tokens, want: str = "logprobs") -> Future:
        """As the engine's."""
        with self._lock:
            self._check(len(tokens))
            self._scoring += 1
            self._scoring_tokens += len(tokens)
        count = len(tokens)

        def scored(_=None):
            with self._lock:
                self._scoring -= 1
                self._scoring_tokens -= count

        try:
            future = self.engine.score_async(tokens, want)
        except BaseException:
            scored()
            raise
        future.add_done_callback(scored)
        return future

    def stats(self) -> dict[str, float]:
        """The engine's counts, and: queued requests and tokens, requests inside, refused ones."""
        counts = self.engine.stats()
        with self._lock:
            return counts | {
                "inside": len(self._live) + self._scoring,
                "queued": len(self._queue) + self._scoring,
                "queued_tokens": self._queued_tokens + self._scoring_tokens,
                "rejected": sum(self.meter.rejected.values()),
                "tokens_out": self.meter.tokens,
                "kept": len(self._kept),
                "kept_bytes": self._kept_bytes,
            }

    @property
    def info(self) -> dict:
        return self.engine.info

    @property
    def on_turn(self) -> list:
        return self.engine.on_turn

    @property
    def alive(self) -> bool:
        return self.engine.alive

    def close(self) -> None:
        """Stops the engine; requests that still run are aborted."""
        self._closed.set()
        self.engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # The server's ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "ready", "draining" or "dead"."""
        return "dead" if not self.engine.alive else "draining" if self._draining else "ready"

    @property
    def idle(self) -> bool:
        """Whether nobody is inside."""
        return not self._live and not self._scoring

    def drain(self) -> None:
        """From now on nobody is let in; who is inside stays until the end."""
        self._draining = True

    def metrics(self) -> str:
        """Text for Prometheus."""
        return render(self.snapshot())

    def snapshot(self) -> dict:
        """Plain data from which `metrics.render` makes that text, in whichever process."""
        return self.meter.snapshot(self.stats())

    def keep(self, kind: str, key: str, value: bytes) -> None:
        """Stores a value under a kind and a key; the values that nobody asked for in the longest time give way."""
        if len(value) > KEPT_BYTES:
            raise ValueError(f"a value to keep has at most {KEPT_BYTES} bytes, not {len(value)}")
        with self._keeping:
            self._drop((kind, key))
            self._kept[kind, key] = value
            self._kept_bytes += len(value)
            while self._kept_bytes > KEPT_BYTES or len(self._kept) > KEPT_ENTRIES:
                self._drop(next(iter(self._kept)))

    def recall(self, kind: str, key: str) -> bytes | None:
        """What was kept, or None."""
        with self._keeping:
            value = self._kept.get((kind, key))
            if value is not None:
                self._kept.move_to_end((kind, key))
            return value

    def forget(self, kind: str, key: str) -> None:
        """Drops what was kept, if anything."""
        with self._keeping:
            self._drop((kind, key))

    def _drop(self, name):
        self._kept_bytes -= len(self._kept.pop(name, b""))

    # Who may enter --------------------------------------------------------------------------------------------------

    def _check(self, tokens):
        """Overloaded unless one more of so many prompt tokens may enter.  Under the lock."""
        queued = len(self._queue) + self._scoring
        running = len(self._live) - len(self._queue)
        waiting = queued - max(0, self._seats - running)  # beyond those that the free seats take at once
        queued_tokens = self._queued_tokens + self._scoring_tokens
        inside = len(self._live) + self._scoring
        if self._draining:
            reason, text = "draining", "the server is shutting down"
        elif self.max_concurrent and inside >= self.max_concurrent:
            reason = "concurrent"
            text = f"{inside} requests are running or queued, the most that the server takes"
        elif waiting >= self.max_queued:
            reason, text = "requests", f"the queue is full: {waiting} requests wait"
        elif queued and queued_tokens + tokens > self.max_queued_tokens:
            reason, most = "tokens", self.max_queued_tokens
            text = f"the queue is full: {queued_tokens} prompt tokens wait, and with {tokens} more it is over {most}"
        else:
            return
        self.meter.rejected[reason] += 1
        raise Overloaded(text, DRAINING_RETRY if self._draining else max(1, min(30, round(self._typical_wait))))

    def _leave(self, ticket):
        """Forgets a request, once.  Under the lock."""
        if self._live.pop(ticket.request, None) is not None and ticket in self._queue:
            del self._queue[ticket]
            self._queued_tokens -= ticket.request.prompt_len

    # On the engine's thread -----------------------------------------------------------------------------------------

    def _turn(self):
        """Notes which queued requests have got a seat; they do so in their order."""
        if self._queue:
            now = perf_counter()
            with self._lock:
                while self._queue and (ticket := next(iter(self._queue))).request.lane >= 0:
                    self._start(ticket, now)
        counts = self.engine.stats()
        steps, tokens = counts.get("steps", 0), counts.get("step_tokens", 0)
        if steps > self._steps:
            self.meter.step.observe((tokens - self._step_tokens) / (steps - self._steps))
            self._steps, self._step_tokens = steps, tokens

    def _start(self, ticket, now):
        """Takes a request from the queue.  Under the lock."""
        ticket.started = now
        wait = now - ticket.arrived
        self.meter.queue.observe(wait)
        self._typical_wait += (wait - self._typical_wait) / 16
        del self._queue[ticket]
        self._queued_tokens -= ticket.request.prompt_len

    def _first(self, ticket, now):
        if not ticket.started:
            with self._lock:
                self._start(ticket, now)
        self.meter.first.observe(now - ticket.arrived)
        self.meter.prefill.observe(now - ticket.started)

    def _last(self, ticket, output, now):
        """Counts a request that ends, and returns its last output."""
        request, meter = ticket.request, self.meter
        if request is None:  # had ended before
            return output
        if ticket.expired and output.finish == "abort":
            meter.timeouts += 1
            output = Output(None, "error", error=f"timeout: no end after {self.request_timeout:g} s, the time limit")
        with self._lock:
            self._leave(ticket)
        ticket.request = None  # no cycle: what the request holds goes at once
        meter.ended[output.finish] += 1
        meter.corrupted += output.finish == "error" and "(NaN)" in (output.error or "")
        meter.total.observe(now - ticket.arrived)
        meter.prompt.observe(request.prompt_len)
        meter.generation.observe(ticket.tokens)
        if ticket.tokens:
            meter.decode.observe(ticket.last - ticket.first)
        return output

    # On the thread of the deadlines ---------------------------------------------------------------------------------

    def _watch(self):
        while not self._closed.wait(LOOK):
            now = perf_counter()
            with self._lock:
                late = [
                    request
                    for request, ticket in self._live.items()
                    if now - ticket.arrived > self.request_timeout and not ticket.expired
                ]
                for request in late:
                    self._live[request].expired = True
            for request in late:
                self.abort(request)
