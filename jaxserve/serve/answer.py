"""One body's answers on their way: from Replies to pieces of content, reasoning and tool calls.

Knows neither HTTP nor any protocol's JSON.
"""

import math
import queue
import secrets
from collections import deque
from dataclasses import dataclass, field

from jaxserve.engine.request import Output, Overloaded
from jaxserve.protocol import Ask
from jaxserve.reply import Reply, Response
from jaxserve.serve.errors import CLIENT_GONE, ApiError, of, of_finish

TRY_AGAIN = 0.2  # seconds until a full engine is asked again for the rest of a long list of prompts


@dataclass(slots=True)
class CallDelta:
    """A piece of a tool call; the first has an id and a name."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(slots=True)
class Delta:
    """What is new in one choice.  finish: "stop", "length", "tool_calls", "error" or "abort"; None: more will come.

    logprobs: a token {id: log-probability}, the one taken first; None if they were not asked for.  response: the same
    as `reply.Response` has it, with counts of all so far.
    """

    content: str
    reasoning: str
    calls: list[CallDelta]
    logprobs: list[dict[int, float]] | None
    token_ids: list[int]
    finish: str | None
    response: Response


@dataclass
class Call:
    """A whole tool call; arguments: JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass
class Message:
    """One choice, whole.  Fields as in Delta."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    response: Response | None = None

    def add(self, delta: Delta) -> None:
        """Takes one more piece."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        for call in delta.calls:
            if call.id is not None:
                self.calls.append(Call(call.id, call.name or "", ""))
            self.calls[call.index].arguments += call.arguments
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.token_ids += delta.token_ids
        self.finish, self.response = delta.finish, delta.response


class Voice:
    """Splits the text of one reply.  splitter: of reasoning; parser: of tool calls; None where there is none to find.

    names: the tools' names in their order, if a call's id is its tool's place there, as InternLM2's calls have it.
    """

    def __init__(self, reply: Reply, choice: int, splitter=None, parser=None, names: tuple[str, ...] | None = None):
        self.reply, self.choice = reply, choice
        self.splitter, self.parser, self.names = splitter, parser, names
        self.called = False

    def take(self) -> Delta | None:
        """What is new since the last call, or None."""
        response = self.reply.take()
        if response is None:
            return None
        content, reasoning, calls = response.text, "", []
        finish = response.finish_reason
        if self.splitter is not None:
            reasoning, content = self.splitter.feed(content)
            if finish:
                more, rest = self.splitter.finish()
                reasoning, content = reasoning + more, content + rest
        if self.parser is not None:
            events = self.parser.feed(content)
            if finish:
                events = [*events, *self.parser.finish()]
            content, calls = self._read(events)
        if finish == "stop" and self.called:
            finish = "tool_calls"
        return Delta(content, reasoning, calls, response.logprobs, response.token_ids, finish, response)

    def _read(self, events) -> tuple[str, list[CallDelta]]:
        """A tool parser's events; they are told apart by their fields."""
        content, calls = "", []
        for event in events:
            if hasattr(event, "name"):
                self.called = True
                calls.append(CallDelta(event.index, self._id(event.name), event.name, ""))
            elif not hasattr(event, "index"):
                content += event.text
            elif calls and calls[-1].index == event.index and calls[-1].id is None:
                calls[-1].arguments += event.text
            else:
                calls.append(CallDelta(event.index, None, None, event.text))
        return content, calls

    def _id(self, name: str) -> str:
        if self.names is not None and name in self.names:
            return str(self.names.index(name))
        return f"call_{secrets.token_hex(12)}"


