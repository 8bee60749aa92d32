"""OpenAI's Responses API: create (whole, streamed, or in the background), and what was stored of it.

Stored responses lie in the engine's small memory, which all web workers share: the oldest give way, and a restart
forgets them.
"""

import copy
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import orjson
from flask import Blueprint, request

from jaxserve import answers, bodies
from jaxserve.bodies import ParamError
from jaxserve.engine.request import EngineDead
from jaxserve.protocol import CHAT
from jaxserve.serve import body, dialect, stream
from jaxserve.serve.answer import failure
from jaxserve.serve.dialect_schemas import Deleted, InputItems, InputTokens, Response, ResponseEvent
from jaxserve.serve.errors import CLIENT_GONE, ApiError
from jaxserve.serve.openapi import Operation, path_parameter
from jaxserve.serve.responses_answer import Writer, new_id, resource, usage
from jaxserve.serve.responses_body import RENAMED, CreateResponse, chat, items
from jaxserve.serve.service import Service
from jaxserve.voice import CallDelta

log = logging.getLogger("jaxserve")

RESPONSES = "/v1/responses"
KIND = "response"
PAGE, LONGEST_PAGE = 20, 100  # items of a listing
ONE, ID = f"{RESPONSES}/{{id}}", (path_parameter("id", "its id"),)
OPERATIONS = (
    Operation(
        *("post", RESPONSES, "Answer a conversation of items", "Responses", CreateResponse, Response),
        streams=ResponseEvent,
        errors=(404,),
    ),
    Operation(
        *("post", f"{RESPONSES}/input_tokens", "The tokens of an input", "Responses", CreateResponse, InputTokens),
        errors=(404,),
    ),
    Operation(
        "get", f"{RESPONSES}/{{id}}", "A stored response", "Responses", answer=Response, errors=(404,), parameters=ID
    ),
    Operation(
        "delete", f"{RESPONSES}/{{id}}", "Forget a response", "Responses", answer=Deleted, errors=(404,), parameters=ID
    ),
    Operation(
        *("post", f"{ONE}/cancel", "Cancel a background response", "Responses"),
        answer=Response,
        errors=(400, 404),
        parameters=ID,
    ),
    Operation(
        *("get", f"{ONE}/input_items", "The items that led to a response", "Responses"),
        answer=InputItems,
        errors=(400, 404),
        parameters=ID,
    ),
)


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("responses", __name__)
    store, running = Store(service.engine), dialect.Running(service.engine, KIND)

    @routes.post(RESPONSES)
    def create():
        given = dialect.read(CreateResponse)
        past = _past(store, given)
        with dialect.renamed(RENAMED):
            ask = service.parse(CHAT, chat(given, items(past)) | {"stream": given.stream is True})
            answer = service.start(ask)
        frame = Frame(service, answer, given, past, store)
        if given.stream:
            slow = service.limits.slow_reader
            return stream.sse(answer, frame.stream(), slow_reader=slow, error=frame.error_event)
        if given.background:
            return body.send(frame.background(running))
        with stream.watched(answer):
            return body.send(frame.whole())

    @routes.route(f"{RESPONSES}/input_tokens", methods=["OPTIONS"])
    def methods():
        return "", {"Allow": "OPTIONS, POST"}  # else those of a response, too: its name would do as an id

    @routes.post(f"{RESPONSES}/input_tokens")
    def input_tokens():
        given = dialect.read(CreateResponse)
        with dialect.renamed(RENAMED):
            ask = service.parse(CHAT, chat(given, items(_past(store, given))))
            service.check_model(ask.model)
            count = len(dialect.chat_tokens(service, ask))
        return body.send({"object": "response.input_tokens", "input_tokens": count})

    @routes.post(f"{RESPONSES}/compact")
    def compact():
        raise ApiError(404, "conversations are not compacted here; send the items that matter")

    _stored(routes, store, running)
    return routes


