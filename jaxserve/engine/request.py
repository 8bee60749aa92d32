"""A request as the engine sees it: token ids in, token ids out.

Knows nothing of text, of HTTP or of the device.  Values are checked for users in `config.GenerationConfig`; here only
what cannot happen is asserted.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol


class EngineDead(RuntimeError):
    """The engine has stopped and takes no more requests."""


class Overloaded(RuntimeError):
    """Too much is queued already; the same request may be served later."""

    def __init__(self, message: str = "the server has as many requests as it takes", retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after  # seconds


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn."""

    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token id sequences that must not appear, at most 5 long
    min_new_tokens: int = 0  # no stop id before that many
    logprobs: int | None = None  # alternatives reported beside each token; None = no logprobs at all

    def __post_init__(self):
        assert self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1
        assert self.repetition_penalty > 0 and self.min_new_tokens >= 0
        assert all(1 <= len(word) <= 5 for word in self.bad_words)
        assert self.logprobs is None or 0 <= self.logprobs <= 20

    @cached_property  # the runner asks for every row of every step
    def tables(self) -> bool:
        """Whether it needs tables of its lane: counts of tokens, biases, banned sequences."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        return penalties or bool(self.logit_bias or self.bad_words or self.min_new_tokens)

    @cached_property
    def plain(self) -> bool:
        """Whether the greedy program can serve it."""
        return (self.temperature == 0 or self.top_k == 1) and not self.tables and self.logprobs is None


@dataclass(slots=True)  # made for every token: frozen would take five times as long
class Output:
    """One token of the answer, or its end without a token (abort, error, no room for any).  The last has `finish`.

    A stop id is delivered like any token, with finish "stop"; whoever prints leaves it out.
    """

    token: int | None
    finish: str | None = None  # "stop", "length", "abort" or "error"
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens with their logprobs
    error: str | None = None  # what went wrong, with finish "error"


class Outbox(Protocol):
    """Where the answer goes; `put` is called on the engine's thread and must not block."""

    def put(self, output: Output, /) -> Any: ...


@dataclass(eq=False, slots=True, weakref_slot=True)  # read for every row of every step: a fifth faster so
class Request:
    """One prompt, its answer so far, and where it stands."""

    tokens: list[int] = field(repr=False)  # the prompt, then what was sampled
    max_new_tokens: int
    params: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()  # empty: ignore_eos
    outbox: Outbox | None = field(default=None, repr=False)
    id: str = ""
    group: Hashable = None  # the same for all n answers to one prompt
    salt: Hashable = None  # cached pages are shared only between equal salts
    grammar: str | None = field(default=None, repr=False)  # what the answer must match: llguidance's JSON text

    arrival: int = 0  # its place in the order in which requests and scoring jobs came
    matcher: Any = field(default=None, repr=False)  # with a grammar: where the answer stands in it (engine.guide)
    computed: int = 0  # positions whose keys are in the cache, or on their way
    in_flight: int = 0  # tokens sampled on the device that the host has not seen
    lane: int = -1  # its seat on the device while it runs
    pages: list[int] = field(default_factory=list, repr=False)
    finish: str | None = None
    cached: int = 0  # prompt tokens that came from the prefix cache
    preemptions: int = 0
    delayed: bool = False  # a step read less than a quarter of what it could have read (Scheduler._cut)
    recoveries: int = 0  # steps that failed under it and were computed again
    chained: int = 0  # its first pages, as many, are in the prefix cache ...
    chain: Hashable = field(default=None, repr=False)  # ... and this is where the next one links to
    prompt_len: int = field(init=False)
    limit: int = field(init=False)  # positions it may ever compute: the last sampled token is never fed back

    def __post_init__(self):
        assert self.tokens, "a prompt has at least one token"
        assert self.max_new_tokens >= 0
        self.prompt_len = len(self.tokens)
        self.limit = self.prompt_len + self.max_new_tokens - 1

    @property
    def length(self) -> int:
        """Tokens that exist, those still on the device included."""
        return len(self.tokens) + self.in_flight

    @property
    def ready(self) -> bool:
        """Whether a position is left to compute."""
        return self.computed < min(self.length, self.limit)

    @property
    def output(self) -> list[int]:
        """The tokens sampled so far."""
        return self.tokens[self.prompt_len :]
