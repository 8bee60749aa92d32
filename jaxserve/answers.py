"""Answers in OpenAI's JSON: choices, the pieces of a stream, log-probabilities, usage.  Does no IO."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from jaxserve.protocol import Ask
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.voice import Delta, Message

FAILED = ("error", "abort")  # finishes that are told by an error, and no choice

# Of a prompt's tokens: {id: log-probability given those before it}, the prompt's first and then the likeliest; the
# first token of all has {id: None}.
Scores = list[dict[int, float | None]]


def error(message: str, *, type: str = "invalid_request_error", param: str | None = None, code=None) -> dict:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int | None = None) -> dict:
    """Counts of tokens."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    if reasoning is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return counts


class Chat:
    """The answers to one chat, whole or piece by piece; choices are numbered as in serve.answer."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, ask: Ask, prompts: list[list[int]], tokenizer: Tokenizer):
        """prompts: their token ids."""
        self.ask, self.tokenizer = ask, tokenizer
        # beside the choices of a whole answer, and in the first chunk of a stream
        self.beside = {"prompt_token_ids": prompts[0]} if ask.return_token_ids else {}
        self._begun: set[int] = set()

    def choice(self, index: int, message: Message) -> dict:
        told: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if message.calls:
            told["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        ids = {"token_ids": message.token_ids} if self.ask.return_token_ids else {}
        logprobs = self._logprobs(message.logprobs)
        return {"index": index, "message": told, "logprobs": logprobs, "finish_reason": message.finish} | ids

    def pieces(self, index: int, delta: Delta) -> list[dict]:
        """What is new in one choice, as the choices of as many chunks."""
        made: list[dict] = []

        def piece(told, finish=None, logprobs=None):
            made.append({"index": index, "delta": told, "logprobs": logprobs, "finish_reason": finish})

        if index not in self._begun:
            self._begun.add(index)
            piece({"role": "assistant", "content": ""})
        if delta.reasoning:
            piece({"reasoning_content": delta.reasoning})
        if delta.content or delta.logprobs:
            piece({"content": delta.content}, None, self._logprobs(delta.logprobs or None))
        for call in delta.calls:
            if call.id is None:
                piece({"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]})
            else:
                function = {"name": call.name, "arguments": call.arguments}
                piece({"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]})
        if delta.finish and delta.finish not in FAILED:
            piece({}, delta.finish)
        if self.ask.return_token_ids:
            if not made:
                piece({"content": ""})
            made[-1]["token_ids"] = delta.token_ids
        return made

    def _logprobs(self, chances: list[dict] | None) -> dict | None:
        return chat_logprobs(chances, self.ask.config.logprobs, self.tokenizer)


class Completion:
    """The completions of one body, whole or piece by piece; with echo, each begins with its prompt."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, ask: Ask, prompts: list[list[int]], tokenizer: Tokenizer):
        """prompts: their token ids."""
        self.ask, self.prompts, self.tokenizer = ask, prompts, tokenizer
        self.beside: dict = {}
        self._printed: dict[int, int] = {}  # choice -> characters that its tokens have printed so far
        self._echoes: list[tuple[str, Scores | None]] = []

    def echo(self, score: Callable[[list[list[int]], int], list[Scores]]) -> None:
        """Prepares what is repeated of the prompts, if anything; score(prompts, alternatives) is asked if needed."""
        if not self.ask.echo:
            return
        alternatives = self.ask.config.logprobs
        known = itertools.repeat(None) if alternatives is None else score(self.prompts, alternatives)
        for prompt, chances in zip(self.ask.prompts, known):
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special=False)
            self._echoes.append((text, chances))

    def choice(self, index: int, message: Message) -> dict:
        return self._piece(index, message, message.content, message.finish)

    def pieces(self, index: int, delta: Delta) -> list[dict]:
        """What is new in one choice, as the choices of as many chunks."""
        ids = delta.token_ids if self.ask.return_token_ids else None
        if not (delta.content or delta.logprobs or delta.finish or ids):
            return []
        return [self._piece(index, delta, delta.content, None if delta.finish in FAILED else delta.finish)]

    def _piece(self, index: int, new: Message | Delta, text: str, finish: str | None) -> dict:
        number, start = index // self.ask.config.n, self._printed.get(index)
        chances: list[dict] | None = new.logprobs
        if start is None and self._echoes:
            told, scores = self._echoes[number]
            text = told + text
            chances = None if chances is None else [*(scores or ()), *chances]
        logprobs = None if chances is None else completion_logprobs(chances, self.tokenizer, start or 0)
        self._printed[index] = (start or 0) + (sum(map(len, logprobs["tokens"])) if logprobs else 0)
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if self.ask.return_token_ids:
            piece["token_ids"] = new.token_ids
            if start is None:
                piece["prompt_token_ids"] = self.prompts[number]
        return piece


# Log-probabilities ----------------------------------------------------------------------------------------------------


def scores(tokens: list[int], scored: tuple | None, alternatives: int) -> Scores:
    """What engine.score(tokens, want="alternatives") returned; None for a single token, which nothing is before."""
    rows: Scores = [{tokens[0]: None}]
    if scored is not None:
        for token, chance, ids, values in zip(tokens[1:], *scored, strict=True):
            ids, values = ids[:alternatives].tolist(), values[:alternatives].tolist()
            rows.append({token: float(chance), **dict(zip(ids, values, strict=True))})
    return rows


def chat_logprobs(chances: list[dict] | None, most: int | None, tokenizer: Tokenizer) -> dict | None:
    """A chat's logprobs; chances: a token {id: log-probability}, the one taken first.  most: alternatives told."""
    if chances is None:
        return None
    return {"content": [_chances(row, most or 0, tokenizer) for row in chances], "refusal": None}


def completion_logprobs(chances: list[dict], tokenizer: Tokenizer, start: int = 0) -> dict:
    """A completion's logprobs; chances as above, with None for what was not computed.

    start: the characters before.  An alternative that prints like a likelier one is left out, as they are told by what
    they print.
    """
    texts, own, others, offsets = [], [], [], []
    for row in chances:
        token, chance = next(iter(row.items()))
        text = _bytes(token, tokenizer).decode("utf-8", "replace")
        texts.append(text)
        own.append(chance)
        offsets.append(start)
        start += len(text)
        printed: dict[str, float] = {}
        for other, value in _likeliest(row) if chance is not None else ():
            printed.setdefault(_bytes(other, tokenizer).decode("utf-8", "replace"), value)
        others.append(printed if chance is not None else None)
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": others, "text_offset": offsets}


def _likeliest(chances: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(chances.items(), key=lambda pair: -pair[1])


def _chances(chances: dict[int, float], most: int, tokenizer: Tokenizer) -> dict:
    """One token's log-probability and its alternatives, the likeliest first."""
    token, chance = next(iter(chances.items()))
    others = [_chance(*pair, tokenizer) for pair in _likeliest(chances)[:most]]
    return _chance(token, chance, tokenizer) | {"top_logprobs": others}


def _chance(token: int, chance: float, tokenizer: Tokenizer) -> dict:
    data = _bytes(token, tokenizer)
    return {"token": data.decode("utf-8", "replace"), "logprob": chance, "bytes": list(data)}


def _bytes(token: int, tokenizer: Tokenizer) -> bytes:
    """What a token prints; nothing where the model's logits are wider than the vocabulary."""
    return tokenizer.token_bytes[token] if token < len(tokenizer.token_bytes) else b""
