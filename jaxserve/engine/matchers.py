"""Compiled grammars, and where each answer stands in its own.

A grammar is llguidance's JSON text, checked before it comes here.
"""

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jaxserve.engine.request import Request

# A grammar that was checked before with the same or tighter limits stays within these; a step takes 8 ms at most.
LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=20_000, max_lexer_states=20_000, verbose_errors=False)
DEAR = 0.003  # seconds of a processor to compile a grammar, from which on few lexers must do for many answers
FEW = 8
MANY = 64  # lexers of one grammar; 0.1 to 0.5 MB each as a rule
WORN = 5_000  # tokens that answers followed with a lexer, after which it is not lent again; ten times as many if dear
KEPT = 256  # lexers in all, of at most 10 MB by then ...
KEPT_BYTES = 8 << 20  # ... and the text of their grammars at most
MESSAGE = 200  # characters of llguidance's errors that are shown


class Source:
    """A compiled grammar before its first token.

    Its copies share its lexer: what it has worked out for one answer it knows for the next, but masks of two copies
    are filled one after the other.
    """

    def __init__(self, matcher: LLMatcher, dear: bool):
        self.matcher, self.dear = matcher, dear
        self.answers = 1  # that follow a copy of it now
        self.tokens = 0  # that such have followed

    @property
    def worn(self) -> bool:
        """Whether its lexer may have grown large."""
        return self.tokens >= (10 * WORN if self.dear else WORN)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, source: Source, request: Request, ends: Iterable[int]):
        """ends: token ids that end the answer, as far as the mask has them."""
        self.matcher, self.source = source.matcher.deep_copy(), source
        self.prompt_len, self.ends = request.prompt_len, tuple(ends)
        self.followed: list[int] = []  # tokens of the answer; its request may have yet to get the newest
        self.told = 0  # how many of these llguidance's matcher has been told
        self.alone = False  # whether no other answer ever used its lexer
        self.over: str | None = None  # why nothing more may come: "" where the answer is complete, or what is wrong

    @property
    def seen(self) -> int:
        """Tokens of its request that it has followed, with the prompt."""
        return self.prompt_len + len(self.followed)

    def follow(self, tokens: Sequence[int]) -> None:
        """Notes tokens that have come, which llguidance's matcher is to be told."""
        self.followed += tokens
        self.source.tokens += len(tokens)

    def trouble(self) -> str:
        """What went wrong in it, or ""."""
        return short(self.matcher.get_error()) if self.matcher.is_error() else ""

    def renew(self, matcher: LLMatcher, tokens: list[int]) -> None:
        """Goes on with another of llguidance's, with a lexer of its own, from where the answer has `tokens`."""
        self.matcher, self.alone = matcher, True
        matcher.consume_tokens(tokens)
        self.followed, self.told, self.over = list(tokens), len(tokens), None


class Sources:
    """The sources of all grammars, and who follows copies of them.  On any thread."""

    def __init__(self):
        self.of: OrderedDict[str, list[Source]] = OrderedDict()  # by grammar, the least recently used first
        self._lent: list[tuple[weakref.ref[Request], Source]] = []
        self._lock = threading.Lock()

    def open(self, table: LLTokenizer, request: Request, ends: Iterable[int]) -> Matcher:
        """The matcher of a request with a grammar.  ValueError where that is none."""
        assert request.grammar is not None
        source = self._idle(request.grammar)
        if source is None:
            began = time.thread_time()  # not the clock: other threads may have the interpreter for milliseconds
            matcher = compiled(table, request.grammar)
            if matcher.is_error():
                raise ValueError(f"the grammar does not work: {short(matcher.get_error())}")
            source = Source(matcher, time.thread_time() - began > DEAR)
            self._keep(request.grammar, source)
        with self._lock:
            self._lent.append((weakref.ref(request), source))
        return Matcher(source, request, ends)

    def forget(self, grammar: str) -> None:
        """The next answer gets another source."""
        with self._lock:
            self.of.pop(grammar, None)

    def _idle(self, grammar: str) -> Source | None:
        """What to copy for one more answer; None: another is to be compiled, lest two answers wait for each other."""
        with self._lock:
            lent, self._lent = self._lent, []
            for who, source in lent:
                request = who()
                if request is None or request.finish:
                    source.answers -= 1
                else:
                    self._lent.append((who, source))
            sources = [source for source in self.of.pop(grammar, ()) if not source.worn]
            if not sources:
                return None
            self.of[grammar] = sources
            least = min(sources, key=lambda source: source.answers)
            if least.answers and len(sources) < (FEW if least.dear else MANY):
                return None
            least.answers += 1
            return least

    def _keep(self, grammar: str, source: Source) -> None:
        with self._lock:
            self.of.setdefault(grammar, []).append(source)
            self.of.move_to_end(grammar)
            while sum(map(len, self.of.values())) > KEPT or sum(map(len, self.of)) > KEPT_BYTES:
                self.of.popitem(last=False)


def compiled(table: LLTokenizer, grammar: str) -> LLMatcher:
    """A grammar before its first token, with a lexer of its own; it may be an error."""
    return LLMatcher(table, grammar, log_level=0, limits=LIMITS)


def short(message: str) -> str:
    """The first line of an error, without the state of the parser that may follow it."""
    return message.strip().partition("\n")[0][:MESSAGE]
