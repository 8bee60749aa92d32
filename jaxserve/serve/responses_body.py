"""Bodies of OpenAI's Responses API, and what they ask for as the body of a chat completion.  Does no IO.

Items become messages; the tools are the client's functions.  Tools that OpenAI's servers would run (web search and the
like) are left out, since agents offer them unasked; images and files are refused by name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from jaxserve.bodies import ParamError

Id = Annotated[str, Meta(min_length=1, max_length=256)]


class InputText(Struct, tag_field="type", tag="input_text"):
    """Text of a client."""

    text: str


class OutputText(Struct, tag_field="type", tag="output_text"):
    """Text of an answer, given back."""

    text: str


class PlainText(Struct, tag_field="type", tag="text"):
    """Text."""

    text: str


class SummaryText(Struct, tag_field="type", tag="summary_text"):
    """A summary of reasoning."""

    text: str


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    """Reasoning, given back."""

    text: str


class Refusal(Struct, tag_field="type", tag="refusal"):
    """An answer that was refused, given back."""

    refusal: str


class InputImage(Struct, tag_field="type", tag="input_image"):
    """An image: refused, as the models served here read text."""


class InputFile(Struct, tag_field="type", tag="input_file"):
    """A file: refused, as the models served here read text."""


Part = InputText | OutputText | PlainText | SummaryText | ReasoningText | Refusal | InputImage | InputFile


class ItemMessage(Struct):
    """One turn; the type of the item may be left out."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class FunctionCall(Struct):
    """A call that the model made."""

    call_id: Id
    name: Id
    arguments: str


class FunctionCallOutput(Struct):
    """What the client's function answered."""

    call_id: Id
    output: str | list[Part]


class Reasoning(Struct):
    """What the model thought before."""

    summary: list[Part] | None = None
    content: list[Part] | None = None


ITEMS = {
    "message": ItemMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
    "reasoning": Reasoning,
}
Item = dict[str, Any]


class FunctionTool(Struct):
    """A function that the client runs."""

    name: Annotated[str, Meta(min_length=1, max_length=128, pattern="^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Struct):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct):
    """How much to think."""

    effort: str | None = None
    summary: str | None = None


class CreateResponse(Struct):
    """The body of /v1/responses; from top_k on, what LMDeploy and vLLM understand beside OpenAI's."""

    model: str
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=100_000)]
    instructions: str | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    max_tool_calls: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    store: bool | None = None
    previous_response_id: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    user: str | None = None
    top_k: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    seed: Any = None
    stop: Any = None
    logit_bias: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    skip_special_tokens: Any = None
    include_stop_str_in_output: Any = None
    chat_template_kwargs: Any = None


