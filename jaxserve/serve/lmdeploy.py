"""LMDeploy's own routes: /generate, /v1/chat/interactive (sessions that the server keeps), /v1/encode and /get_ppl."""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated, Any, Literal, cast

import orjson
from flask import Blueprint, request
from msgspec import Meta, Struct

from jaxserve import bodies
from jaxserve.bodies import ParamError, Sampling
from jaxserve.protocol import CHAT, COMPLETION
from jaxserve.serve import body, dialect, stream
from jaxserve.serve.answer import failure
from jaxserve.serve.openapi import Operation
from jaxserve.serve.service import Service

GENERATE_TOKENS, INTERACTIVE_TOKENS = 128, 512  # LMDeploy's defaults
SESSION = "session"
Ids = list[Annotated[int, Meta(ge=0, le=2**31 - 1)]]


class GenerateBody(Sampling):
    """The body of /generate: prompt, or input_ids."""

    prompt: str | None = None
    input_ids: Ids | None = None
    return_logprob: bool | None = None
    session_id: int | None = None
    image_data: Any = None


class FinishReason(Struct):
    """Why an answer ended."""

    type: Literal["stop", "length"]


class GenerateMeta(Struct):
    """What is known of an answer; output_token_logprobs: [log-probability, token id] each."""

    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    output_token_logprobs: list[tuple[float, int]] | None


class Generated(Struct):
    """An answer, or in a stream what is new of it."""

    text: str
    output_ids: list[int]
    meta_info: GenerateMeta


class InteractiveBody(Struct):
    """The body of /v1/chat/interactive.

    With interactive_mode the server keeps the conversation under session_id; a request without ends it.
    """

    prompt: Annotated[str | list[dict[str, Any]], Meta(description="a text or a list of messages")] = ""
    session_id: Annotated[int, Meta(ge=-1, le=2**63 - 1)] = -1
    interactive_mode: bool = False
    stream: bool = False
    stop: str | list[str] | None = None
    request_output_len: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.8
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 40
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.8
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cancel: bool = False
    adapter_name: str | None = None
    image_url: Any = None
    seed: int | None = None


class Interactive(Struct):
    """An answer, or in a stream what is new of it; tokens: of the answer so far."""

    text: str
    tokens: int
    input_tokens: int
    history_tokens: int
    finish_reason: Literal["stop", "length"] | None


class EncodeBody(Struct):
    """The body of /v1/encode.  do_preprocess: put texts into the chat template."""

    input: str | Annotated[list[str], Meta(max_length=4096)]
    do_preprocess: bool = False
    add_bos: bool = True


class Encoded(Struct):
    """Token ids and their number; lists of them for a list of texts."""

    input_ids: list[int | list[int]]
    length: int | list[int]


class PerplexityBody(Struct):
    """The body of /get_ppl: a text, or token ids."""

    input: Annotated[str, Meta(min_length=1)] | Annotated[Ids, Meta(min_length=2)]


class Perplexity(Struct):
    """The mean cross entropy of a text's tokens: the logarithm of its perplexity."""

    ppl: float


OPERATIONS = (
    Operation(
        "post",
        "/generate",
        "Continue a text or token ids",
        "LMDeploy",
        GenerateBody,
        Generated,
        streams=Generated,
        errors=(404,),
    ),
    Operation(
        "post",
        "/v1/chat/interactive",
        "One turn of a conversation that the server keeps",
        "LMDeploy",
        InteractiveBody,
        Interactive,
        streams=True,
    ),
    Operation("post", "/v1/encode", "Token ids of texts", "LMDeploy", EncodeBody, Encoded),
    Operation("post", "/get_ppl", "How likely a text is", "LMDeploy", PerplexityBody, Perplexity),
)


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("lmdeploy", __name__)
    running = dialect.Running(service.engine, SESSION)

    @routes.post("/generate")
    def generate():
        raw = body.read()
        return _generate(service, raw, cast(GenerateBody, bodies.convert(raw, GenerateBody)))

    @routes.post("/v1/chat/interactive")
    def interactive():
        given = dialect.read(InteractiveBody)
        return Turn(service, running, given).answer()

    @routes.post("/v1/encode")
    def encode():
        given = dialect.read(EncodeBody)
        if isinstance(given.input, str):
            ids = _encode(service, given, given.input)
            return body.send({"input_ids": ids, "length": len(ids)})
        many = [_encode(service, given, text) for text in given.input]
        return body.send({"input_ids": many, "length": list(map(len, many))})

    @routes.post("/get_ppl")
    def get_ppl():
        return body.send({"ppl": _perplexity(service, dialect.read(PerplexityBody))})

    return routes


