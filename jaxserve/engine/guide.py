"""Guided decoding: which tokens may come next in an answer that must match a grammar.

llguidance does the work; a grammar is its JSON text, checked before it comes here.  A request's Matcher follows the
tokens that the host has seen, so it survives preemption and lost steps as it is.  Knows nothing of the device.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from jaxserve.engine.request import Request

log = logging.getLogger("jaxserve")
# A grammar that was checked before with the same or tighter limits stays within these; a step takes 8 ms at most.
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False)
DEAR = 0.003  # seconds to compile a grammar, from which it is compiled once and copied; copies share a lock
KEPT = 64  # dear grammars ...
KEPT_BYTES = 8 << 20  # ... and their text at most
MESSAGE = 200  # characters of llguidance's errors that are shown


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, request: Request, ends: np.ndarray):
        """ends: token ids that end the answer, as far as the mask has them."""
        self.matcher, self.seen, self.ends = matcher, request.prompt_len, ends

    def trouble(self) -> str:
        """What went wrong in it, or ""."""
        return _short(self.matcher.get_error()) if self.matcher.is_error() else ""


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
        self._dear: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> LLTokenizer:
        """The table, made now if it was not yet.  Safe on any thread."""
        with self._lock:
            if self._table is None:
                table = self._make()
                eos = np.array(sorted(set(table.eos_tokens)), np.int64)
                self._eos, self._table_words = eos[eos < 32 * self.words], -(-table.vocab_size // 32)
                self._table = table
            return self._table

    def open(self, request: Request) -> Matcher:
        """The matcher of a request with a grammar.  ValueError where that is none.  Safe on any thread."""
        assert request.grammar is not None
        table, grammar = self.prepare(), request.grammar
        with self._lock:
            known = self._dear.get(grammar)
            if known is not None:
                self._dear.move_to_end(grammar)
        if known is not None:
            matcher = known.deep_copy()
        else:
            began = time.perf_counter()
            matcher = LLMatcher(table, grammar, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise ValueError(f"the grammar does not work: {_short(matcher.get_error())}")
            if time.perf_counter() - began > DEAR:
                self._keep(grammar, matcher.deep_copy())
        ends = [token for token in request.stop_ids if token < 32 * self.words]
        return Matcher(matcher, request, np.array(sorted(ends), np.int64))

    def _keep(self, grammar: str, matcher: LLMatcher) -> None:
        with self._lock:
            self._dear[grammar] = matcher
            while len(self._dear) > KEPT or sum(map(len, self._dear)) > KEPT_BYTES:
                self._dear.popitem(last=False)

    def allow(self, rows: Sequence[tuple[int, Request]], count: int) -> tuple[np.ndarray, list[tuple[Request, str]]]:
        """What each row may draw, when all tokens of its request are known.

        rows: which rows of `count` have a grammar, and whose they are.  Returns masks, int32[count, words], of which a
        set bit allows a token, the lowest first; the other rows allow all.  And the requests that end here, whose rows
        are free: with "" where the answer is complete, with a message where it cannot go on.
        """
        ended, going = [], []
        for row, request in rows:
            why = self._follow(request)
            if why is None:
                going.append((row, request))
            else:
                ended.append((request, why))
        masks, broken = self._fill(going, count)
        ended += broken
        columns = np.ix_([row for row, _ in going], self._eos // 32)
        eos = (masks[columns] >> (self._eos % 32) & 1).any(1) if going else ()
        for (row, request), can_end in zip(going, eos):
            if can_end and request not in dict(broken):
                mask = masks[row]
                _set(mask, self._eos, 0)
                if not mask.any():  # it can only end, or it has gone wrong
                    ended.append((request, request.matcher.trouble()))
                    mask[:] = -1
                _set(mask, request.matcher.ends, 1)
        return masks, ended

    def _follow(self, request: Request) -> str | None:
        """Tells a matcher the tokens that have come since.  "" when the answer is complete, a message on errors."""
        state = request.matcher
        for token in request.tokens[state.seen :]:
            if not state.matcher.consume_token(token):
                return state.trouble() or f"token {token} does not match the grammar"
        state.seen = len(request.tokens)
        if not state.matcher.is_stopped():
            return None
        return state.trouble()

    def _fill(self, rows, count):
        """The masks of `allow` before ends of answers are looked at, and requests whose matchers failed, and how."""
        masks, broken = np.full((count, self._table_words), -1, np.int32), []
        try:
            if len(rows) == 1:
                fill_next_token_bitmask(rows[0][1].matcher.matcher, masks, rows[0][0])
            elif rows:
                fill_next_token_bitmask_par(self._executor, [(r.matcher.matcher, row) for row, r in rows], masks)
        except BaseException as error:  # a panic of Rust code is no Exception
            log.warning("filling masks failed, row by row again: %s", _short(str(error)))
            for row, request in rows:
                try:
                    fill_next_token_bitmask(request.matcher.matcher, masks, row)
                except BaseException as error:
                    broken.append((request, _short(str(error)) or type(error).__name__))
                    masks[row] = -1
        if self._table_words == self.words:
            return masks, broken
        wide = np.full((count, self.words), -1, np.int32)
        width, at = min(self.words, self._table_words), [row for row, _ in rows]
        wide[at, :] = 0
        wide[at, :width] = masks[at, :width]
        return wide, broken


def _set(mask: np.ndarray, tokens: np.ndarray, value: int) -> None:
    """Allows tokens in a mask, or takes them from it."""
    for token in tokens.tolist():
        bit = np.int32(np.uint32(1 << (token % 32)).view(np.int32))
        if value:
            mask[token // 32] |= bit
        else:
            mask[token // 32] &= ~bit


def _short(message: str) -> str:
    """The first line of an error, without the state of the parser that may follow it."""
    return message.strip().partition("\n")[0][:MESSAGE]