SAME = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "parallel_tool_calls", "top_k", "min_p"),
    *("repetition_penalty", "seed", "stop", "logit_bias", "ignore_eos", "min_tokens", "skip_special_tokens"),
    *("include_stop_str_in_output", "chat_template_kwargs"),
)
RENAMED = {  # a chat's parameter -> how it is called here
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
LOGPROBS = "message.output_text.logprobs"


def chat(body: CreateResponse, earlier: list[dict]) -> dict:
    """The same request as the body of a chat completion.

    earlier: the messages that a previous response ended with.  ParamError names what cannot be served.
    """
    for name, instead in (("conversation", "previous_response_id or a list of items"), ("prompt", "input")):
        if getattr(body, name) is not None:
            raise ParamError(name, f"{name} is not there; use {instead}")
    if body.background and body.stream:
        raise ParamError("stream", "stream: a background response is not streamed; ask for it with GET")
    if body.background and body.store is False:
        raise ParamError("store", "store: a background response is stored; do not send store: false")
    made: dict = {"model": body.model, "messages": messages(body, earlier)}
    made |= {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.max_output_tokens is not None:
        made["max_completion_tokens"] = body.max_output_tokens
    if body.top_logprobs is not None or LOGPROBS in (body.include or ()):
        made |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    tools, choice = _choice(body.tool_choice, functions(body.tools or []))
    if tools:
        made["tools"] = [{"type": "function", "function": _declared(tool)} for tool in tools]
    if choice is not None:
        made["tool_choice"] = choice
    if body.text is not None and body.text.format is not None:
        made["response_format"] = _format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        made["reasoning_effort"] = body.reasoning.effort
        if body.reasoning.effort == "none":
            made["chat_template_kwargs"] = {"enable_thinking": False} | made.get("chat_template_kwargs", {})
    return made


def functions(tools: list[dict]) -> list[FunctionTool]:
    """The tools that are functions."""
    return [
        convert(tool, FunctionTool, f"tools[{number}]")
        for number, tool in enumerate(tools)
        if tool.get("type") == "function"
    ]


def _declared(tool: FunctionTool) -> dict:
    return {name: value for name, value in msgspec.to_builtins(tool).items() if value is not None}


def _choice(choice, tools: list[FunctionTool]) -> tuple[list[FunctionTool], str | dict | None]:
    """The tools that may be called, and a chat's tool_choice."""
    if choice is None or choice in ("auto", "none", "required"):
        return tools, choice
    found = choice if isinstance(choice, dict) else {}
    if found.get("type") == "function" and isinstance(found.get("name"), str):
        _must_have(tools, found["name"])
        return tools, {"type": "function", "function": {"name": found["name"]}}
    allowed, mode = found.get("tools"), found.get("mode", "auto")
    if found.get("type") == "allowed_tools" and isinstance(allowed, list) and mode in ("auto", "required", "none"):
        names = {tool.get("name") for tool in allowed if isinstance(tool, dict) and tool.get("type") == "function"}
        for name in names:
            _must_have(tools, name)
        return [tool for tool in tools if tool.name in names], mode
    raise ParamError("tool_choice", "tool_choice is auto, none, required, or a function with its name")


def _must_have(tools: list[FunctionTool], name) -> None:
    if name not in {tool.name for tool in tools}:
        raise ParamError("tool_choice", f"tool_choice: no tool is called {name!r:.80}")


def _format(format: TextFormat) -> dict:
    if format.type != "json_schema":
        return {"type": format.type}
    if format.schema is None:
        raise ParamError("text.format.schema", "text.format.schema is missing")
    kept = {"description": format.description, "strict": format.strict}
    schema = {"name": format.name or "answer", "schema": format.schema}
    return {"type": "json_schema", "json_schema": schema | {k: v for k, v in kept.items() if v is not None}}


def convert(value, kind, where: str):
    """value as a Struct; ParamError names what is wrong below `where`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        name = where + path.rstrip("`")
        raise ParamError(name, f"{name}: {what}") from None


def messages(body: CreateResponse, earlier: list[dict]) -> list[dict]:
    """The conversation: instructions, what was before, and the input."""
    told = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else items(body.input)
    made = [*earlier, *told]
    if not made:
        raise ParamError("input", "input holds no message")
    instructions = [body.instructions] if body.instructions else []
    first = 0
    while first < len(made) and made[first]["role"] == "system":  # templates know one system message
        instructions.append(made[first]["content"])
        first += 1
    system = [{"role": "system", "content": "\n\n".join(instructions)}] if instructions else []
    return system + made[first:]


def items(given: list[Item]) -> list[dict]:
    """Items as a chat's messages: reasoning and calls join the answer that they belong to."""
    made: list[dict] = []
    thoughts: list[str] = []
    for number, item in enumerate(given):
        where = f"input[{number}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind not in ITEMS:
            raise ParamError(f"{where}.type", f"{where}: items of the type {kind!r:.80} are not supported")
        value = convert(item, ITEMS[kind], where)
        if isinstance(value, Reasoning):
            thoughts.append(_text(value.content or value.summary or [], f"{where}.content"))
        elif isinstance(value, FunctionCallOutput):
            content = _text(value.output, f"{where}.output")
            made.append({"role": "tool", "tool_call_id": value.call_id, "content": content})
        elif isinstance(value, FunctionCall):
            answer = _answer(made, thoughts)
            function = {"name": value.name, "arguments": value.arguments}
            answer.setdefault("tool_calls", []).append({"id": value.call_id, "type": "function", "function": function})
        elif value.role == "assistant":
            answer, text = _answer(made, thoughts), _text(value.content, f"{where}.content")
            answer["content"] = f"{answer['content']}\n\n{text}" if answer["content"] else text
        else:
            role = "system" if value.role == "developer" else value.role
            made.append({"role": role, "content": _text(value.content, f"{where}.content")})
    return made


def _answer(made: list[dict], thoughts: list[str]) -> dict:
    """The assistant's message that the next item belongs to."""
    if not made or made[-1]["role"] != "assistant" or thoughts:
        made.append({"role": "assistant", "content": ""})
        if thoughts:
            made[-1]["reasoning_content"] = "".join(thoughts)
            thoughts.clear()
    return made[-1]


def _text(content: str | list[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, InputImage | InputFile):
            kind = "images" if isinstance(part, InputImage) else "files"
            raise ParamError(f"{where}[{number}]", f"{where}[{number}]: {kind} are not supported by this model")
        texts.append(part.refusal if isinstance(part, Refusal) else part.text)
    return "\n".join(texts)