def _encode(service: Service, given: EncodeBody, text: str) -> list[int]:
    if given.do_preprocess:
        text = service.template.render(text)
    return dialect.tokens(service, "input", text, bos=given.add_bos)


def _perplexity(service: Service, given: PerplexityBody) -> float:
    if isinstance(given.input, str):
        ids = dialect.tokens(service, "input", given.input)
    else:
        ids = given.input
        if any(token >= service.vocab for token in ids):
            raise ParamError("input", f"input: token ids of this model are 0 to {service.vocab - 1}, not {max(ids)}")
    if not 2 <= len(ids) <= service.session_len:
        raise ParamError("input", f"input has 2 to {service.session_len} tokens, not {len(ids)}")
    return -float(service.engine.score(ids, "logprobs").mean())


# /generate ------------------------------------------------------------------------------------------------------------


def _generate(service: Service, raw: dict, given: GenerateBody):
    if (given.prompt is None) == (given.input_ids is None):
        raise ParamError("prompt", "prompt, a text, or input_ids is needed: one of the two")
    if given.image_data is not None:
        raise ParamError("image_data", "image_data: images are not supported by this model")
    asked = {name: raw[name] for name in Sampling.__struct_fields__ if raw.get(name) is not None}
    asked |= {"prompt": given.input_ids if given.prompt is None else given.prompt, "n": 1}
    asked.setdefault("max_tokens", GENERATE_TOKENS)
    if given.return_logprob:
        asked["logprobs"] = 0
    with dialect.renamed({"prompt": "prompt" if given.input_ids is None else "input_ids"}):
        answer = service.start(service.parse(COMPLETION, asked))
    if given.stream:
        return stream.sse(answer, _generated(answer), slow_reader=service.limits.slow_reader)
    with stream.watched(answer):
        (message,) = answer.collect()
    return body.send(_piece(answer, message))


def _generated(answer) -> Iterator[bytes]:
    for _, delta in answer:
        if delta is None:
            yield stream.KEEP_ALIVE
            continue
        if delta.finish in ("error", "abort"):
            raise failure(delta)
        yield stream.data(_piece(answer, delta))
    if not answer.closed:
        yield stream.DONE


def _piece(answer, part) -> dict:
    """A Message or a Delta."""
    chances = [next(iter(row.items())) for row in part.logprobs or ()]
    meta = {
        "finish_reason": {"type": part.finish} if part.finish else None,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "output_token_logprobs": [[chance, token] for token, chance in chances] or None,
    }
    return {"text": part.content, "output_ids": part.token_ids, "meta_info": meta}


# /v1/chat/interactive -------------------------------------------------------------------------------------------------


