"""Decides what the next step computes.  Touches no device.

The order of arrival rules.  Requests run in that order, and wait in that order; the youngest gives its pages up when an
older one lacks one, and returns to the front of the queue.  Nobody is admitted while another still reads its prompt, so
of the running requests only the last can be in the middle of it; this also makes the n answers to one prompt wait for
the first, whose pages they share.

A plan may be made while the step before is still in flight: then the newest token of a request is known to the device
only, and is recorded by `commit` after the next plan.  Pages and lanes are given away at once even so, because the
device works off steps in the order of the plans: whoever gets a page writes it after the last step that reads it for
its former owner.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import Output, Request

# What putting tokens off for a step costs, in tokens of a full one.  Simulated (256 clients, prompts up to 1024,
# answers up to 512, an 8B on an H200: steps of 320 tokens take 15.3 ms, 512 18.5, 1024 28.7): with 16 or 32 there are
# 1.5 % more tokens a second than where a size is filled whatever it costs.
PUT_OFF = 32


@dataclass(slots=True)  # made for every row of every step: frozen would take five times as long
class Chunk:
    """Positions start..stop of one request: a piece of its prompt, or one or more tokens of its answer."""

    request: Request
    start: int
    stop: int
    emits: int  # tokens that are sampled: none before the end of what there is, one there; of an answer, one a position
    unknown: bool  # the token of its first position, if it is of an answer, is still in flight: the newest of the lane
    grew: bool  # request.pages is longer than at its last chunk, or all new


class Scheduler:
    """`lanes` requests run at once, `budget` tokens go into a step.

    Not thread-safe: everything but `check` is called by the thread that owns the device.
    """

    def __init__(
        self,
        pool: PagePool,
        lanes: int,
        budget: int,
        *,
        session_len: int | None = None,
        prefix_caching: bool = True,
        costs: Mapping[int, float] | None = None,
    ):
        """costs: of the sizes to which steps with prompts are padded, ascending, what each takes, in any unit."""
        if lanes < 1 or budget < 1:
            raise ValueError(f"a step needs at least one row and one token, not {lanes} rows and {budget} tokens")
        self.pool, self.budget, self.session_len, self.prefix_caching = pool, budget, session_len, prefix_caching
        self.costs = dict(costs or {})
        self.sizes = tuple(self.costs)
        self.token = min((cost / size for size, cost in self.costs.items()), default=0)  # what one costs at best
        # With more lanes than tokens in a step the youngest streams would stand still.
        self.lanes = list(range(min(lanes, budget)))[::-1]  # free ones
        self.running: dict[Request, None] = {}  # oldest first
        self.waiting: OrderedDict[Request, None] = OrderedDict()  # oldest first
        # Pages kept back for streams.  Simulated (256 lanes, prompts up to 1024, answers up to 512, 1500 pages of 64):
        # 130 preemptions with 1 page, 14 with 1 %, none with 3 %, which takes more steps than 1 % for the fewer lanes.
        self.watermark = max(1, (pool.count - 1) // 100)
        self.reserved = 0  # more pages that are kept from the queue, for who came before it (see engine.scoring)
        self._refused: tuple[Request | None, int] = (None, 0)  # head of the queue, free pages that it needs
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0

    @property
    def idle(self) -> bool:
        """Whether nobody runs or waits.  A step in flight may still have to be committed."""
        return not self.running and not self.waiting

    def stats(self) -> dict[str, int]:
        """Requests and pages at this moment; preemptions and tokens since the start."""
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "preemptions": self.preemptions,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "pages_used": self.pool.count - 1 - self.pool.free,
            "pages_cached": len(self.pool.cached),
            "pages_free": len(self.pool.blank),
        }

    def check(self, request: Request) -> None:
        """ValueError if the request could not finish even with all pages for itself."""
        room = self._room(request)
        fit = (self.pool.count - 1) * self.pool.size + 1  # the last token takes no room in the cache
        if room > 0 and request.prompt_len + room > fit:
            raise ValueError(
                f"{request.prompt_len} prompt tokens and {room} new ones do not fit into the KV cache, which holds "
                f"{fit} tokens of one request: shorten the prompt, ask for fewer tokens or give the cache more memory"
            )

    def add(self, request: Request) -> None:
        """Queues a request.  One whose prompt leaves no room in the session ends at once, with "length"."""
        try:
            self.check(request)
        except ValueError:
            request.finish = "error"
            raise
        room = request.max_new_tokens = self._room(request)
        request.limit = request.prompt_len + room - 1
        if not room:
            self._end(request, Output(None, "length"))
        else:
            self.waiting[request] = None

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; one that has ended already stays as it is."""
        if not request.finish:
            self._end(request, Output(None, "abort"))

    def fail(self, request: Request, message: str) -> None:
        """Ends a request whose step went wrong; what it left in its pages is not trusted."""
        if not request.finish:
            self.pool.forget(request.pages)
            request.chain = None
            self._end(request, Output(None, "error", error=message))

    def plan(self, steps: int = 1) -> list[Chunk]:
        """One chunk for each request that gets any: first those of answers, then the prompts.

        Running requests come first, then as much of the queue as fits.  steps: tokens that answers may get at once, one
        after the other; they get one where anybody is better off with that.
        """
        chunks: list[Chunk] = []
        preemptions = self.preemptions
        size = self.pool.size
        if steps > 1 and not self._burst(steps):
            steps = 1
        reading = None  # in the middle of its prompt
        for request in list(self.running):
            start, known = request.computed, len(request.tokens)
            stop = known + request.in_flight
            if request.lane < 0:  # preempted by an older one, and so are all after it
                break
            if start >= request.limit:  # its last token is in flight
                continue
            if stop - start > 1:
                reading = request
                break
            if steps > 1:
                stop = min(start + steps, request.limit)
            grew = stop > len(request.pages) * size
            if grew and not self._grow(request, stop):
                continue
            request.computed = stop
            request.in_flight += stop - start
            chunks.append(Chunk(request, start, stop, stop - start, start >= known, grew))
        left = self.budget - len(chunks)
        if reading and (chunk := self._read(reading, left)):  # cut short, it leaves no tokens or no pages for others
            chunks.append(chunk)
            left -= chunk.stop - chunk.start
        if self.preemptions == preemptions:  # else a victim, maybe with a token in flight, would be admitted at once
            self._admit(chunks, left)
        return chunks

    def commit(
        self,
        chunks: Sequence[Chunk],
        tokens: Sequence[int],
        logprobs: Sequence[float | None] | None = None,
        tops: Sequence[tuple[tuple[int, float], ...]] | None = None,
        step: int = 0,
    ) -> None:
        """Records what a step produced, the first of a plan or a later one: a token for each chunk.

        Those of chunks that emit so many count.
        """
        assert len(chunks) == len(tokens)
        for chunk, token, logprob, top in zip(
            chunks, tokens, logprobs or repeat(None), tops or repeat(()), strict=False
        ):
            request = chunk.request
            if request.finish or chunk.emits <= step:
                continue  # ended while this was on its way, or in the middle of a prompt
            known = request.tokens
            known.append(token)
            request.in_flight -= 1
            self.generated_tokens += 1
            if token in request.stop_ids:
                self._end(request, Output(token, "stop", logprob, top))
            elif len(known) > request.limit:
                self._end(request, Output(token, "length", logprob, top))
            elif request.outbox is not None:
                request.outbox.put(Output(token, None, logprob, top))

    def _room(self, request: Request) -> int:
        """Tokens that the request may still get: as many as it asked for, or as the session has left."""
        left = request.max_new_tokens if self.session_len is None else self.session_len - request.prompt_len
        return max(0, min(request.max_new_tokens, left))

    def _burst(self, steps: int) -> bool:
        """Whether all answers may get so many tokens at once.

        Not while a prompt is read or could be, where a grammar needs to see each token, where pages are short, or where
        answers are so near their ends that half of the work would be for nothing.
        """
        if self.waiting and self.lanes:
            return False
        pages = tokens = most = 0
        for request in self.running:
            start = request.computed
            if start >= request.limit:
                continue
            if request.grammar is not None or len(request.tokens) + request.in_flight - start > 1:
                return False
            count = min(steps, request.limit - start)
            pages += -(-(start + count) // self.pool.size) - len(request.pages)
            tokens += count
            most += steps
        return pages <= self.pool.free and 2 * tokens >= most

    def _grow(self, request: Request, stop: int) -> bool:
        """Pages for an answer, at the cost of the youngest.  False if it is the youngest: it waits a step."""
        count = -(-stop // self.pool.size) - len(request.pages)
        while self.pool.free < count:
            victim = next(reversed(self.running))
            if victim is request:
                return False
            self._leave(victim)
            victim.preemptions += 1
            self.preemptions += 1
            self.waiting[victim] = None
            self.waiting.move_to_end(victim, last=False)
        request.pages += self.pool.take(count)
        return True

    def _read(self, request: Request, left: int) -> Chunk | None:
        """The next chunk of a prompt, or of what a preempted request computes again; None without pages for it."""
        assert not request.in_flight
        size, start, length, held = self.pool.size, request.computed, len(request.tokens), len(request.pages)
        stop = min(length, start + left, (held + max(0, self._spare(request))) * size)
        if stop <= start:
            return None
        stop = start + self._cut(request, self.budget - left, stop - start)
        request.pages += self.pool.take(-(-stop // size) - held)
        request.computed, emits = stop, stop == length
        request.in_flight += emits
        self._remember(request)
        return Chunk(request, start, stop, emits, False, True)

    def _cut(self, request: Request, before: int, wanted: int) -> int:
        """How much of a chunk of `wanted` tokens goes into a step that has `before`: all, or what fills a size, by what
        the step and the rest of the chunk cost.

        Only beside streams, with which the rest of the prompt can ride, and only for what closes the step.
        """
        total = before + wanted
        if not self.sizes or not before or self.waiting or total > self.sizes[-1]:
            return wanted
        above = bisect_left(self.sizes, total)
        best, found = self.costs[self.sizes[above]], wanted
        least = wanted / 4 if request.delayed else 1  # less once, or a prompt would be read a token a step
        for size in reversed(self.sizes[:above]):
            cost = self.costs[size] + (total - size + PUT_OFF) * self.token
            if size - before >= least and cost < best:
                best, found = cost, size - before
        request.delayed |= 4 * found < wanted
        return found

    def _admit(self, chunks: list[Chunk], left: int) -> None:
        """Starts requests of the queue, in its order, as long as there are tokens, lanes and pages."""
        while left and self.waiting and self.lanes:
            request = next(iter(self.waiting))
            if not self._enter(request, left):
                return
            chunk = self._read(request, left)
            assert chunk, "its pages were counted"
            chunks.append(chunk)
            left -= chunk.stop - chunk.start

    def _enter(self, request: Request, left: int) -> bool:
        """Moves the head of the queue to the running, if the pages of its next chunk are free without preempting."""
        if request.in_flight:  # preempted, and its newest tokens are still on the device
            return False
        refused, needed = self._refused
        if refused is request and needed > self._spare(request):
            return False  # looking its prefix up again would tell nothing new
        spare, free, size = self._spare(request), self.pool.free, self.pool.size
        root = self._root(request)
        shared, chain = self.pool.share(request.tokens, root) if root else ([], None)
        start = len(shared) * size
        stop = min(len(request.tokens), start + left)
        needed = -(-stop // size) - len(shared) + free - self.pool.free
        if needed > spare:
            self.pool.release(shared)
            self._refused = request, needed
            return False
        del self.waiting[request]
        self.running[request] = None
        request.lane, request.pages, request.computed = self.lanes.pop(), shared, start
        request.chain, request.chained = chain, len(shared)
        if not request.preemptions:
            request.cached = start
            self.prompt_tokens += request.prompt_len
            self.cached_tokens += start
        return True

    def _spare(self, request: Request) -> int:
        """Free pages that a prompt may take, short of what running streams will soon need."""
        alone = not self.running or (len(self.running) == 1 and request in self.running)
        return self.pool.free - (0 if alone else self.watermark + self.reserved * (request in self.waiting))

    def _root(self, request: Request) -> tuple | None:
        """Requests with equal roots may share pages; with None it shares with nobody."""
        if self.prefix_caching:
            return (request.salt,)
        return None if request.group is None else (request.salt, request.group)

    def _remember(self, request: Request) -> None:
        """Lets others find the pages that are full, or will be when the steps planned so far have run."""
        if request.chain is None:
            return
        size = self.pool.size
        full = min(request.computed, len(request.tokens)) // size
        for i in range(request.chained, full):
            request.chain = self.pool.remember(
                request.chain, request.tokens[i * size : (i + 1) * size], request.pages[i]
            )
        request.chained = full

    def _leave(self, request: Request) -> None:
        """Takes lane and pages from a running request."""
        self._remember(request)
        self.pool.release(request.pages)
        del self.running[request]
        self.lanes.append(request.lane)
        request.lane, request.pages, request.computed = -1, [], 0
        request.chain, request.chained = None, 0

    def _end(self, request: Request, output: Output) -> None:
        """The last output of a request that runs, waits, or was just refused."""
        if request.lane >= 0:
            self._leave(request)
        else:
            self.waiting.pop(request, None)
        request.finish = output.finish
        if request.outbox is not None:
            request.outbox.put(output)
