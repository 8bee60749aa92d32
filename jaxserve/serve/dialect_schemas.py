"""Answers of Anthropic's API and of OpenAI's Responses API, as types for the OpenAPI document."""

from typing import Any, Literal

from msgspec import Struct

# Anthropic ------------------------------------------------------------------------------------------------------------


class MessageErrorBody(Struct):
    """type: invalid_request_error, not_found_error, overloaded_error, api_error and the like."""

    type: str
    message: str


class MessageError(Struct):
    """What went wrong, as Anthropic's clients read it."""

    type: Literal["error"]
    error: MessageErrorBody
    request_id: str | None


class TextAnswer(Struct, tag_field="type", tag="text"):
    """Text."""

    text: str
    citations: None


class ThinkingAnswer(Struct, tag_field="type", tag="thinking"):
    """What the model thought first."""

    thinking: str
    signature: str


class Caller(Struct):
    """Who called a tool: the model."""

    type: Literal["direct"]


class ToolUseAnswer(Struct, tag_field="type", tag="tool_use"):
    """A call of one of the client's tools."""

    id: str
    name: str
    input: dict[str, Any]
    caller: Caller


class MessageUsage(Struct):
    """Counts of tokens; input_tokens leaves out those that came from the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cache_creation: None
    server_tool_use: None
    service_tier: Literal["standard"]
    inference_geo: None
    output_tokens_details: None


class MessageAnswer(Struct):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextAnswer | ThinkingAnswer | ToolUseAnswer]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    stop_details: None
    container: None
    usage: MessageUsage


class MessageEvent(Struct):
    """One event of a stream; type: message_start, content_block_delta, message_stop and the like."""

    type: str


class TokenCount(Struct):
    """The tokens of a prompt."""

    input_tokens: int


# Responses ------------------------------------------------------------------------------------------------------------


class OutputTextPart(Struct, tag_field="type", tag="output_text"):
    """Text of an answer."""

    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningTextPart(Struct, tag_field="type", tag="reasoning_text"):
    """Text of the reasoning."""

    text: str


Progress = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Struct, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    role: Literal["assistant"]
    status: Progress
    content: list[OutputTextPart]


class OutputReasoning(Struct, tag_field="type", tag="reasoning"):
    """What the model thought first."""

    id: str
    status: Progress
    summary: list[Any]
    content: list[ReasoningTextPart]


class OutputCall(Struct, tag_field="type", tag="function_call"):
    """A call of one of the client's functions."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: Progress


class InputDetails(Struct):
    """Prompt tokens found in the prefix cache."""

    cached_tokens: int


class OutputDetails(Struct):
    """Tokens of the reasoning: not counted apart."""

    reasoning_tokens: int


class ResponseUsage(Struct):
    """Counts of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Struct):
    """Why a response is incomplete."""

    reason: str


class ResponseError(Struct):
    """Why a response failed."""

    code: str
    message: str


class Response(Struct):
    """The answer of /v1/responses."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    parallel_tool_calls: bool
    presence_penalty: float
    frequency_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    user: str | None


class ResponseEvent(Struct):
    """One event of a stream; type: response.created, response.output_text.delta, response.completed and the like."""

    type: str
    sequence_number: int


class Deleted(Struct):
    """A response that is not stored any more."""

    id: str
    object: Literal["response"]
    deleted: bool


class InputItems(Struct):
    """Some of the items that led to a response."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(Struct):
    """The tokens that a response's input would have."""

    object: Literal["response.input_tokens"]
    input_tokens: int
