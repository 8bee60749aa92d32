"""OpenAI's routes: chat completions, completions, models."""

import secrets
import time
from collections.abc import Generator

from flask import Blueprint

from jaxserve import __version__, answers
from jaxserve.protocol import CHAT, COMPLETION, ChatBody, CompletionBody
from jaxserve.serve import body, schemas, stream
from jaxserve.serve.answer import Answer, Delta, Message, failure
from jaxserve.serve.openapi import Operation, path_parameter
from jaxserve.serve.service import Service

OPERATIONS = (
    Operation(
        "post",
        CHAT,
        "Answer a conversation",
        "OpenAI",
        ChatBody,
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
        ask = service.parse(CHAT, body.read())
        answer = service.start(ask)
        frame = Chat(service, answer)
        if ask.stream:
            return stream.sse(answer, frame.stream(), slow_reader=service.limits.slow_reader)
        with stream.watched(answer):
            return body.send(frame.whole(answer.collect()))

    @routes.post(COMPLETION)
    def completions():
        ask = service.parse(COMPLETION, body.read())
        answer = service.start(ask)
        frame = Completion(service, answer)
        with stream.watched(answer, keep=ask.stream):
            frame.prepare()
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
        thoughts = answer.reasoning_tokens if self.ask.chat and self.service.formats.reasoning else None
        return answers.usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, thoughts)

    def whole(self, messages: list[Message]) -> dict:
        choices = [self.choice(index, message) for index, message in enumerate(messages)]
        return self.head(self.kind) | {"choices": choices, "usage": self.usage()} | self.prompt_ids()

    def prompt_ids(self) -> dict:
        """What a chat's answer, or the first chunk of its stream, tells of the prompt."""
        return {}

    def choice(self, index: int, message: Message) -> dict:
        raise NotImplementedError

    def pieces(self, index: int, delta: Delta) -> list[dict]:
        raise NotImplementedError

    def stream(self) -> Generator[bytes]:
        head, first = self.head(self.chunk_kind), self.prompt_ids()
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
                chunks[0] |= first
                first = {}
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

    def prompt_ids(self):
        return {"prompt_token_ids": self.answer.prompts[0]} if self.ask.return_token_ids else {}

    def choice(self, index, message):
        told = {"role": "assistant", "content": message.content, "refusal": None}
        if message.reasoning:
            told["reasoning_content"] = message.reasoning
        if message.calls:
            told["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.calls
            ]
        ids = {"token_ids": message.token_ids} if self.ask.return_token_ids else {}
        return ids | {
            "index": index,
            "message": told,
            "logprobs": answers.chat_logprobs(message.logprobs, self.ask.config.logprobs, self.tokenizer),
            "finish_reason": message.finish,
        }

    def pieces(self, index, delta):
        made: list[dict] = []

        def piece(told, finish=None, logprobs=None):
            made.append({"index": index, "delta": told, "logprobs": logprobs, "finish_reason": finish})

        if index not in self.begun:
            self.begun.add(index)
            piece({"role": "assistant", "content": ""})
        if delta.reasoning:
            piece({"reasoning_content": delta.reasoning})
        if delta.content or delta.logprobs:
            piece(
                {"content": delta.content},
                None,
                answers.chat_logprobs(delta.logprobs or None, self.ask.config.logprobs, self.tokenizer),
            )
        for call in delta.calls:
            function = {"arguments": call.arguments}
            if call.id is None:
                piece({"tool_calls": [{"index": call.index, "function": function}]})
            else:
                function = {"name": call.name, **function}
                piece({"tool_calls": [{"index": call.index, "id": call.id, "type": "function", "function": function}]})
        if delta.finish and delta.finish not in ("error", "abort"):
            piece({}, delta.finish)
        if self.ask.return_token_ids:
            if not made:
                piece({"content": ""})
            made[-1]["token_ids"] = delta.token_ids
        return made


class Completion(Frame):
    """Completions; with echo, each begins with its prompt."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, service, answer):
        super().__init__(service, answer)
        self.count = answer.ask.best_of or answer.ask.config.n  # answers to one prompt, on their way
        self.length: dict[int, int] = {}  # choice -> characters that its tokens have printed so far
        self.echoes: list[tuple[str, list[dict] | None]] = []

    def prepare(self) -> None:
        """What is echoed of each prompt: its text and, if asked for, its log-probabilities."""
        ask = self.ask
        if not ask.echo:
            return
        for prompt, tokens in zip(ask.prompts, self.answer.prompts, strict=True):
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special=False)
            chances = None if ask.config.logprobs is None else self.service.scores(tokens, ask.config.logprobs)
            self.echoes.append((text, chances))
            if self.answer.closed:
                return

    def whole(self, messages):
        self.count = self.ask.config.n
        return super().whole(messages)

    def choice(self, index, message):
        return self._piece(index, message.content, message.logprobs, message.token_ids, message.finish)

    def pieces(self, index, delta):
        told = self.ask.return_token_ids and delta.token_ids  # they count even where they have no text yet
        if not (delta.content or delta.logprobs or delta.finish or told):
            return []
        finish = None if delta.finish in ("error", "abort") else delta.finish
        return [self._piece(index, delta.content, delta.logprobs, delta.token_ids, finish)]

    def _piece(self, index, text, chances, token_ids, finish):
        """A choice, or its newest part; its first part begins with the prompt."""
        start = self.length.get(index)
        if start is None and self.echoes:
            told, scores = self.echoes[index // self.count]
            text = told + text
            chances = None if chances is None else [*(scores or ()), *chances]
        logprobs = None
        if chances is not None:
            logprobs = answers.completion_logprobs(chances, self.tokenizer, start or 0)
        self.length[index] = (start or 0) + sum(map(len, logprobs["tokens"])) if logprobs else 0
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        if self.ask.return_token_ids:
            piece["token_ids"] = token_ids
            if start is None:
                piece["prompt_token_ids"] = self.answer.prompts[index // self.count]
        return piece
