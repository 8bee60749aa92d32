"""Anthropic's routes: /v1/messages, whole and as a stream, and /v1/messages/count_tokens."""

import secrets
from collections.abc import Iterator

from flask import Blueprint, g

from jaxserve.protocol import CHAT
from jaxserve.serve import anthropic_answer, body, dialect, errors, stream
from jaxserve.serve.answer import failure
from jaxserve.serve.anthropic_body import CountTokens, CreateMessage, chat
from jaxserve.serve.dialect_schemas import MessageAnswer, MessageError, MessageEvent, TokenCount
from jaxserve.serve.errors import ApiError
from jaxserve.serve.openapi import Operation
from jaxserve.serve.service import Service

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
RENAMED = {  # a chat's parameter -> how it is called here
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "response_format": "output_config.format",
}
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

OPERATIONS = (
    Operation(
        *("post", MESSAGES, "Answer a conversation", "Anthropic", CreateMessage, MessageAnswer),
        streams=MessageEvent,
        errors=(404,),
        error=MessageError,
    ),
    Operation(
        *("post", COUNT, "The tokens of a conversation", "Anthropic", CountTokens, TokenCount),
        errors=(404,),
        error=MessageError,
    ),
)


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model.  Their errors are in Anthropic's envelope."""
    routes = Blueprint("anthropic", __name__)

    @routes.post(MESSAGES)
    def messages():
        given = dialect.read(CreateMessage)
        with dialect.renamed(RENAMED):
            ask = service.parse(CHAT, chat(given) | {"stream": given.stream})
            answer = service.start(ask)
        frame = Frame(service, answer, given)
        if given.stream:
            return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader, error=error_event)
        with stream.watched(answer):
            (message,) = answer.collect()
        return body.send(frame.whole(message))

    @routes.post(COUNT)
    def count_tokens():
        given = dialect.read(CountTokens)
        with dialect.renamed(RENAMED):
            ask = service.parse(CHAT, chat(given))
            service.check_model(ask.model)
            count = len(dialect.chat_tokens(service, ask))
        return body.send({"input_tokens": count})

    @routes.errorhandler(Exception)
    def failed(error: Exception):
        told = errors.of(error)
        return told.response(envelope(told))

    return routes


def envelope(error: ApiError) -> dict:
    """An error as Anthropic's clients read it."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told = {"type": kind, "message": error.message}
    return {"type": "error", "error": told, "request_id": g.get("request_id")}


def error_event(error: ApiError) -> bytes:
    """An error after the answer has begun."""
    kind = TYPES.get(error.status, "api_error")
    return stream.event("error", {"type": "error", "error": {"type": kind, "message": error.message}})


class Frame:
    """One answer in Anthropic's form."""

    def __init__(self, service: Service, answer, given: CreateMessage):
        self.service, self.answer, self.given = service, answer, given
        self.id, self.model = f"msg_{secrets.token_hex(12)}", answer.ask.model or service.model
        thinking = given.thinking
        self.shown = thinking is None or thinking.display != "omitted"

    def usage(self) -> dict:
        answer = self.answer
        return anthropic_answer.usage(answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)

    def stop_reason(self, finish: str, token_ids: list[int]) -> tuple[str, str | None]:
        config, count = self.answer.ask.config, self.answer.completion_tokens
        by = dialect.stopped_by(token_ids, config, self.service.tokenizer) if finish == "stop" else None
        return anthropic_answer.stop_reason(finish, by, count, config.max_new_tokens)

    def whole(self, message) -> dict:
        content = anthropic_answer.content(message.reasoning, message.content, message.calls, shown=self.shown)
        reason, sequence = self.stop_reason(message.finish, message.token_ids)
        return anthropic_answer.message(self.id, self.model, content, reason, sequence, self.usage())

    def stream(self) -> Iterator[bytes]:
        events, token_ids, finish = anthropic_answer.Events(shown=self.shown), [], "abort"
        first = anthropic_answer.message(self.id, self.model, [], None, None, self.usage())
        yield _sent([{"type": "message_start", "message": first}, {"type": "ping"}])
        for _, delta in self.answer:
            if delta is None:
                yield _sent([{"type": "ping"}])
                continue
            token_ids += delta.token_ids
            made = list(events.feed(delta.reasoning, delta.content, delta.calls))
            if made:
                yield _sent(made)
            if delta.finish in ("error", "abort"):
                raise failure(delta)
            finish = delta.finish or finish
        if self.answer.closed:
            return
        yield _sent([*events.close(), *anthropic_answer.ending(*self.stop_reason(finish, token_ids), self.usage())])


def _sent(events: list[dict]) -> bytes:
    return b"".join(stream.event(event["type"], event) for event in events)
