"""Guided decoding: which tokens may come next in an answer that must match a grammar.

llguidance does the work.  A request's Matcher follows the tokens that the host has seen, so it survives preemption and
lost steps as it is.  Knows nothing of the device.

A mask takes a core 5 us to 0.6 ms (SmolLM2's tokens; patterns and strings of bounded length are the dear ones), 64 of
them 3 ms: many threads fill them, while the device computes and the engine's thread prepares the step after.  A step
waits for its dearest mask, so those that will be dear are begun before the tokens of the other rows are looked at.

Where a grammar forces a text, its tokens are asked for at once, and their masks need no more of llguidance.  It would
ask itself, in the midst of a mask, and what spells texts is Python: each thread would wait for the interpreter.
"""

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from jaxserve.engine.matchers import Matcher, Sources, compiled, short
from jaxserve.engine.request import Request

log = logging.getLogger("jaxserve")
SPLIT = 32  # rows from which on their masks are begun in two parts; of 16, waiting for the other part costs as much
WIDE = 1024  # tokens that a mask allows, from which on the next is likely to be dear: in the midst of a string


class _Job:
    """Masks that the guide's own thread makes."""

    def __init__(self, key, rows, count, read):
        self.key, self.rows, self.count, self.read = key, rows, count, read
        self.followed, self.done = (threading.Event(), threading.Event()), threading.Event()  # each part; all
        self.found: tuple[np.ndarray, list[tuple[Request, str]]] | None = None


