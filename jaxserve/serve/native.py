"""Routes of other servers that tools ask for: embeddings, vLLM's tokenizer routes, LMDeploy's own, health."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from flask import Blueprint
from msgspec import Meta, Struct

from jaxserve import bodies
from jaxserve.bodies import ParamError
from jaxserve.protocol import CHAT
from jaxserve.serve import body, dialect, health, lmdeploy
from jaxserve.serve.openapi import Operation
from jaxserve.serve.service import Service

MOST_INPUTS = 2048  # of one request for embeddings


class EmbeddingsBody(Struct):
    """The body of /v1/embeddings."""

    input: Annotated[
        Any,
        Meta(
            extra_json_schema={
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048},
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                        "minItems": 1,
                        "maxItems": 2048,
                    },
                ]
            }
        ),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    user: str | None = None


class Embedding(Struct):
    """embedding: a unit vector, or its float32 (little-endian) in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class PromptUsage(Struct):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    """What a model makes of texts, as vectors."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: PromptUsage


class TokenizeBody(Struct):
    """The body of /tokenize: prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class Tokenized(Struct):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class DetokenizeBody(Struct):
    """The body of /detokenize."""

    tokens: list[Annotated[int, Meta(ge=0, le=2**31 - 1)]]
    model: str | None = None


class Detokenized(Struct):
    """The text of token ids."""

    prompt: str


OPERATIONS = (
    Operation("post", "/v1/embeddings", "Texts as vectors", "OpenAI", EmbeddingsBody, Embeddings, errors=(404,)),
    Operation(
        "post", "/tokenize", "Token ids of a text or a conversation", "tokens", TokenizeBody, Tokenized, errors=(404,)
    ),
    Operation("post", "/detokenize", "The text of token ids", "tokens", DetokenizeBody, Detokenized, errors=(404,)),
    Operation("get", "/tokenizer_info", "What the tokenizer's config says", "tokens", answer=dict),
    *lmdeploy.OPERATIONS,
    *health.OPERATIONS,
)


def blueprint(service: Service) -> Blueprint:
    """The routes, for one model."""
    routes = Blueprint("native", __name__)
    routes.register_blueprint(lmdeploy.blueprint(service))
    routes.register_blueprint(health.blueprint(service))

    @routes.post("/v1/embeddings")
    def embeddings():
        return body.send(_embeddings(service, dialect.read(EmbeddingsBody)))

    @routes.post("/tokenize")
    def tokenize():
        return body.send(_tokenize(service, dialect.read(TokenizeBody)))

    @routes.post("/detokenize")
    def detokenize():
        given = dialect.read(DetokenizeBody)
        service.check_model(given.model)
        _known(service, "tokens", given.tokens)
        return body.send({"prompt": service.tokenizer.decode(given.tokens, skip_special=False)})

    @routes.get("/tokenizer_info")
    def tokenizer_info():
        return body.send(_info(service))

    return routes


# Embeddings -----------------------------------------------------------------------------------------------------------


def _embeddings(service: Service, given: EmbeddingsBody) -> dict:
    service.check_model(given.model)
    width = service.info["width"]
    if given.dimensions is not None and given.dimensions > width:
        raise ParamError("dimensions", f"dimensions: the vectors of this model have {width}, not {given.dimensions}")
    sequences = [_sequence(service, "input", one) for one in _inputs(given.input)]
    made = []
    for index, state in enumerate(service.known(sequences, "last")):
        vector = unit(state[: given.dimensions])
        told = base64.b64encode(vector.tobytes()).decode() if given.encoding_format == "base64" else vector.tolist()
        made.append({"object": "embedding", "index": index, "embedding": told})
    count = sum(map(len, sequences))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": made, "model": given.model or service.model, "usage": usage}


def _inputs(given) -> list:
    """Texts and lists of token ids, one a vector."""
    if isinstance(given, str) or _are_ids(given):
        return [given]
    if isinstance(given, list) and given and all(isinstance(one, str) or _are_ids(one) for one in given):
        if len(given) > MOST_INPUTS:
            raise ParamError("input", f"input: {MOST_INPUTS} texts at most, not {len(given)}")
        return given
    kinds = "a text, a list of texts, or one or several lists of at least one token id"
    raise ParamError("input", f"input is {kinds}, not {bodies.shown(given)}")


def _are_ids(value) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _sequence(service: Service, name: str, given) -> list[int]:
    """One input as tokens that fit into the model."""
    if isinstance(given, str):
        if not given:
            raise ParamError(name, f"{name}: a text is empty")
        ids = dialect.tokens(service, name, given)
    else:
        ids = _known(service, name, given)
    if not 1 <= len(ids) <= service.session_len:
        raise ParamError(name, f"{name}: a text has 1 to {service.session_len} tokens, not {len(ids)}")
    return ids


def _known(service: Service, name: str, ids: list[int]) -> list[int]:
    for token in ids:
        if not 0 <= token < service.vocab:
            raise ParamError(name, f"{name}: token ids of this model are 0 to {service.vocab - 1}, not {token}")
    return ids


def unit(vector: np.ndarray) -> np.ndarray:
    """float32 of length 1, whatever the range of the given numbers."""
    made = np.asarray(vector, np.float64)
    length = np.linalg.norm(made)
    return (made / length if length > 0 else made).astype("<f4")


# Tokens ---------------------------------------------------------------------------------------------------------------


def _tokenize(service: Service, given: TokenizeBody) -> dict:
    service.check_model(given.model)
    if (given.prompt is None) == (given.messages is None):
        raise ParamError("prompt", "prompt, a text, or messages is needed: one of the two")
    if given.prompt is not None:
        ids = dialect.tokens(service, "prompt", given.prompt, bos=given.add_special_tokens is not False)
    else:
        if given.continue_final_message and given.add_generation_prompt:
            name = "continue_final_message"
            raise ParamError(name, f"{name}: an answer is continued, or a new one begun (add_generation_prompt)")
        names = ("messages", "tools", "chat_template_kwargs")
        chat = {name: value for name in names if (value := getattr(given, name)) is not None}
        ask = service.parse(CHAT, chat)
        generate = given.continue_final_message or given.add_generation_prompt is not False
        ids = dialect.chat_tokens(service, ask, add_generation_prompt=generate)
    strings = [service.tokenizer.core.id_to_token(token) for token in ids] if given.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.session_len, "tokens": ids, "token_strs": strings}


def _info(service: Service) -> dict:
    """As a tokenizer_config.json says it, in so far as it matters to clients."""
    tokenizer = service.tokenizer
    made: dict[str, Any] = {"bos_token": None, "eos_token": None, "pad_token": None, "unk_token": None}
    made |= tokenizer.named
    return made | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(tokenizer.bos_ids),
        "add_eos_token": False,
        "model_max_length": service.session_len,
        "vocab_size": tokenizer.vocab_size,
        "chat_template": tokenizer.chat_template,
    }
