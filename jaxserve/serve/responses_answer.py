"""Answers of OpenAI's Responses API: the resource, and the typed events that make it up.  Does no IO.

A whole answer is made by the same `Writer` that makes a stream's events, so that both always agree.
"""

import copy
import uuid
from collections.abc import Iterator

import msgspec

from jaxserve.serve.dialect import unique
from jaxserve.serve.responses_body import CreateResponse, functions

REASONING, MESSAGE = "reasoning", "message"  # kinds of open items beside the number of a call


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}_{uuid.uuid4().hex}"


def resource(id: str, created: int, model: str, body: CreateResponse, temperature: float, top_p: float) -> dict:
    """A response that has just begun; temperature and top_p: what the tokens are drawn with."""
    options = body.text
    format = {"type": "text"}
    if options is not None and options.format is not None:
        format = _format(options.format)
    text: dict = {"format": format}
    if options is not None and options.verbosity is not None:
        text["verbosity"] = options.verbosity
    reasoning = body.reasoning
    return {
        "id": id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": temperature,
        "text": text,
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"type": "function", **msgspec.to_builtins(tool)} for tool in functions(body.tools or [])],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _format(format) -> dict:
    if format.type != "json_schema":
        return {"type": format.type}
    given = msgspec.to_builtins(format)
    return given | {"name": format.name or "answer", "strict": bool(format.strict)}


def usage(prompt: int, cached: int, completion: int) -> dict:
    """Counts of tokens; those of the reasoning are not counted apart."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + completion,
    }


class Writer:
    """Writes one response: what is fed to it becomes items of `resource`, and events."""

    def __init__(self, resource: dict):
        self.resource = resource
        self._sequence = 0
        self._open: object = None  # REASONING, MESSAGE, or the number of a call
        self._pieces: list[str] = []  # of the open item's text, which it gets when it is closed
        self._ids: set[str] = set()

    def begin(self) -> Iterator[dict]:
        """The first two events."""
        for kind in ("response.created", "response.in_progress"):
            yield self.event(kind, response=copy.deepcopy(self.resource))

    def feed(self, reasoning: str, text: str, calls, logprobs: list | None = None) -> Iterator[dict]:
        """What a Delta adds; calls: with index, id, name (in the first of each) and arguments."""
        if reasoning:
            yield from self._enter(REASONING)
            yield from self._grow("response.reasoning_text.delta", reasoning)
        if text or logprobs:
            yield from self._enter(MESSAGE)
            part = self._item["content"][0]
            part["logprobs"] += logprobs or []
            yield from self._grow("response.output_text.delta", text, logprobs=logprobs or [])
        for call in calls:
            yield from self._enter(call.index, call)
            if call.arguments:
                self._pieces.append(call.arguments)
                yield self._of_item("response.function_call_arguments.delta", delta=call.arguments)

    def end(self, finish: str, usage: dict, at: int, error: dict | None = None) -> Iterator[dict]:
        """The last events.  finish: a Delta's.  at: unix time.  error: with code and message."""
        status = {"length": "incomplete", "error": "failed", "abort": "cancelled"}.get(finish, "completed")
        if status == "completed" and not self.resource["output"]:
            yield from self._enter(MESSAGE)
        yield from self._close("completed" if status == "completed" else "incomplete")
        made: dict = {"status": status, "usage": usage, "error": error}
        if status == "completed":
            made["completed_at"] = at
        if status == "incomplete":
            made["incomplete_details"] = {"reason": "max_output_tokens"}
        self.resource |= made
        kind = {"cancelled": "failed"}.get(status, status)
        yield self.event(f"response.{kind}", response=self.resource)

    @property
    def _item(self) -> dict:
        return self.resource["output"][-1]

    def _enter(self, kind, call=None) -> Iterator[dict]:
        """Opens an item of a kind, after closing another."""
        if self._open == kind:
            return
        yield from self._close("completed")
        self._open = kind
        item: dict
        part: dict | None = None
        if kind == REASONING:
            item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        elif kind == MESSAGE:
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {
                "id": new_id("fc"),
                "type": "function_call",
                "call_id": unique(call.id, self._ids),
                "name": call.name,
            }
            item["arguments"] = ""
        item["status"] = "in_progress"
        self.resource["output"].append(item)
        yield self.event("response.output_item.added", output_index=self._index, item=copy.deepcopy(item))
        if part is not None:
            item["content"].append(part)
            yield self._of_part("response.content_part.added", part=copy.deepcopy(part))

    def _close(self, status: str) -> Iterator[dict]:
        """Ends the item that is open."""
        kind, self._open = self._open, None
        if kind is None:
            return
        item, text = self._item, "".join(self._pieces)
        self._pieces.clear()
        if kind in (REASONING, MESSAGE):
            (part,) = item["content"]
            part["text"] = text
            if kind == MESSAGE:
                yield self._of_part("response.output_text.done", text=text, logprobs=part["logprobs"])
            else:
                yield self._of_part("response.reasoning_text.done", text=text)
            yield self._of_part("response.content_part.done", part=part)
        else:
            item["arguments"] = text
            yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        item["status"] = status
        yield self.event("response.output_item.done", output_index=self._index, item=item)

    def _grow(self, kind: str, text: str, **more) -> Iterator[dict]:
        self._pieces.append(text)
        yield self._of_part(kind, delta=text, **more)

    @property
    def _index(self) -> int:
        return len(self.resource["output"]) - 1

    def event(self, kind: str, **fields) -> dict:
        """An event with the next number."""
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _of_item(self, kind: str, **fields) -> dict:
        return self.event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _of_part(self, kind: str, **fields) -> dict:
        return self._of_item(kind, content_index=0, **fields)
