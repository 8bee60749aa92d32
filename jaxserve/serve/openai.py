"""OpenAI's routes: chat completions, completions, models."""

import secrets
import time
from collections.abc import Generator

from flask import Blueprint

from jaxserve import __version__, answers
from jaxserve.protocol import CHAT, COMPLETION
from jaxserve.serve import body, stream
from jaxserve.serve.answer import Answer, Delta, Message, failure
from jaxserve.serve.service import Service

FINGERPRINT = f"jaxserve-{__version__}"


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("openai", __name__)

    @routes.post(CHAT)
    def chat_completions():
        ask = service.parse(CHAT, body.read())
        answer = service.start(ask)
        frame = Chat(service, answer)
        if ask.stream:
            return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader)
        with stream.watched(answer):
            messages = answer.collect()
        return body.send(frame.whole(messages))

    @routes.post(COMPLETION)
    def completions():
        ask = service.parse(COMPLETION, body.read())
        answer = service.start(ask)
        frame = Completion(service, answer)
        if ask.stream:
            return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader)
        with stream.watched(answer):
            messages = answer.collect()
        return body.send(frame.whole(messages))

    @routes.get("/v1/models")
    def models():
        return body.send({"object": "list", "data": [_model(service, name) for name in service.model_names]})

    @routes.get("/v1/models/<path:name>")
    def model(name: str):
        service.check_model(name)
        return body.send(_model(service, name))

    return routes


def _model(service: Service, name: str) -> dict:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxserve",
        "root": name,
        "parent": None,
        "max_model_len": service.session_len,
    }


class Frame:
    """What is the same in all chunks of one answer."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, service: Service, answer: Answer):
        self.service, self.answer, self.ask = service, answer, answer.ask
        self.tokenizer = service.tokenizer
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def head(self, kind: str) -> dict:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.ask.model or self.service.model,
            "system_fingerprint": FINGERPRINT,
        }

    def usage(self) -> dict:
        answer = self.answer
        return answers.usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)

    def whole(self, messages: list[Message]) -> dict:
        choices = [self.choice(index, message) for index, message in enumerate(messages)]
        return self.head(self.kind) | {"choices": choices, "usage": self.usage()}

    def choice(self, index: int, message: Message) -> dict:
        raise NotImplementedError

    def pieces(self, index: int, delta: Delta) -> list[dict]:
        raise NotImplementedError

    def stream(self) -> Generator[bytes]:
        head = self.head(self.chunk_kind)
        for index, delta in self.answer:
            if delta is None:
                yield stream.KEEP_ALIVE
                continue
            chunks = [head | {"choices": [piece]} for piece in self.pieces(index, delta)]
            if self.ask.continuous_usage:
                chunks = [chunk | {"usage": self.usage()} for chunk in chunks]
            elif self.ask.include_usage:
                chunks = [chunk | {"usage": None} for chunk in chunks]
            if chunks:
                yield b"".join(map(stream.data, chunks))
            if delta.finish in ("error", "abort"):
                raise failure(delta)
        if self.answer.closed:
            return
        last = stream.data(head | {"choices": [], "usage": self.usage()}) if self.ask.include_usage else b""
        yield last + stream.DONE


class Chat(Frame):
    """Chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service, answer):
        super().__init__(service, answer)
        self.begun: set[int] = set()

    def choice(self, index, message):
        told = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if message.calls:
            told["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        return {
            "index": index,
            "message": told,
            "logprobs": answers.chat_logprobs(message.logprobs, self.tokenizer),
            "finish_reason": message.finish,
        }

    def pieces(self, index, delta):
        made = []

        def piece(told, finish=None, logprobs=None):
            made.append({"index": index, "delta": told, "logprobs": logprobs, "finish_reason": finish})

        if index not in self.begun:
            self.begun.add(index)
            piece({"role": "assistant", "content": ""})
        if delta.reasoning:
            piece({"reasoning_content": delta.reasoning})
        if delta.content or delta.logprobs:
            piece({"content": delta.content}, None, answers.chat_logprobs(delta.logprobs or None, self.tokenizer))
        for call in delta.calls:
            function = {"arguments": call.arguments}
            if call.id is None:
                piece({"tool_calls": [{"index": call.index, "function": function}]})
            else:
                function = {"name": call.name, **function}
                piece({"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]})
        if delta.finish and delta.finish not in ("error", "abort"):
            piece({}, delta.finish)
        return made


class Completion(Frame):
    """Completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index, message):
        logprobs = None
        if message.logprobs is not None:
            logprobs = answers.completion_logprobs(message.logprobs, self.tokenizer)
        return {"index": index, "text": message.content, "logprobs": logprobs, "finish_reason": message.finish}

    def pieces(self, index, delta):
        logprobs = answers.completion_logprobs(delta.logprobs, self.tokenizer) if delta.logprobs else None
        if not (delta.content or logprobs or delta.finish):
            return []
        finish = None if delta.finish in ("error", "abort") else delta.finish
        return [{"index": index, "text": delta.content, "logprobs": logprobs, "finish_reason": finish}]
