"""Answers in Anthropic's form: a Message whole, or its events one by one.  Does no IO."""

import hashlib
from collections.abc import Iterator

import orjson

from jaxserve.serve.dialect import unique

STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def message(id: str, model: str, content: list[dict], stop_reason, stop_sequence, usage: dict) -> dict:
    """The body of an answer, or what message_start says of one that begins."""
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "stop_details": None,
        "container": None,
        "usage": usage,
    }


def usage(prompt: int, cached: int, completion: int) -> dict:
    """Counts of tokens; what came from the prefix cache is no input token in Anthropic's sense."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
        "cache_creation": None,
        "server_tool_use": None,
        "service_tier": "standard",
        "inference_geo": None,
        "output_tokens_details": None,
    }


def stop_reason(finish: str, stopped_by: str | None, completion: int, max_tokens: int) -> tuple[str, str | None]:
    """stop_reason and stop_sequence; stopped_by: the stop sequence of the request that ended the answer."""
    if finish == "stop" and stopped_by is not None:
        return "stop_sequence", stopped_by
    if finish == "length" and completion < max_tokens:
        return "model_context_window_exceeded", None
    return STOPS.get(finish, "end_turn"), None


def content(reasoning: str, text: str, calls, *, shown: bool = True) -> list[dict]:
    """The blocks of a whole answer; calls: with id, name and arguments.  shown: thinking is told."""
    blocks: list[dict] = []
    if reasoning:
        blocks.append({"type": "thinking", "thinking": reasoning if shown else "", "signature": signature(reasoning)})
    if text:
        blocks.append({"type": "text", "text": text, "citations": None})
    ids: set[str] = set()
    for call in calls:
        blocks.append(_use(unique(call.id, ids), call.name) | {"input": arguments(call.arguments)})
    return blocks


def arguments(text: str) -> dict:
    """A call's arguments; {} for those that were cut short."""
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def signature(reasoning: str) -> str:
    """Clients keep thinking only with a signature; nobody checks this one."""
    return hashlib.blake2b(reasoning.encode("utf-8", "replace"), digest_size=16).hexdigest()


def _use(id: str, name: str) -> dict:
    return {"type": "tool_use", "id": id, "name": name, "input": {}, "caller": {"type": "direct"}}


class Events:
    """The events between message_start and message_delta: blocks that open, grow and close, one at a time."""

    def __init__(self, *, shown: bool = True):
        """shown: thinking is told."""
        self._shown = shown
        self._index = -1
        self._open: object = None  # "thinking", "text", or the number of a call
        self._thoughts: list[str] = []
        self._ids: set[str] = set()

    def feed(self, reasoning: str, text: str, calls) -> Iterator[dict]:
        """What a Delta adds; calls: with index, id, name (in the first of each) and arguments."""
        if reasoning:
            yield from self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self._thoughts.append(reasoning)
            if self._shown:
                yield self._delta({"type": "thinking_delta", "thinking": reasoning})
        if text:
            yield from self._enter("text", {"type": "text", "text": "", "citations": None})
            yield self._delta({"type": "text_delta", "text": text})
        for call in calls:
            if self._open != call.index:
                yield from self._enter(call.index, _use(unique(call.id, self._ids), call.name))
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def close(self) -> Iterator[dict]:
        """Ends the block that is open."""
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": signature("".join(self._thoughts))})
            self._thoughts.clear()
        yield {"type": "content_block_stop", "index": self._index}
        self._open = None

    def _enter(self, kind, block: dict) -> Iterator[dict]:
        if self._open == kind:
            return
        yield from self.close()
        self._open = kind
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict) -> dict:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def ending(reason: str, sequence: str | None, counts: dict) -> Iterator[dict]:
    """The events that end a message."""
    kept: tuple[str, ...] = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    kept += ("server_tool_use", "output_tokens_details")
    delta = {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}
    yield {"type": "message_delta", "delta": delta, "usage": {name: counts[name] for name in kept}}
    yield {"type": "message_stop"}
