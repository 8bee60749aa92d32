"""Request bodies as typed, bounded Structs, and the errors that name what does not fit.

What the bodies mean is told in jaxserve.protocol; the OpenAPI document is made from the Structs.  Does no IO.
"""

from __future__ import annotations

import functools
import reprlib
import typing
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

MOST_PROMPTS = 1024  # of one completion


class ParamError(ValueError):
    """A parameter that cannot be used; `param` is its name, None for the body as a whole; code: OpenAI's, if any."""

    def __init__(self, param: str | None, message: str, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def _number(low: float, high: float) -> Meta:
    return Meta(ge=low, le=high, description=f"a number from {low:g} to {high:g}")


def _whole(low: int, high: int, words: str | None = None) -> Meta:
    return Meta(ge=low, le=high, description=words or f"a whole number from {low} to {high}")


INT64 = 2**63 - 1
Flag = Annotated[bool, Meta(description="true or false")]
Count = Annotated[int, _whole(1, INT64, "a whole number, 1 or more")]
Natural = Annotated[int, _whole(0, INT64, "a whole number, 0 or more")]
Share = Annotated[float, Meta(gt=0, le=1, description="a number above 0 and up to 1")]
StopText = Annotated[str, Meta(min_length=1, max_length=1000)]
Ids = Annotated[
    list[Annotated[int, _whole(0, 2**31 - 1)]], Meta(max_length=1024, description="a list of token ids, 1024 at most")
]
Texts = Annotated[list[StopText], Meta(max_length=128, description="a list of texts, 128 at most")]
Object = Annotated[dict[str, Any], Meta(description="an object")]
Bias = Annotated[
    dict[str, Annotated[float, _number(-100, 100)]],
    Meta(max_length=300, description="an object of token ids and numbers from -100 to 100, 300 at most"),
]


MESSAGES = [{"$ref": f"#/components/schemas/{name}"} for name in ("Message", "AssistantMessage")]


class StreamOptions(Struct):
    """What a stream tells beside the answer."""

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class Sampling(Struct):
    """What chats and completions have in common."""

    model: Annotated[str, Meta(description="the name of a model that this server has")] | None = None
    temperature: Annotated[float, _number(0, 2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, _whole(-1, 2**31 - 1, "a whole number; 0 and -1 stand for all tokens")] | None = None
    min_p: Annotated[float, _number(0, 1)] | None = None
    max_tokens: Natural | None = None
    max_completion_tokens: Count | None = None
    min_tokens: Natural | None = None
    min_new_tokens: Natural | None = None
    n: Annotated[int, _whole(1, 128)] | None = None
    seed: Annotated[int, _whole(-(2**63), INT64, "a whole number of 64 bits")] | None = None
    stop: (
        StopText
        | Annotated[list[StopText], Meta(max_length=32, description="a text or up to 32 texts of 1 to 1000 characters")]
        | None
    ) = None
    stop_token_ids: Ids | None = None
    bad_words: Texts | None = None
    bad_token_ids: Ids | None = None
    presence_penalty: Annotated[float, _number(-2, 2)] | None = None
    frequency_penalty: Annotated[float, _number(-2, 2)] | None = None
    repetition_penalty: Annotated[float, _number(0.01, 100)] | None = None
    logit_bias: Bias | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    include_stop_str_in_output: Flag | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: Flag | None = None
    request_id: Annotated[str, Meta(description="a text, the client's name for the request")] | None = None
    rid: Annotated[str, Meta(description="a text, as request_id")] | None = None
    response_format: Object | None = None
    structured_outputs: Object | None = None
    guided_json: Any = None
    guided_regex: Annotated[str, Meta(min_length=1, description="a regular expression")] | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1, description="a list of at least one text")] | None = None
    guided_grammar: Annotated[str, Meta(min_length=1, description="a grammar")] | None = None


class ChatBody(Sampling, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[
        Any,
        Meta(
            extra_json_schema={
                "anyOf": [
                    {"type": "string", "minLength": 1, "description": "a whole prompt, without a chat template"},
                    {"type": "array", "minItems": 1, "items": {"anyOf": MESSAGES}},
                ]
            }
        ),
    ]
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, _whole(0, 20)] | None = None
    tools: Annotated[list[Object], Meta(max_length=1024, description="a list of functions, 1024 at most")] | None = None
    tool_choice: Literal["none", "auto", "required"] | Object | None = None
    parallel_tool_calls: Flag | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: Object | None = None
    do_preprocess: Flag | None = None
    modalities: Annotated[list[Literal["text"]], Meta(description='["text"]: models answer with text')] | None = None


class ChatRequest(ChatBody, kw_only=True):
    """The body of /v1/chat/completions as clients send it: the model is named, as OpenAI asks."""

    model: Annotated[str, Meta(description="the name of a model that this server has")]


class CompletionBody(Sampling, kw_only=True):
    """The body of /v1/completions."""

    prompt: Annotated[
        Any,
        Meta(
            extra_json_schema={
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "array",
                        "items": {"type": "string", "minLength": 1},
                        "minItems": 1,
                        "maxItems": MOST_PROMPTS,
                    },
                    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                    {
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                        "minItems": 1,
                        "maxItems": MOST_PROMPTS,
                    },
                ]
            }
        ),
    ]
    logprobs: Annotated[int, _whole(0, 20)] | bool | None = None
    echo: Flag | None = None
    suffix: Annotated[str, Meta(max_length=0, description="empty: filling in the middle is not there")] | None = None
    best_of: Annotated[int, _whole(1, 128)] | None = None


def convert(body: dict, kind: type[Struct]) -> Struct:
    """A body as a Struct; ParamError names the parameter that does not fit, what it may be, and what it is."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), body, kind) from None
    except RecursionError:
        raise ParamError(None, "the body is nested too deeply") from None


def shown(value) -> str:
    """A client's value inside a message: short, however large or deep it is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr(maxlevel=2, maxdict=3, maxlist=4, maxstring=60, maxlong=40, maxother=60)


def _explained(message: str, body: dict, kind: type[Struct]) -> ParamError:
    """msgspec's "Expected `int`, got `str` - at `$.n`" in our words."""
    expected, _, path = message.partition(" - at `$")
    param = path.removesuffix("`").removeprefix(".")
    name = param.partition(".")[0].partition("[")[0]
    if not name:
        missing = message.partition("missing required field `")[2].partition("`")[0]
        return ParamError(missing or None, f"{missing} is missing" if missing else message.replace("`", ""))
    words = _words(kind).get(name)
    if param == name and words:
        return ParamError(name, f"{name} is {words}, not {shown(body.get(name))}")
    if words and not param.startswith(f"{name}."):
        return ParamError(name, f"{name} is {words}; found {shown(body.get(name))}")
    return ParamError(param, f"{param}: {expected[:1].lower()}{expected[1:].replace('`', '')}")


@functools.cache
def _words(kind: type[Struct]) -> dict[str, str]:
    """What the parameters of a body may be, in words."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for part in (hint, *typing.get_args(hint)):
            for meta in getattr(part, "__metadata__", ()):
                if isinstance(meta, Meta) and meta.description:
                    found[name] = meta.description
            if typing.get_origin(part) is Literal:
                found[name] = " or ".join(map(repr, typing.get_args(part)))
    return found
