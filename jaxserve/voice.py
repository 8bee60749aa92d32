"""The text of an answer taken apart: what is meant for the user, reasoning, and calls of tools.

Knows the formats that one model writes them in, and no protocol's JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jaxserve.bodies import ParamError
from jaxserve.config import GenerationConfig
from jaxserve.reply import Author, Reply, Response
from jaxserve.text import reasoning, tools
from jaxserve.text.tokenizer import Tokenizer

TAIL = 16  # tokens at a prompt's end that tell whether reasoning has begun


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

    @classmethod
    def of(cls, deltas: Sequence[Delta]) -> Message:
        """All pieces of a choice, joined at once: adding one after the other would copy the text every time."""
        calls: list[tuple[CallDelta, list[str]]] = []
        for call in (call for delta in deltas for call in delta.calls):
            if call.id is not None:
                calls.append((call, []))
            calls[call.index][1].append(call.arguments)
        chances = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        return cls(
            "".join(delta.content for delta in deltas),
            "".join(delta.reasoning for delta in deltas),
            [Call(call.id or "", call.name or "", "".join(arguments)) for call, arguments in calls],
            [row for rows in chances for row in rows] if chances else None,
            [token for delta in deltas for token in delta.token_ids],
            deltas[-1].finish,
            deltas[-1].response,
        )


class Voice:
    """Takes the text of one reply apart.

    splitter: finds reasoning; parser: finds calls; None where none can be.  count: the tokens of reasoning, from the
    answer's token ids and the reasoning's text.
    """

    def __init__(self, reply: Reply, choice: int = 0, splitter=None, parser=None, count=None):
        self.reply, self.choice = reply, choice
        self.reasoning_tokens = 0  # known at the end
        self._splitter, self._parser, self._count = splitter, parser, count
        self._thoughts: list[str] = []
        self._called = False

    def take(self) -> Delta | None:
        """What is new since the last call, or None."""
        response = self.reply.take()
        return None if response is None else self.split(response)

    def split(self, response: Response) -> Delta:
        """A part of the answer as `Reply.take` returns it."""
        content, thoughts, finish = response.text, "", response.finish_reason
        calls: list[CallDelta] = []
        if self._splitter is not None:
            thoughts, content = self._splitter.feed(content)
            if finish:
                more, rest = self._splitter.finish()
                thoughts, content = thoughts + more, content + rest
            if thoughts:
                self._thoughts.append(thoughts)
            if finish and self._thoughts:
                self.reasoning_tokens = self._count(self.reply.whole.token_ids, "".join(self._thoughts))
        if self._parser is not None:
            pieces = self._parser.feed(content)
            if finish:
                pieces = [*pieces, *self._parser.finish()]
            content = self._read(pieces, calls)
        if finish == "stop" and self._called:
            finish = "tool_calls"
        return Delta(content, thoughts, calls, response.logprobs, response.token_ids, finish, response)

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


def best(messages: list[Message], ask) -> list[Message]:
    """Of the best_of answers to every prompt of a protocol.Ask, the n whose tokens are the likeliest on average."""
    if not ask.best_of:
        return messages
    kept: list[Message] = []
    for start in range(0, len(messages), ask.best_of):
        ranked = sorted(messages[start : start + ask.best_of], key=_likelihood, reverse=True)
        kept += ranked[: ask.config.n]
    if ask.config.logprobs is None:
        for message in kept:
            message.logprobs = None
    return kept


def _likelihood(message: Message) -> float:
    chances = [next(iter(row.values())) for row in message.logprobs or ()]
    return sum(chances) / len(chances) if chances else -math.inf


class Formats:
    """How one model writes calls and reasoning; None: it writes none that is known.

    tool_format, reasoning_format: names of jaxserve.text.tools and .reasoning, or LMDeploy's or vLLM's for them.
    """

    def __init__(self, tokenizer: Tokenizer, tool_format: str | None = None, reasoning_format: str | None = None):
        self.tokenizer = tokenizer
        self.tools = None if tool_format is None else tools.FORMATS[tools.named(tool_format)]
        self.reasoning = None if reasoning_format is None else reasoning.named(reasoning_format)
        self._special_tags, self._end_id = False, None
        if self.reasoning is not None:
            tags = reasoning.FORMATS[self.reasoning]
            ids = [tokenizer.id_of(tag) for tag in (tags.start, tags.end)]
            self._special_tags, self._end_id = any(id in tokenizer.special_ids for id in ids), ids[1]

    def voices(self, author: Author, ask, prompts: list[list[int]], live: bool = False) -> list[Voice]:
        """The answers to the prompts (token ids) of a protocol.Ask, not yet submitted; ParamError as far as it goes.

        live: somebody reads along.  Their choices are numbered by prompt, and by the answer of its n or best_of.
        """
        config, count = self._config(ask), ask.best_of or ask.config.n
        if ask.best_of:
            config = replace(config, n=count, logprobs=config.logprobs or 0)
        opened = self._opens(ask, prompts[0])
        grammar = self._grammar(author, ask, opened)
        made = []
        for index, tokens in enumerate(prompts):
            try:
                replies = author.replies(
                    tokens, config, index=index, live=live, continues=not ask.chat, grammar=grammar
                )
            except ValueError as error:  # a bad word of too many tokens
                raise ParamError("bad_words" if config.bad_words else None, str(error)) from None
            made += [self._voice(ask, reply, index * count + reply.whole.choice, opened) for reply in replies]
        return made

    def _opens(self, ask, tokens: list[int]) -> bool:
        """Whether the answer to a prompt begins with reasoning, without saying so."""
        if self.reasoning is None or not ask.chat:
            return False
        return reasoning.opens(self.reasoning, self.tokenizer.decode(tokens[-TAIL:], skip_special=False))

    def _config(self, ask) -> GenerationConfig:
        """How an answer is generated: markers that are special tokens have to be seen."""
        calls = ask.tools and self.tools is not None and not self.tools.skip_special
        if calls or (ask.chat and self._special_tags):
            return replace(ask.config, skip_special_tokens=False)
        return ask.config

    def _grammar(self, author: Author, ask, opened: bool) -> str | None:
        """What the answer must look like, as llguidance's JSON text.

        With tool_choice "auto" only the arguments of functions that are strict are enforced.
        """
        try:
            grammar = ask.grammar
            if grammar is None and ask.tools and self.tools is not None:
                strict = any(tool["function"].get("strict") is True for tool in ask.tools)
                if ask.tool_choice != "auto" or strict:
                    choice = ask.tool_choice  # a function that is named is called exactly once, as OpenAI has it
                    parallel = ask.parallel_tool_calls and choice in ("auto", "required")
                    grammar = self.tools.grammar(ask.tools, choice, parallel, self.tokenizer)
            if grammar is not None and self.reasoning is not None and ask.chat:
                grammar = reasoning.allow_thoughts(grammar, self.reasoning, opened, self.tokenizer)
            return author.grammar(ask.config, grammar)
        except ValueError as error:
            raise ParamError(ask.shape if ask.grammar else "tools", str(error)) from None

    def _voice(self, ask, reply: Reply, choice: int, opened: bool) -> Voice:
        splitter = parser = None
        if self.reasoning is not None and ask.chat:
            splitter = reasoning.Splitter(self.reasoning, opened)
        if ask.tools and self.tools is not None:
            parser = self.tools.Parser(ask.tools, whole=not ask.stream)
        return Voice(reply, choice, splitter, parser, self._count)

    def _count(self, token_ids: list[int], thoughts: str) -> int:
        if self._end_id in token_ids:
            return token_ids.index(self._end_id) + 1
        return min(len(token_ids), len(self.tokenizer.encode(thoughts, bos=False)))
