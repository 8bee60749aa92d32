"""Guided decoding: which tokens may come next in an answer that must match a grammar.

llguidance does the work.  A request's Matcher follows the tokens that the host has seen, so it survives preemption and
lost steps as it is.  Knows nothing of the device.

A mask takes a core 5 us to 0.6 ms (SmolLM2's tokens; patterns and strings of bounded length are the dear ones), 64 of
them 3 ms: many threads fill them, while the device computes.  Where it can wait for them itself (engine.gate) a thread
of the guide's makes them when the tokens come, and the engine's thread never waits.

Telling matchers their tokens holds the interpreter, filling masks does not: rows are taken in parts, of which one is
told while those before are filled.

Where a grammar forces a text, its tokens are asked for at once, and their masks need no more of llguidance.  It would
ask itself, in the midst of a mask, and what spells texts is Python: each thread would wait for the interpreter.
"""

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from jaxserve.engine.matchers import Matcher, Sources, compiled, short
from jaxserve.engine.request import Request

log = logging.getLogger("jaxserve")
PARTS = 3  # that the rows of a step are taken in, ...
LEAST = 8  # ... of so many at least
Ended = list[tuple[Request, str]]  # "" where the answer is complete, or why it cannot go on


class Before(Protocol):
    """A step in flight (engine.launch.InFlight)."""

    def drew(self) -> Mapping[Request, int]: ...


class Gate(Protocol):
    """What a step waits for on the device (engine.gate.Gate)."""

    masks: np.ndarray
    bound: np.ndarray

    def next(self) -> tuple[int, Any]: ...

    def open(self, number: int) -> None: ...