class Turn:
    """One turn of a session.  A turn that is not answered to its end leaves no trace in the session."""

    def __init__(self, service: Service, running: dialect.Running, given: InteractiveBody):
        self.service, self.running, self.given = service, running, given
        for name in ("adapter_name", "image_url"):
            if getattr(given, name) is not None:
                raise ParamError(name, f"{name}: this model takes no adapters and no images")
        self.key = f"{_client()} {given.session_id}" if given.session_id >= 0 else None
        self.messages: list[dict] = []
        self.history = self.input = 0  # tokens

    def answer(self):
        """The response to the request."""
        given = self.given
        if given.cancel:
            return self._cancel()
        self._recall()
        told = [{"role": "user", "content": given.prompt}] if isinstance(given.prompt, str) else given.prompt
        if not given.prompt and not given.interactive_mode:
            self._keep(None, 0)
            return body.send(self._piece("", 0, None))
        self.messages += told
        with dialect.renamed({"messages": "prompt"}):
            ask = self.service.parse(CHAT, self._chat())
            ids = dialect.chat_tokens(self.service, ask)
        self.input = max(0, len(ids) - self.history)
        room = self.service.session_len - len(ids)
        if given.request_output_len == 0 or room <= 0:  # the first only tells the session what was said before
            if room > 0:
                self._keep("", len(ids))
            return body.send(self._piece("", 0, "length"))
        self.prompt = len(ids)
        answer = self.service.submit(ask, [ids])
        if given.stream:
            lines = self._lines(answer)
            return stream.sse(answer, lines, slow_reader=self.service.limits.slow_reader, error=_line_of_error)
        with stream.watched(answer), self._named(answer):
            (message,) = answer.collect()
        self._end(answer, message.content)
        return body.send(self._piece(message.content, answer.completion_tokens, message.finish))

    def _chat(self) -> dict:
        given = self.given
        same = ("stream", "top_p", "top_k", "temperature", "repetition_penalty", "ignore_eos", "skip_special_tokens")
        made = {name: getattr(given, name) for name in (*same, "stop", "seed") if getattr(given, name) is not None}
        length = INTERACTIVE_TOKENS if given.request_output_len is None else given.request_output_len
        return made | {"messages": self.messages, "max_tokens": max(1, length)}

    def _lines(self, answer) -> Iterator[bytes]:
        text = ""
        with self._named(answer):
            for _, delta in answer:
                if delta is None:
                    yield b"\n"
                    continue
                if delta.finish in ("error", "abort"):
                    raise failure(delta)
                text += delta.content
                if delta.finish:
                    self._end(answer, text)
                yield _line(self._piece(delta.content, answer.completion_tokens, delta.finish))

    def _piece(self, text: str, tokens: int, finish: str | None) -> dict:
        counts = {"tokens": tokens, "input_tokens": self.input, "history_tokens": self.history}
        return {"text": text, **counts, "finish_reason": finish}

    def _named(self, answer):
        return self.running.named(self.key, answer) if self.key else nullcontext()

    def _cancel(self):
        if self.key is None:
            raise ParamError("session_id", "session_id: cancel needs the number of the session that is to end")
        self.running.cancel(self.key)
        self.service.engine.forget(SESSION, self.key)
        return body.send(self._piece("", 0, None))

    def _recall(self) -> None:
        data = self.service.engine.recall(SESSION, self.key) if self.key else None
        if data is not None:
            record = orjson.loads(data)
            self.messages, self.history = record["messages"], record["tokens"]

    def _end(self, answer, text: str) -> None:
        self._keep(text, self.prompt + answer.completion_tokens)

    def _keep(self, text: str | None, tokens: int) -> None:
        """Notes the turn, or forgets a session that is over."""
        if self.key is None:
            return
        if not self.given.interactive_mode:
            self.service.engine.forget(SESSION, self.key)
            return
        said = [{"role": "assistant", "content": text}] if text else []
        record = {"messages": self.messages + said, "tokens": tokens}
        self.service.engine.keep(SESSION, self.key, orjson.dumps(record))


def _client() -> str:
    """Whose sessions these are: many clients call theirs 1, and those with other keys must not meet in it."""
    given = request.headers.get("Authorization", "") + request.headers.get("x-api-key", "")
    return hashlib.sha256(given.encode()).hexdigest()[:32]


def _line(value: dict) -> bytes:
    return orjson.dumps(value) + b"\n"


def _line_of_error(error) -> bytes:
    return _line(error.body())