def _stored(routes: Blueprint, store: "Store", running: dialect.Running) -> None:
    """The routes of one response."""

    @routes.get(f"{RESPONSES}/<id>")
    def retrieve(id: str):
        if request.args.get("stream") in ("true", "1"):
            raise ParamError("stream", "stream: a stored response is not streamed again")
        return body.send(store.get(id)["response"])

    @routes.delete(f"{RESPONSES}/<id>")
    def delete(id: str):
        if _runs(store.get(id)["response"]):
            running.cancel(id)
        store.forget(id)
        return body.send({"id": id, "object": "response", "deleted": True})

    @routes.post(f"{RESPONSES}/<id>/cancel")
    def cancel(id: str):
        found = store.get(id)["response"]
        if not found["background"]:
            raise ApiError(400, "only a response that runs in the background can be cancelled; others end by leaving")
        if _runs(found):
            running.cancel(id)
            found |= {"status": "cancelled"}
        return body.send(found)

    @routes.get(f"{RESPONSES}/<id>/input_items")
    def input_items(id: str):
        found = store.get(id)["items"]
        if request.args.get("order", "desc") != "asc":
            found = found[::-1]
        after = request.args.get("after")
        if after is not None:
            place = next((number for number, item in enumerate(found) if item["id"] == after), len(found))
            found = found[place + 1 :]
        limit = request.args.get("limit", PAGE, type=int)
        if not 1 <= limit <= LONGEST_PAGE:
            raise ParamError("limit", f"limit is a whole number from 1 to {LONGEST_PAGE}, not {limit}")
        page = found[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return body.send({"object": "list", "data": page, **ends, "has_more": len(found) > limit})


def _runs(found: dict) -> bool:
    return found["status"] in ("queued", "in_progress")


def _past(store: "Store", given: CreateResponse) -> list[dict]:
    """The items of the conversation that goes on."""
    id = given.previous_response_id
    if id is None:
        return []
    try:
        record = store.get(id)
    except ApiError as error:
        error.param, error.code = "previous_response_id", "previous_response_not_found"
        raise
    if _runs(record["response"]):
        raise ParamError("previous_response_id", "previous_response_id: that response is not complete yet")
    return record["items"] + record["response"]["output"]


class Store:
    """Responses by their ids, each with the items that led to it."""

    def __init__(self, engine):
        self._engine = engine

    def get(self, id: str) -> dict:
        """A record: response, items.  ApiError 404 where there is none."""
        data = self._engine.recall(KIND, id) if len(id) <= 128 else None
        if data is None:
            raise ApiError(404, f"no response {bodies.shown(id)} is stored; older ones give way to new ones")
        return orjson.loads(data)

    def put(self, response: dict, told: list[dict]) -> None:
        """Stores a record; one that is too large, or that the engine is gone for, is not stored."""
        try:
            self._engine.keep(KIND, response["id"], orjson.dumps({"response": response, "items": told}))
        except (ValueError, EngineDead) as error:
            log.warning("a response was not stored: %s", error)

    def forget(self, id: str) -> None:
        self._engine.forget(KIND, id)


class Frame:
    """One answer on its way to a response."""

    def __init__(self, service: Service, answer, given: CreateResponse, past: list[dict], store: Store):
        self.service, self.answer, self.store = service, answer, store
        self.items = past + _told(given)
        self.stored = given.store is not False
        config = answer.ask.config
        temperature, top_p = (0.0, 1.0) if config.greedy else (config.temperature, config.top_p)
        model = answer.ask.model or service.model
        self.writer = Writer(resource(new_id("resp"), int(time.time()), model, given, temperature, top_p))

    def stream(self) -> Iterator[bytes]:
        writer, finish, error = self.writer, "abort", None
        yield _sent(writer.begin())
        for _, delta in self.answer:
            if delta is None:
                yield stream.KEEP_ALIVE
                continue
            made = _sent(writer.feed(delta.reasoning, delta.content, delta.calls, self._chances(delta)))
            if made:
                yield made
            finish = delta.finish or finish
            if delta.finish in ("error", "abort"):
                error = failure(delta)
        if self.answer.closed:
            return
        last = _sent(self._end("error" if error else finish, error))
        if self.stored:
            self.store.put(writer.resource, self.items)
        yield last + stream.DONE

    def whole(self) -> dict:
        """Waits for the answer.  ApiError if it fails."""
        (message,) = self.answer.collect()
        writer = self.writer
        calls = [CallDelta(number, call.id, call.name, call.arguments) for number, call in enumerate(message.calls)]
        for _ in writer.feed(message.reasoning, message.content, calls, self._chances(message)):
            pass
        for _ in self._end(message.finish):
            pass
        if self.stored:
            self.store.put(writer.resource, self.items)
        return writer.resource

    def background(self, running: dialect.Running) -> dict:
        """The response that has just begun; a thread of its own waits for the answer."""
        begun, stack = self.writer.resource, ExitStack()
        begun["status"] = "queued"
        self.store.put(begun, self.items)
        told = copy.deepcopy(begun)  # the thread fills in the output
        stack.enter_context(running.named(begun["id"], self.answer))
        threading.Thread(target=self._run, args=(stack,), name="jaxserve-background", daemon=True).start()
        return told

    def _run(self, stack: ExitStack) -> None:
        self.stored = False  # not if it was deleted meanwhile
        with stack:
            try:
                self.whole()
            except ApiError as error:
                cancelled = error.status == CLIENT_GONE
                for _ in self._end("abort" if cancelled else "error", None if cancelled else error):
                    pass
            finally:
                self.answer.close()
        if self.service.engine.recall(KIND, self.writer.resource["id"]) is not None:
            self.store.put(self.writer.resource, self.items)

    def error_event(self, error: ApiError) -> bytes:
        """What nobody foresaw, after the stream has begun."""
        told = error.body()["error"] | {"code": error.code or "server_error"}
        event = self.writer.event("error", error=told, **{name: told[name] for name in ("code", "message", "param")})
        return stream.event("error", event)

    def _end(self, finish: str, error: ApiError | None = None) -> Iterator[dict]:
        answer = self.answer
        counts = usage(answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)
        told = {"code": "server_error", "message": error.message} if error else None
        return self.writer.end(finish, counts, int(time.time()), told)

    def _chances(self, part) -> list | None:
        """The log-probabilities of a Delta or Message that has text."""
        if not part.logprobs or not part.content:
            return None
        most = self.answer.ask.config.logprobs
        return answers.chat_logprobs(part.logprobs, most, self.service.tokenizer)["content"]  # type: ignore[index]


def _told(given: CreateResponse) -> list[dict]:
    """The input as items, each with an id."""
    if isinstance(given.input, str):
        content = [{"type": "input_text", "text": given.input}]
        return [{"id": new_id("msg"), "type": "message", "status": "completed", "role": "user", "content": content}]
    made = []
    for item in given.input:
        kind = item.get("type", "message")
        item = {"type": kind, **item, "id": item.get("id") or new_id("msg" if kind == "message" else "item")}
        if isinstance(item.get("content"), str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": part, "text": item["content"]}]
        made.append(item)
    return made


def _sent(events) -> bytes:
    return b"".join(stream.event(event["type"], event) for event in events)