class Job:
    """The masks of a step that waits for them at the gate."""

    def __init__(self, rows: Sequence[tuple[int, Request]], before: Sequence[Before], gate: Gate):
        self.rows = [(row, request, len(request.tokens)) for row, request in rows if not request.finish]
        self.before, self.gate = before, gate
        self.number, self.ticket = gate.next()  # the ticket is for the step
        self.ended: Ended = []  # known when the gate is open: before the step draws
        self.followed = threading.Event()  # set once all that is left to do leaves the interpreter to others


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
        self._helpers = ThreadPoolExecutor(PARTS - 1, "jaxserve-guide")
        self.sources = Sources()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

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

    def allow(self, rows: Sequence[tuple[int, Request]], count: int) -> tuple[np.ndarray, Ended]:
        """What each row may draw, when all tokens of its request are known.

        rows: which rows of `count` have a grammar, and whose they are.  Returns masks, int32[count, words], of which a
        set bit allows a token, the lowest first; the other rows allow all.  And the requests that end here, whose rows
        are free.
        """
        masks = np.full((count, self.words), -1, np.int32)
        due = [(row, request, self._missed(request, len(request.tokens), [])) for row, request in rows]
        return masks, self._masks(due, masks)

    def start(self, rows: Sequence[tuple[int, Request]], before: Sequence[Before], gate: Gate) -> Job:
        """Begins `allow` on the guide's thread for a step that is to wait at the gate.

        before: the steps in flight, the oldest first.  Whatever happens, the gate opens when these have drawn.  Rows
        are free, too, whose requests end with what comes.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="jaxserve-guide", daemon=True)
            self._thread.start()
        job = Job(rows, before, gate)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Ends the guide's thread, when it has done what was started."""
        self._jobs.put(None)

    # ----------------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._made(job)
            except BaseException as error:
                log.warning("masks could not be made: %s", short(str(error)), exc_info=True)
                job.gate.bound[:] = 0
                job.ended = [(request, f"no mask could be made: {short(str(error))}") for _, request, _ in job.rows]
            finally:
                job.gate.open(job.number)
                job.followed.set()
                job.before = ()
            del job

    def _made(self, job: Job) -> None:
        """The gate's memory is free when all steps before have drawn: each has got its masks by then."""
        drawn, masks, bound = [step.drew() for step in job.before], job.gate.masks, job.gate.bound
        rows = self._next(job.rows, drawn)
        bound[:] = 0
        if rows:
            bound[[row for row, *_ in rows]] = 1
            job.ended = self._masks(rows, masks, job.followed)

    def _next(self, rows, steps):
        """The rows that go on, each with what its matcher has yet to follow, when the tokens of `steps` have come."""
        going = []
        for row, request, known in rows:
            came = [token for drawn in steps if (token := drawn.get(request)) is not None]
            if came and (min(came) < 0 or not request.stop_ids.isdisjoint(came)):
                continue
            if known + len(came) <= request.limit:
                going.append((row, request, self._missed(request, known, came)))
        return going

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

    def _masks(
        self,
        rows: Sequence[tuple[int, Request, list[int]]],
        masks: np.ndarray,
        followed: threading.Event | None = None,
    ) -> Ended:
        """`allow` for rows with the tokens that each has yet to follow.  Of `masks` these rows are written."""
        # Neighbours tend to be one thread's work: those that share a lexer would wait for each other on two.
        rows = sorted(rows, key=lambda row: id(row[1].matcher.source))
        count = max(1, min(PARTS, len(rows) // LEAST))
        parts = [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]
        left = list(range(count))  # parts that have yet to follow

        def part(rows):
            going, forced, over = self._follow(rows)
            if forced:
                self._force(forced, masks)
            left.pop()
            if not left and followed is not None:
                followed.set()
            return going, over + self._fill(going, masks)

        others = [self._helpers.submit(part, each) for each in parts[1:]]
        try:
            going, over = part(parts[0])
        finally:  # nobody writes masks any more, whatever happens
            _ = [other.exception() for other in others]
        for other in others:
            more, failed = other.result()
            going, over = going + more, over + failed
        if going:
            at = np.array([row for row, _ in going])
            can_end = (masks[at[:, None], self._eos // 32] >> (self._eos % 32) & 1).any(1)
            if can_end.any():
                failed = {row for row, *_ in over}
                over += self._ends(masks, [one for one, can in zip(going, can_end) if can and one[0] not in failed])
        for row, request, why in over:
            masks[row], request.matcher.over = -1, why
        return [(request, why) for _, request, why in over]

    def _force(self, forced: Mapping[int, int], masks: np.ndarray) -> None:
        """Leaves rows one token each."""
        at, tokens = np.array(list(forced)), np.array(list(forced.values()))
        words = np.minimum(tokens // 32, self.words - 1)
        masks[at] = 0
        masks[at, words] = np.where(tokens < 32 * self.words, 1 << tokens % 32, 0).astype(np.uint32).view(np.int32)

    def _ends(self, masks: np.ndarray, rows: Sequence[tuple[int, Request]]) -> list[tuple[int, Request, str]]:
        """Puts what ends each request in the place of what ends texts of its grammar; those that can only end."""
        at, ended, stops = np.array([row for row, _ in rows], np.intp), [], defaultdict(list)
        for token in self._eos.tolist():
            masks[at, token // 32] &= ~_bit(token)
        for (row, request), more in zip(rows, masks[at].any(1).tolist()):
            if not more:  # it is complete, or it has gone wrong
                ended.append((row, request, request.matcher.trouble()))
            for token in request.matcher.ends:
                stops[token].append(row)
        for token, these in stops.items():
            masks[these, token // 32] |= _bit(token)
        return ended

    def _follow(self, rows: Sequence[tuple[int, Request, list[int]]]):
        """Tells matchers the tokens that have come since.

        Returns (row, request) of those that need a mask, {row: token} of those where only that may come, and (row,
        request, why) of those that end.  2 to 5 us a row, all of which hold the interpreter: by many threads it took
        no less, for they have to be woken.
        """
        going, forced, over = [], {}, []
        for row, request, tokens in rows:
            state = request.matcher
            try:
                why = self._told(request, tokens) if state.over is None else state.over  # in a step in flight
            except BaseException as error:  # a panic of Rust code
                why = short(str(error)) or type(error).__name__
            if why is not None:
                over.append((row, request, why))
            elif state.forced:
                forced[row] = state.forced[0]
            else:
                going.append((row, request))
        return going, forced, over

    def _told(self, request: Request, tokens: list[int]) -> str | None:
        """Tells a matcher what has come.  "" when the answer is complete, a message on errors, else None."""
        state = request.matcher
        state.follow(tokens)
        if state.forced:
            return None
        for token in state.followed[state.told :]:
            if not (
                state.matcher.consume_token(token) or (self._again(request) and state.matcher.consume_token(token))
            ):
                return state.trouble() or f"token {token} does not match the grammar"
            state.told += 1
        if state.matcher.is_stopped():
            return state.trouble()
        state.ahead()
        return None

    def _fill(self, rows: Sequence[tuple[int, Request]], masks: np.ndarray) -> list[tuple[int, Request, str]]:
        """Fills the masks of `allow`, before ends of answers are looked at.

        Returns those whose matchers failed, and how.
        """
        if not rows:
            return []
        narrow = self._table_words != self.words
        found, broken = np.empty((len(masks), self._table_words), np.int32) if narrow else masks, []
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
                    broken.append((row, request, short(str(error)) or type(error).__name__))
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
