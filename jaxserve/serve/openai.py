"""OpenAI's routes: chat completions, completions, models."""

import time
from collections.abc import Generator

from flask import Blueprint, g, request

from jaxserve import __version__, answers
from jaxserve.bodies import ChatRequest, ParamError
from jaxserve.protocol import CHAT, COMPLETION, Ask, CompletionBody
from jaxserve.serve import body, schemas, stream
from jaxserve.serve.answer import Answer, failure
from jaxserve.serve.openapi import Operation, path_parameter
from jaxserve.serve.service import Service
from jaxserve.voice import Message

OPERATIONS = (
    Operation(
        "post",
        CHAT,
        "Answer a conversation",
        "OpenAI",
        ChatRequest,
        schemas.Chat,
        streams=schemas.ChatChunk,
        errors=(404,),
    ),
    Operation(
        "post",
        COMPLETION,
        "Complete a text",
        "OpenAI",
        CompletionBody,
        schemas.Completion,
        streams=schemas.Completion,
        errors=(404,),
    ),
    Operation("get", "/v1/models", "The models that answer here", "OpenAI", answer=schemas.Models),
    Operation(
        "get",
        "/v1/models/{model}",
        "One model",
        "OpenAI",
        answer=schemas.Model,
        errors=(404,),
        parameters=(path_parameter("model", "its name"),),
    ),
)
FINGERPRINT = f"jaxserve-{__version__}"


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("openai", __name__)

    @routes.post(CHAT)
    def chat_completions():
        ask = _named(service.parse(CHAT, body.read()))
        if ask.model is None:
            raise ParamError("model", f"model is missing; this server has {', '.join(service.model_names)}")
        answer = service.start(ask)
        frame = Frame(service, answer, answers.Chat(ask, answer.prompts, service.tokenizer))
        if ask.stream:
            return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader)
        with stream.watched(answer):
            return body.send(frame.whole(answer.collect()))

    @routes.post(COMPLETION)
    def completions():
        ask = _named(service.parse(COMPLETION, body.read()))
        answer = service.start(ask)
        form = answers.Completion(ask, answer.prompts, service.tokenizer)
        frame = Frame(service, answer, form)
        with stream.watched(answer, keep=ask.stream):
            form.echo(service.scores)
            if not ask.stream:
                return body.send(frame.whole(answer.collect()))
        return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader)

    @routes.get("/v1/models")
    def models():
        return body.send({"object": "list", "data": [_model(service, name) for name in service.model_names]})

    @routes.get("/v1/models/<path:name>")
    def model(name: str):
        service.check_model(name)
        return body.send(_model(service, name))

    return routes


def _named(ask: Ask) -> Ask:
    """Takes over the client's name for the request, if its header gave none."""
    if ask.request_id and "X-Request-Id" not in request.headers:
        g.request_id = body.request_id(ask.request_id)
    return ask


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxserve",
        "root": name,
        "parent": None,
        "max_model_len": service.session_len,
        "permission": [],
    }


class Frame:
    """The answer to one body, put into OpenAI's envelope: one object, or chunks with the same id.

    The id ends in that of the request, which the log has, and which the client may have given.
    """

    def __init__(self, service: Service, answer: Answer, form: answers.Chat | answers.Completion):
        self.service, self.answer, self.ask, self.form = service, answer, answer.ask, form
        self.id, self.created = f"{form.prefix}-{g.request_id}", int(time.time())

    def _head(self, kind: str) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.ask.model or self.service.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _usage(self) -> dict:
        answer = self.answer
        thoughts = answer.reasoning_tokens if self.ask.chat and self.service.formats.reasoning else None
        return answers.usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, thoughts)

    def whole(self, messages: list[Message]) -> dict:
        """One object."""
        choices = [self.form.choice(index, message) for index, message in enumerate(messages)]
        return self._head(self.form.kind) | {"choices": choices, "usage": self._usage()} | self.form.beside

    def stream(self) -> Generator[bytes]:
        """The events of a stream; ApiError if the answer fails on its way."""
        head, beside = self._head(self.form.chunk_kind), self.form.beside
        for index, delta in self.answer:
            if delta is None:
                yield stream.KEEP_ALIVE
                continue
            chunks = [head | {"choices": [piece]} for piece in self.form.pieces(index, delta)]
            if self.ask.continuous_usage:
                chunks = [chunk | {"usage": self._usage()} for chunk in chunks]
            elif self.ask.include_usage:
                chunks = [chunk | {"usage": None} for chunk in chunks]
            if chunks:
                chunks[0] |= beside
                beside = {}
                yield b"".join(map(stream.data, chunks))
            if delta.finish in answers.FAILED:
                raise failure(delta)
        if self.answer.closed:
            return
        last = stream.data(head | {"choices": [], "usage": self._usage()}) if self.ask.include_usage else b""
        yield last + stream.DONE
