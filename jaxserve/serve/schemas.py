"""What OpenAI's answers hold, as Structs: for the OpenAPI document, and for tests that hold the answers against them.

The answers themselves are built as dicts, in jaxserve.answers and .openai.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType


class ErrorBody(Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class Error(Struct):
    """OpenAI's envelope of an error."""

    error: ErrorBody


class Part(Struct):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class NamedArguments(Struct):
    """What a model calls."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call of a function; arguments: JSON, as the model wrote it."""

    id: str
    type: Literal["function"]
    function: NamedArguments


class GivenArguments(Struct):
    """What a model has called; arguments: JSON, or what it says."""

    name: str
    arguments: str | dict[str, Any] | UnsetType | None = UNSET


class GivenCall(Struct):
    """A call that is given back."""

    function: GivenArguments
    id: str | UnsetType | None = UNSET
    type: Literal["function"] | UnsetType | None = UNSET


class Message(Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "tool", "function", "environment"]
    content: str | list[Part | str]
    name: str | UnsetType | None = UNSET
    tool_call_id: str | UnsetType | None = UNSET


class AssistantMessage(Struct):
    """An answer given back; a call needs no content."""

    role: Literal["assistant"]
    content: str | list[Part | str] | UnsetType | None = UNSET
    name: str | UnsetType | None = UNSET
    tool_calls: list[GivenCall] | UnsetType | None = UNSET


class CachedTokens(Struct):
    """Of the prompt's tokens."""

    cached_tokens: int


class ReasoningTokens(Struct):
    """Of the answer's tokens."""

    reasoning_tokens: int


class Usage(Struct):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | UnsetType = UNSET


class Chance(Struct):
    """A token and its log-probability; bytes: what it prints, for tokens that are a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class Chances(Chance):
    """A token of the answer, and the likeliest tokens in its place."""

    top_logprobs: list[Chance]


class ChatLogprobs(Struct):
    """The tokens of an answer."""

    content: list[Chances]
    refusal: None


class AnswerMessage(Struct):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


Finish = Literal["stop", "length", "tool_calls"]


class ChatChoice(Struct):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    token_ids: list[int] | UnsetType = UNSET


class Chat(Struct):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct):
    """A piece of a call; the first has the name."""

    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """A piece of a call; the first has the id."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChatDelta(Struct):
    """What is new."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """What is new in one of n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    """One event of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Struct):
    """The tokens of a completion; null for a prompt's first token, which nothing is before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One of the completions, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct):
    """The answer of /v1/completions, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(Struct):
    """A model that answers here."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    permission: list[dict[str, Any]]


class Models(Struct):
    """The models that answer here."""

    object: Literal["list"]
    data: list[Model]
