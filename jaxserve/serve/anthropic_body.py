"""Anthropic's request bodies, and what they ask for as a chat body in OpenAI's terms.  Does no IO.

One Struct a kind of content block.  What a text model cannot take (images, PDF files, tools that a server runs)
is refused by name; what does not bear on the answer (cache_control, citations, metadata) is ignored.
"""

from typing import Annotated, Any, Literal

import orjson
from msgspec import UNSET, Meta, Struct, UnsetType

from jaxserve.bodies import ParamError

BILLING = "x-anthropic-billing-header:"  # a line that Claude Code puts first: it differs each time, and is for no model

Name = Annotated[str, Meta(min_length=1, max_length=256)]


class TextBlock(Struct, tag_field="type", tag="text"):
    """Text."""

    text: str


class PlainText(Struct):
    """Text, where nothing else may stand."""

    type: Literal["text"]
    text: str


class ImageBlock(Struct, tag_field="type", tag="image"):
    """An image: refused, as the models served here read text."""

    source: dict[str, Any] | None = None


class DocumentBlock(Struct, tag_field="type", tag="document"):
    """A document; its source is a text, or text blocks."""

    source: dict[str, Any]
    title: str | None = None
    context: str | None = None


class SearchResultBlock(Struct, tag_field="type", tag="search_result"):
    """Something that was found, as text blocks."""

    content: list[PlainText]
    title: str = ""
    source: str = ""


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    """What the model thought before; the signature is not looked at."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, tag_field="type", tag="redacted_thinking"):
    """Thinking that nobody can read: left out."""

    data: str = ""


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: Name
    name: Name
    input: dict[str, Any]


class ToolResultBlock(Struct, tag_field="type", tag="tool_result"):
    """What a tool answered."""

    tool_use_id: Name
    content: str | list[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock] = ""
    is_error: bool = False


class SystemBlock(Struct, tag_field="type", tag="mid_conv_system"):
    """An instruction in the middle of a conversation."""

    content: list[PlainText]


Block = (
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | SystemBlock
)


class InputMessage(Struct):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolParam(Struct):
    """A function that the client runs."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern="^[a-zA-Z0-9_.-]+$")]
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | UnsetType = UNSET
    strict: bool | None = None


class MessageToolChoice(Struct):
    """Whether and which tools must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(Struct):
    """Whether to think first.  The budget is not enforced: max_tokens bounds thinking and answer together."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct):
    """A JSON schema that the answer must meet."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    """The form of the answer."""

    format: OutputFormat | None = None
    effort: str | None = None


class CountTokens(Struct):
    """The body of /v1/messages/count_tokens: what of a request becomes the prompt."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1, max_length=100_000)]
    system: str | list[PlainText] | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=1024)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None


class CreateMessage(CountTokens, kw_only=True):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1, description="a whole number, 1 or more")]
    stop_sequences: Annotated[list[str], Meta(max_length=64)] | None = None
    stream: bool = False
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    metadata: dict[str, Any] | None = None


def chat(body: CountTokens) -> dict:
    """The same request as the body of a chat completion.  ParamError names what cannot be served."""
    made: dict = {"model": body.model, "messages": _messages(body)}
    if body.tools:
        made["tools"] = [_tool(number, tool) for number, tool in enumerate(body.tools)]
    if body.tool_choice is not None:
        made["tool_choice"] = _choice(body.tool_choice)
        if body.tool_choice.disable_parallel_tool_use:
            made["parallel_tool_calls"] = False
    if body.thinking is not None and body.thinking.type != "adaptive":
        made["chat_template_kwargs"] = {"enable_thinking": body.thinking.type == "enabled"}
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.schema}
        made["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, CreateMessage):
        made["max_tokens"] = body.max_tokens
        options = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        options["stop"] = body.stop_sequences
        made |= {name: value for name, value in options.items() if value is not None and value != []}
    return made


def _messages(body: CountTokens) -> list[dict]:
    made = []
    if isinstance(body.system, str):
        system = body.system
    else:
        system = "\n".join(block.text for block in body.system or () if not block.text.startswith(BILLING))
    if system:
        made.append({"role": "system", "content": system})
    for number, message in enumerate(body.messages):
        where = f"messages.{number}.content"
        if isinstance(message.content, str):
            made.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            made.append(_assistant(where, message.content))
        else:
            made += _turn(where, message.role, message.content)
    return made


def _assistant(where: str, blocks: list[Block]) -> dict:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": orjson.dumps(block.input).decode()}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif not isinstance(block, RedactedThinkingBlock):
            raise _misplaced(f"{where}.{number}", block, "an assistant")
    made: dict = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return made


def _turn(where: str, role: str, blocks: list[Block]) -> list[dict]:
    """A user's turn: results of tools are messages of their own, and what stands around them stays in order."""
    made: list[dict] = []
    texts: list[str] = []

    def flush():
        if texts:
            made.append({"role": role, "content": "\n".join(texts)})
            texts.clear()

    for number, block in enumerate(blocks):
        if isinstance(block, ToolResultBlock):
            flush()
            content = _result(f"{where}.{number}.content", block)
            made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, SystemBlock):
            flush()
            made.append({"role": "system", "content": "\n".join(part.text for part in block.content)})
        elif isinstance(block, ThinkingBlock | RedactedThinkingBlock | ToolUseBlock):
            raise _misplaced(f"{where}.{number}", block, f"a {role}")
        else:
            texts.append(_text(f"{where}.{number}", block))
    flush()
    if not made:
        made.append({"role": role, "content": ""})
    return made


def _result(where: str, block: ToolResultBlock) -> str:
    if isinstance(block.content, str):
        text = block.content
    else:
        text = "\n".join(_text(f"{where}.{number}", part) for number, part in enumerate(block.content))
    if block.is_error and not text.lower().startswith("error"):
        return f"Error: {text}"
    return text


def _text(where: str, block) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, SearchResultBlock):
        return "\n".join([*filter(None, [block.title, block.source]), *(part.text for part in block.content)])
    if isinstance(block, DocumentBlock):
        return "\n".join([*filter(None, [block.title, block.context]), _source(where, block.source)])
    raise ParamError(where, f"{where}: images are not supported by this model")


def _source(where: str, source: dict) -> str:
    content = source.get("content")
    if source.get("type") == "text" and isinstance(source.get("data"), str):
        return source["data"]
    if source.get("type") == "content" and isinstance(content, str):
        return content
    if source.get("type") == "content" and isinstance(content, list):
        texts = [text for part in content if isinstance(part, dict) and isinstance(text := part.get("text"), str)]
        if len(texts) == len(content):
            return "\n".join(texts)
    where += ".source"
    raise ParamError(where, f"{where}: documents are texts here: no PDF files, images or addresses")


def _misplaced(where: str, block, whose: str) -> ParamError:
    kind = block.__struct_config__.tag
    return ParamError(where, f"{where}: a block of the type {kind} has no place in {whose} message")


def _tool(number: int, tool: ToolParam) -> dict:
    if tool.type not in (None, "custom"):
        kind = f"tools.{number}.type"
        raise ParamError(kind, f"{kind}: tools that the server runs are not there; the client's own have input_schema")
    if tool.input_schema is UNSET:
        where = f"tools.{number}.input_schema"
        raise ParamError(where, f"{where}: Field required")
    function: dict = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: MessageToolChoice) -> str | dict:
    if choice.type != "tool":
        return {"any": "required"}.get(choice.type, choice.type)
    if not choice.name:
        raise ParamError("tool_choice.name", "tool_choice.name: Field required")
    return {"type": "function", "function": {"name": choice.name}}