class Guide:
    """Makes matchers and fills masks for the requests of one engine."""

    def __init__(self, table: LLTokenizer | Callable[[], LLTokenizer], vocab: int, threads: int | None = None):
        """table: the vocabulary's bytes, or what makes them, when they are needed first.  vocab: columns of a mask.

        threads: that fill masks; None: most of the machine's processors.
        """
        self.words, self._table_words = -(-vocab // 32), 0
        self._make = table if callable(table) else lambda: table
        self._table: LLTokenizer | None = None
        self._executor, self._eos = LLExecutor(threads), np.zeros(0, np.int64)
        self.sources = Sources()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._job: _Job | None = None
        self._newest: tuple | None = None  # rows and masks of the last job
        self._helper = ThreadPoolExecutor(1, "jaxserve-guide-helper")

    # From any thread ------------------------------------------------------------------------------------------------

    def prepare(self) -> LLTokenizer:
        """The table, made now if it was not yet."""
        with self._lock:
            if self._table is None:
                table = self._make()
                eos = np.array(sorted(set(table.eos_tokens)), np.int64)
                self._eos, self._table_words = eos[eos < 32 * self.words], -(-table.vocab_size // 32)
                self._table = table
            return self._table

    def open(self, request: Request) -> Matcher:
        """The matcher of a request with a grammar.  ValueError where that is none."""
        table = self.prepare()
        return self.sources.open(table, request, sorted(token for token in request.stop_ids if token < 32 * self.words))

    # From the engine's thread ---------------------------------------------------------------------------------------

    def allow(self, rows: Sequence[tuple[int, Request]], count: int) -> tuple[np.ndarray, list[tuple[Request, str]]]:
        """What each row may draw, when all tokens of its request are known.

        rows: which rows of `count` have a grammar, and whose they are.  Returns masks, int32[count, words], of which a
        set bit allows a token, the lowest first; the other rows allow all.  And the requests that end here, whose rows
        are free: with "" where the answer is complete, with a message where it cannot go on.
        """
        self._wait()
        due = [(row, request, self._missed(request, len(request.tokens), [])) for row, request in rows]
        return self._masks(due, self._blank(count))

    def start(
        self,
        rows: Sequence[tuple[int, Request]],
        count: int,
        read: Callable[[], Iterable[Mapping[Request, int]]],
        without: Container[Request] = (),
    ) -> None:
        """Begins `allow` on another thread, for requests whose newest tokens are on their way; `take` ends it.

        read: gives those tokens for each step in flight, the oldest first, as they come; one below 0 is no token.  Rows
        stay free whose requests are `without`, or end with a token that comes.
        """
        self._wait()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="jaxserve-guide", daemon=True)
            self._thread.start()
        going = [(row, request) for row, request in rows if not request.finish and request not in without]
        self._job = _Job(rows, [(row, request, len(request.tokens)) for row, request in going], count, read)
        self._jobs.put(self._job)

    def make_way(self) -> None:
        """Waits until what was started no longer needs the interpreter, only processors: until masks are being filled.

        The thread that does it would else wait for whatever Python code runs when the tokens come.
        """
        if self._job is not None:
            for part in self._job.followed:
                part.wait()

    def take(self, rows: Sequence) -> tuple[np.ndarray, list[tuple[Request, str]]] | None:
        """Waits for what was started.  None where that was not for these very `rows`, or failed."""
        job = self._wait()
        return job.found if job is not None and job.key is rows else None

    def _wait(self) -> _Job | None:
        """What was started, once it is done."""
        job, self._job = self._job, None
        if job is not None:
            job.done.wait()
        return job

    def close(self) -> None:
        """Ends the guide's threads."""
        self._jobs.put(None)
        self._helper.shutdown(wait=False)

    # ----------------------------------------------------------------------------------------------------------------

    def _work(self):
        while (job := self._jobs.get()) is not None:
            try:
                job.found = self._made(job)
            except BaseException as error:  # whoever waits does it again, and meets it there
                log.debug("masks were not made ahead: %s", short(str(error)))
            for event in (*job.followed, job.done):
                event.set()
            del job

    def _made(self, job: _Job) -> tuple[np.ndarray, list[tuple[Request, str]]]:
        """The masks of a job, as `allow` returns them.

        This thread begins with those that take long: once it waits for them it leaves the interpreter to the helper,
        which follows the tokens of the others.
        """
        # While the tokens are on their way.
        if self._newest is not None:
            self._note(*self._newest)
        masks, (first, others) = self._blank(job.count), self._split(job.rows)
        self._newest = None
        drawn = list(job.read())

        def part(rows, followed):
            try:
                return self._masks(self._next(rows, drawn), masks, followed)[1]
            finally:
                followed.set()

        helper = [self._helper.submit(part, others, job.followed[1])] if others else []
        if not others:
            job.followed[1].set()
        try:
            ended = part(first, job.followed[0])
        finally:
            for future in helper:  # whatever comes of it: two threads never have one matcher
                future.exception()
        self._newest = job.rows, masks
        return masks, ended + [one for future in helper for one in future.result()]

    def _split(self, rows):
        """The rows whose masks are to be begun first, a quarter to a half of them, and the others.

        Whoever shares a lexer is in one part: following a token waits for whoever fills a mask with it.
        """
        if len(rows) < SPLIT:
            return rows, []
        slow = {id(request.matcher.source) for _, request, _ in rows if request.matcher.slow}
        keys = [id(request.matcher.source) for _, request, _ in rows]
        order = sorted(range(len(rows)), key=lambda i: (keys[i] not in slow, keys[i]))
        end = min(max(len(rows) // 4, sum(key in slow for key in keys)), len(rows) // 2)
        while end < len(rows) and keys[order[end]] == keys[order[end - 1]]:
            end += 1
        return [rows[i] for i in order[:end]], [rows[i] for i in order[end:]]

    def _note(self, rows, masks: np.ndarray) -> None:
        """Notes which masks are likely to take long in the next step: in strings, or where one may begin.

        That is where many tokens are allowed, as far as one word in eight tells, and where a forced text ends.
        """
        counts = np.bitwise_count(masks[:, ::8].view(np.uint32)).sum(1, dtype=np.int32)
        for (_, request, _), wide in zip(rows, (counts[[row for row, *_ in rows]] >= WIDE // 8).tolist(), strict=True):
            request.matcher.slow = wide or len(request.matcher.forced) == 1

    def _blank(self, count: int) -> np.ndarray:
        return np.full((count, self.words), -1, np.int32)

    def _next(self, rows, steps):
        """The rows that go on, each with what its matcher has yet to follow, when the tokens of `steps` have come."""
        going: list[tuple[int, Request, int, list[int]]] = [(*each, []) for each in rows]
        for drawn in steps:
            left = []
            for each in going:
                request = each[1]
                if (token := drawn.get(request)) is not None:
                    if token < 0 or token in request.stop_ids:
                        continue
                    each[3].append(token)
                left.append(each)
            going = left
        return [
            (row, request, self._missed(request, known, came))
            for row, request, known, came in going
            if known + len(came) <= request.limit
        ]

    def _missed(self, request: Request, known: int, came: list[int]) -> list[int]:
        """The tokens that a matcher has yet to follow, of the first `known` and those that came since.

        One that was lost with its step, after the matcher had followed it, is taken back.
        """
        state = request.matcher
        if state.followed:
            seen = state.seen
            last = request.tokens[seen - 1 : known] if seen <= known else came[seen - 1 - known : seen - known]
            if not last or last[0] != state.followed[-1]:
                self._renew(request, request.tokens[request.prompt_len : known])
        seen = state.seen
        return came[seen - known :] if seen >= known else [*request.tokens[seen:known], *came]

    def _masks(self, rows: Sequence[tuple[int, Request, list[int]]], masks: np.ndarray, followed=None):
        """`allow` for rows with the tokens that each has yet to follow, into masks that allow all.

        followed: an event to set when they have.
        """
        going, forced, ended = self._follow(rows)
        if followed is not None:
            followed.set()
        broken = self._fill(going, masks)
        ended += broken
        if forced:
            at, tokens = np.array(list(forced)), np.array(list(forced.values()))
            words = np.minimum(tokens // 32, self.words - 1)
            masks[at] = 0
            masks[at, words] = np.where(tokens < 32 * self.words, 1 << tokens % 32, 0).astype(np.uint32).view(np.int32)
        if not going:
            return masks, ended
        at = np.array([row for row, _ in going])
        can_end = (masks[at[:, None], self._eos // 32] >> (self._eos % 32) & 1).any(1)
        if can_end.any():
            failed = {request for request, _ in broken}
            ending = [(row, request) for (row, request), can in zip(going, can_end) if can and request not in failed]
            ended += self._ends(masks, ending)
        return masks, ended

    def _ends(self, masks: np.ndarray, rows: Sequence[tuple[int, Request]]) -> list[tuple[Request, str]]:
        """Puts what ends each request in the place of what ends texts of its grammar; those that can only end."""
        at, ended, stops = np.array([row for row, _ in rows], np.intp), [], defaultdict(list)
        for token in self._eos.tolist():
            masks[at, token // 32] &= ~_bit(token)
        for (row, request), more in zip(rows, masks[at].any(1).tolist()):
            if not more:  # it is complete, or it has gone wrong
                ended.append((request, request.matcher.trouble()))
                masks[row] = -1
            for token in request.matcher.ends:
                stops[token].append(row)
        for token, these in stops.items():
            masks[these, token // 32] |= _bit(token)
        return ended

    def _follow(self, rows: Sequence[tuple[int, Request, list[int]]]):
        """Tells matchers the tokens that have come since.

        Returns (row, request) of those that need a mask, {row: token} of those where only that may come, and (request,
        why) of those that end: "" when the answer is complete, a message on errors.  2 to 5 us a row, all of which hold
        the interpreter: by many threads it took no less, for they have to be woken.
        """
        going, forced, ended = [], {}, []
        for row, request, tokens in rows:
            state = request.matcher
            state.follow(tokens)
            if not state.forced:
                why = self._told(request)
                if why is not None:
                    ended.append((request, why))
                    continue
                if not request.matcher.ahead():
                    going.append((row, request))
                    continue
            forced[row] = state.forced[0]
        return going, forced, ended

    def _told(self, request: Request) -> str | None:
        """Tells a matcher what is due.  "" when the answer is complete, a message on errors, else None."""
        state = request.matcher
        for token in state.followed[state.told :]:
            if not (
                state.matcher.consume_token(token) or (self._again(request) and state.matcher.consume_token(token))
            ):
                return state.trouble() or f"token {token} does not match the grammar"
            state.told += 1
        if not state.matcher.is_stopped():
            return None
        return state.trouble()

    def _fill(self, rows: Sequence[tuple[int, Request]], masks: np.ndarray) -> list[tuple[Request, str]]:
        """Fills the masks of `allow`, before ends of answers are looked at.

        Returns the requests whose matchers failed, and how.
        """
        if not rows:
            return []
        narrow = self._table_words != self.words
        found, broken = np.empty((len(masks), self._table_words), np.int32) if narrow else masks, []
        # Neighbours tend to be one thread's work: those that share a lexer would wait for each other on two.
        rows = sorted(rows, key=lambda pair: id(pair[1].matcher.source))
        try:
            if len(rows) == 1:
                fill_next_token_bitmask(rows[0][1].matcher.matcher, found, rows[0][0])
            else:
                fill_next_token_bitmask_par(self._executor, [(r.matcher.matcher, row) for row, r in rows], found)
            for row, request in rows:
                if request.matcher.matcher.is_error() and self._again(request):
                    fill_next_token_bitmask(request.matcher.matcher, found, row)
        except BaseException as error:  # a panic of Rust code is no Exception
            log.warning("filling masks failed, row by row again: %s", short(str(error)))
            for row, request in rows:
                try:
                    fill_next_token_bitmask(request.matcher.matcher, found, row)
                except BaseException as error:
                    broken.append((request, short(str(error)) or type(error).__name__))
                    found[row] = -1
        if narrow:
            width, at = min(self.words, self._table_words), [row for row, _ in rows]
            masks[at] = 0
            masks[at, :width] = found[at, :width]
        return broken

    def _again(self, request: Request) -> bool:
        """After an error: whether a lexer of its own may help, which it has now.

        A lexer that many answers have used may be full of their states, see LIMITS.
        """
        state = request.matcher
        if state.alone or not state.matcher.is_error():
            return False
        self.sources.forget(request.grammar or "")
        due = state.followed[state.told :]
        self._renew(request, state.followed[: state.told])
        state.followed += due
        return not state.matcher.is_error()

    def _renew(self, request: Request, tokens: list[int]) -> None:
        """Puts a request's matcher to where the answer has `tokens`, with a lexer of its own."""
        assert request.grammar is not None
        request.matcher.renew(compiled(self.prepare(), request.grammar), tokens)


def _bit(token: int) -> np.int32:
    """The bit of a token in its word of a mask."""
    return np.uint32(1 << token % 32).view(np.int32)
