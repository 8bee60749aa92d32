"""The text of an answer taken apart: what is meant for the user, reasoning, and calls of tools.

Knows the formats that one model writes them in, and no protocol's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from jaxserve.config import GenerationConfig
from jaxserve.reply import Reply, Response
from jaxserve.text import tools
from jaxserve.text.tokenizer import Tokenizer


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
    """Takes the text of one reply apart.  splitter: finds reasoning; parser: finds calls; None where none can be."""

    def __init__(self, reply: Reply, choice: int = 0, splitter=None, parser=None):
        self.reply, self.choice = reply, choice
        self._splitter, self._parser = splitter, parser
        self._called = False

    def take(self) -> Delta | None:
        """What is new since the last call, or None."""
        response = self.reply.take()
        return None if response is None else self.split(response)

    def split(self, response: Response) -> Delta:
        """A part of the answer as `Reply.take` returns it."""
        content, reasoning, finish = response.text, "", response.finish_reason
        calls: list[CallDelta] = []
        if self._splitter is not None:
            reasoning, content = self._splitter.feed(content)
            if finish:
                more, rest = self._splitter.finish()
                reasoning, content = reasoning + more, content + rest
        if self._parser is not None:
            pieces = self._parser.feed(content)
            if finish:
                pieces = [*pieces, *self._parser.finish()]
            content = self._read(pieces, calls)
        if finish == "stop" and self._called:
            finish = "tool_calls"
        return Delta(content, reasoning, calls, response.logprobs, response.token_ids, finish, response)

    def _read(self, pieces: list[tools.Piece], calls: list[CallDelta]) -> str:
        """Adds to `calls`; returns what is no call."""
        content = ""
        for piece in pieces:
            if isinstance(piece, tools.Text):
                content += piece.text
            elif isinstance(piece, tools.Call):
                self._called = True
                calls.append(CallDelta(piece.index, piece.id, piece.name, ""))
            else:
                calls.append(CallDelta(piece.index, None, None, piece.text))
        return content


class Formats:
    """How one model writes calls and reasoning; tool_format and reasoning_format None: it writes none that is known."""

    def __init__(self, tokenizer: Tokenizer, tool_format: str | None = None, reasoning_format: str | None = None):
        self.tokenizer = tokenizer
        self.tools = None if tool_format is None else tools.FORMATS[tool_format]
        self.reasoning = reasoning_format

    def config(self, ask) -> GenerationConfig:
        """How an answer to a protocol.Ask is generated: markers that are special tokens have to be seen."""
        if ask.tools and self.tools is not None and not self.tools.skip_special:
            return replace(ask.config, skip_special_tokens=False)
        return ask.config

    def grammar(self, ask) -> str | None:
        """What the answer must look like, as llguidance's JSON text.  ValueError names a tool that cannot be enforced.

        With tool_choice "auto" only the arguments of functions that are strict are enforced.
        """
        if not ask.tools or self.tools is None or ask.grammar is not None:
            return ask.grammar
        strict = any(tool["function"].get("strict") is True for tool in ask.tools)
        if ask.tool_choice == "auto" and not strict:
            return None
        return self.tools.grammar(ask.tools, ask.tool_choice, ask.parallel_tool_calls, self.tokenizer)

    def voice(self, ask, reply: Reply, choice: int = 0) -> Voice:
        """Who takes one answer apart."""
        parser = None
        if ask.tools and self.tools is not None:
            parser = self.tools.Parser(ask.tools, whole=not ask.stream)
        return Voice(reply, choice, None, parser)
