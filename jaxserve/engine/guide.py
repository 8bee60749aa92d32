"""Guided decoding: which tokens may come next in an answer that must match a grammar.

llguidance does the work.  A request's Matcher follows the tokens that the host has seen, so it survives preemption and
lost steps as it is.  Knows nothing of the device.

A mask takes a core 5 us to 0.6 ms (SmolLM2's tokens; patterns and strings of bounded length are the dear ones), 64 of
them 3 ms: many threads fill them, while the device computes.  Where it can wait for them itself (engine.gate) a thread
of the guide's makes them when the tokens come, and the engine's thread never waits.

Where a grammar forces a text, llguidance asks in the midst of a mask how the vocabulary spells it: see
`text.grammar.token_table` for why that should not be Python.
"""

import logging
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from jaxserve.engine.matchers import Matcher, Sources, compiled, short
from jaxserve.engine.request import Request

log = logging.getLogger("jaxserve")
BITS = (1 << np.arange(32, dtype=np.uint32)).view(np.int32)  # of the tokens in a word of a mask
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
        self.rows = [(row, request, len(request.tokens)) for row, request in sorted(rows, key=_source)]
        self.rows = [one for one in self.rows if not one[1].finish]
        self.places = np.array([row for row, *_ in self.rows], np.intp)
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
        self._executor, self._eos = LLExecutor(threads), dict[int, int]()  # bits of ends of texts, by word
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
                self._table_words = -(-table.vocab_size // 32)
                for token in sorted(set(table.eos_tokens)):
                    if token < 32 * self.words:
                        self._eos[token // 32] = self._eos.get(token // 32, 0) | int(BITS[token % 32])
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
        rows = sorted(rows, key=_source)
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
            bound[job.places if len(rows) == len(job.rows) else [row for row, *_ in rows]] = 1
            job.ended = self._masks(rows, masks, job.followed)

    def _next(self, rows, steps):
        """The rows that go on, each with what its matcher has yet to follow, when the tokens of `steps` have come."""
        going = []
        for row, request, known in rows:
            came = [token for drawn in steps if (token := drawn.get(request)) is not None]
            if came and (min(came) < 0 or not request.stop_ids.isdisjoint(came)):
                continue
            if known + len(came) > request.limit:
                continue
            followed = request.matcher.followed
            ahead = request.prompt_len + len(followed) - known  # tokens of `came` that were followed before
            if 0 < ahead <= len(came) and came[ahead - 1] == followed[-1]:
                came = came[ahead:]
            elif ahead or not followed or request.tokens[known - 1] != followed[-1]:
                came = self._missed(request, known, came)
            going.append((row, request, came))
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
        going, over = self._follow(rows)
        if followed is not None:
            followed.set()
        over += self._fill(going, masks)
        if ending := self._ending(going, masks):
            # A matcher that failed allows the end, and nothing else.
            again = [one for one in ending if one[1].matcher.matcher.is_error() and self._again(one[1])]
            if again:
                over += self._fill(again, masks)
                ending = self._ending(going, masks)
            failed = {row for row, *_ in over}
            over += self._ends(masks, [one for one in ending if one[0] not in failed])
        for row, request, why in over:
            masks[row], request.matcher.over = -1, why
        return [(request, why) for _, request, why in over]

    def _ending(self, rows: Sequence[tuple[int, Request]], masks: np.ndarray) -> list[tuple[int, Request]]:
        """Those whose texts may end."""
        at, found = np.array([row for row, _ in rows], np.intp), np.zeros(len(rows), bool)
        for word, bits in self._eos.items():
            found |= masks[at, word] & bits != 0
        return [rows[i] for i in np.flatnonzero(found).tolist()]

    def _ends(self, masks: np.ndarray, rows: Sequence[tuple[int, Request]]) -> list[tuple[int, Request, str]]:
        """Puts what ends each request in the place of what ends texts of its grammar; those that can only end."""
        at, ended, stops = np.array([row for row, _ in rows], np.intp), [], defaultdict(list)
        for word, bits in self._eos.items():
            masks[at, word] &= ~bits
        for (row, request), more in zip(rows, masks[at].any(1).tolist()):
            if not more:  # it is complete, or it has gone wrong
                ended.append((row, request, request.matcher.trouble()))
            for token in request.matcher.ends:
                stops[token].append(row)
        for token, these in stops.items():
            masks[these, token // 32] |= BITS[token % 32]
        return ended

    def _follow(self, rows: Sequence[tuple[int, Request, list[int]]]):
        """Tells matchers the tokens that have come since.

        Returns (row, request) of those that need a mask, and (row, request, why) of those that end.  By many threads
        it took no less, for they have to be woken.
        """
        going, over = [], []
        for row, request, tokens in rows:
            state = request.matcher
            try:
                why = self._told(request, tokens) if state.over is None else state.over  # in a step in flight
            except BaseException as error:  # a panic of Rust code
                why = short(str(error)) or type(error).__name__
            if why is not None:
                over.append((row, request, why))
            else:
                going.append((row, request))
        return going, over

    def _told(self, request: Request, tokens: list[int]) -> str | None:
        """Tells a matcher what has come.  "" when the answer is complete, a message on errors, else None."""
        state = request.matcher
        state.follow(tokens)
        for token in state.followed[state.told :]:
            if not (
                state.matcher.consume_token(token) or (self._again(request) and state.matcher.consume_token(token))
            ):
                return state.trouble() or f"token {token} does not match the grammar"
            state.told += 1
        return state.trouble() if state.matcher.is_stopped() else None

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


def _source(pair: tuple[int, Request]) -> int:
    """Neighbours tend to be one thread's work: those that share a lexer would wait for each other on two."""
    return id(pair[1].matcher.source)