class Answer:
    """All answers to one body.  Iterating yields (choice, Delta); (-1, None) when nothing came for `heartbeat` seconds.

    choice: the prompt's number times n, plus which of its n.  `close`, from anywhere, aborts what still runs.
    """

    def __init__(
        self, engine, ask: Ask, prompts: list[list[int]], voices: list[Voice], *, window: int, heartbeat: float
    ):
        """Submits, as many as `window` at once; raises what the engine raises, with nothing left behind.

        prompts: their token ids.
        """
        self.ask, self.prompts, self.closed = ask, prompts, False
        self._engine, self._heartbeat = engine, heartbeat
        self._voices = {voice.reply: voice for voice in voices}
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._running: set[Reply] = set()
        self._waiting = deque(voice.reply for voice in voices)
        self._window = window
        self._responses = [voice.reply.whole for voice in voices]
        try:
            while self._waiting and len(self._running) < window:
                self._submit(self._waiting[0])
                self._waiting.popleft()
        except BaseException:
            self.close()
            raise

    def _submit(self, reply: Reply) -> None:
        reply.news = self._news
        self._running.add(reply)
        if reply.request is None:  # no room for a single token
            reply.put(Output(None, "length"))
            return
        try:
            self._engine.submit(reply.request)
        except BaseException as error:
            self._running.discard(reply)
            if isinstance(error, ValueError):
                raise ApiError(400, str(error)) from None
            raise

    def _submit_waiting(self) -> None:
        """The rest of a list of prompts, as earlier ones end; a full engine is asked again."""
        while self._waiting and len(self._running) < self._window:
            try:
                self._submit(self._waiting[0])
            except Overloaded:
                return
            except Exception as error:
                self._running.add(self._waiting[0])
                self._waiting[0].put(Output(None, "error", error=of(error).message))
            self._waiting.popleft()

    def __iter__(self):
        while (self._running or self._waiting) and not self.closed:
            if self._waiting:
                self._submit_waiting()
            try:
                reply = self._news.get(timeout=self._heartbeat if self._running else TRY_AGAIN)
            except queue.Empty:
                yield -1, None
                continue
            if self.closed:
                return
            voice = self._voices[reply]
            delta = voice.take()
            if delta is None:
                continue
            if delta.finish:
                self._running.discard(reply)
                if reply.request and not reply.request.finish:  # ended by a stop word, which the engine does not know
                    self._engine.abort(reply.request)
            yield voice.choice, delta

    def collect(self) -> list[Message]:
        """The whole answers, in the order of their choices.  ApiError if one of them failed, or the client left."""
        messages = [Message() for _ in self._voices]
        for choice, delta in self:
            if delta is not None:
                messages[choice].add(delta)
                if delta.finish in ("error", "abort"):
                    self.close()
                    raise failure(delta)
        if self.closed:
            raise ApiError(CLIENT_GONE, "the client has left")
        return self._best(messages) if self.ask.best_of else messages

    def _best(self, messages: list[Message]) -> list[Message]:
        """Of every prompt's answers those with the likeliest tokens, n of best_of."""
        count, kept = self.ask.best_of or 1, []
        for start in range(0, len(messages), count):
            ranked = sorted(messages[start : start + count], key=_likelihood, reverse=True)
            kept += ranked[: self.ask.config.n]
        if self.ask.config.logprobs is None:
            for message in kept:
                message.logprobs = None
        return kept

    def close(self) -> None:
        """Aborts what still runs.  From any thread; twice is fine."""
        if self.closed:
            return
        self.closed = True
        self._waiting.clear()
        for reply in list(self._running):
            if reply.request:
                self._engine.abort(reply.request)
        self._news.put(None)

    @property
    def prompt_tokens(self) -> int:
        return sum(response.input_token_len for response in self._responses if response.choice == 0)

    @property
    def cached_tokens(self) -> int:
        return sum(response.cached_tokens for response in self._responses if response.choice == 0)

    @property
    def completion_tokens(self) -> int:
        return sum(response.generate_token_len for response in self._responses)


def _likelihood(message: Message) -> float:
    """The mean log-probability of the tokens."""
    chances = [next(iter(row.values())) for row in message.logprobs or ()]
    return sum(chances) / len(chances) if chances else -math.inf


def failure(delta: Delta) -> ApiError:
    """The error that an answer ended in."""
    if delta.finish == "abort":
        return ApiError(503, "the answer was ended by the server, which is shutting down", retry_after=5)
    return of_finish(delta.response.error_message, delta.response.error_code)
