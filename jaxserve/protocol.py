"""OpenAI's request bodies to an Ask: prompts, a GenerationConfig and what else shapes the answer.

LMDeploy's and vLLM's extra parameters are understood too, and unknown ones ignored.  What a body leaves open is the
model's: its generation_config.json.  Does no IO.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxserve.bodies import MOST_PROMPTS, ChatBody, CompletionBody, ParamError, Sampling, StreamOptions, convert, shown
from jaxserve.config import GenerationConfig
from jaxserve.text import chat as conversation

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's answer may be as long as fits
MOST_MESSAGES = 20_000
MOST_PARTS = 10_000  # of one message
MOST_ANSWERS = 1024  # of one body: its prompts times n
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "environment")

# Variables of chat templates that a client may set; the others are the server's.
VARIABLES = (
    *("enable_thinking", "thinking", "clear_thinking", "preserve_thinking", "thinking_budget", "reasoning_effort"),
    *("date_string", "today_date", "strftime_now", "tools_in_user_message", "builtin_tools", "model_identity"),
)


# Parameters that are fields of GenerationConfig: OpenAI's name -> ours.
SAME = (
    *("n", "temperature", "top_p", "min_p", "ignore_eos", "min_new_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "bad_words", "bad_token_ids", "stop_token_ids"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
FIELDS = {name: name for name in SAME} | {"stop": "stop_words", "min_tokens": "min_new_tokens"}
# Parameters that ask for what is not there, and would change the answer.
ABSENT = {
    "functions": "send tools in the place of functions",
    "function_call": "send tool_choice in the place of function_call",
    "adapter_name": "LoRA adapters are not there yet",
    "chat_template": "the chat template is the server's",
}


@dataclass(frozen=True)
class Ask:
    """What a body asks for.

    prompts: one conversation (messages, or a text that is a whole prompt), or the prompts of a completion (texts or
    token ids).  tools: those that the model is shown.  tool_choice: "none", "auto", "required" or a function's name.
    grammar: what the answer must look like, as llguidance has it, and shape the parameter that says so.  best_of:
    answers made for the n that are returned.
    """

    chat: bool
    prompts: list
    do_preprocess: bool
    config: GenerationConfig
    variables: dict = field(default_factory=dict)  # for the chat template
    model: str | None = None
    tools: list[dict] | None = None
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    grammar: str | None = None
    shape: str | None = None
    echo: bool = False
    best_of: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    request_id: str | None = None  # the client's name for it

    @classmethod
    def parse(cls, url, body, advice: dict | None = None, **defaults) -> Ask:
        """advice: the model's generation_config.json.  defaults: of GenerationConfig's fields.

        ParamError names the parameter that cannot be used.
        """
        if url not in (CHAT, COMPLETION):
            raise ParamError("url", f"url: {CHAT} and {COMPLETION} are answered, not {shown(url)}")
        if not isinstance(body, dict):
            raise ParamError(None, f"body is an object, not {shown(body)}")
        chat = url == CHAT
        given: Any = convert(body, ChatBody if chat else CompletionBody)
        for name, reason in ABSENT.items():
            if body.get(name) not in (None, [], {}, "auto", "none"):
                raise ParamError(name, f"{name}: {reason}")
        options = given.stream_options or StreamOptions()
        shape, grammar = _grammar(given)
        common: dict[str, Any] = {
            "config": _config(given, chat, advice or {}, defaults),
            "grammar": grammar,
            "shape": shape,
            "model": given.model,
            "stream": given.stream is True,
            "include_usage": options.include_usage is True,
            "continuous_usage": options.continuous_usage_stats is True,
            "return_token_ids": given.return_token_ids is True,
            "request_id": given.request_id or given.rid,
        }
        ask = cls(**(_chat(given) if chat else _completion(given)), **common)
        if len(ask.prompts) * (ask.best_of or ask.config.n) > MOST_ANSWERS:
            raise ParamError("n", f"n: a body asks for {MOST_ANSWERS} answers at most, prompts times n")
        return ask


# Chats ----------------------------------------------------------------------------------------------------------------


def _chat(given: ChatBody) -> dict:
    messages: Any = given.messages
    if messages is None:
        raise ParamError("messages", "messages is missing")
    if not isinstance(messages, str | list) or not messages:
        raise ParamError("messages", f"messages is a list of at least one message, not {shown(messages)}")
    if isinstance(messages, list):
        contents = _check_messages(messages)
        if given.do_preprocess is False:
            messages = "".join(contents)
            if not messages:
                raise ParamError("messages", "messages hold no text, and do_preprocess is false")
    variables = _variables(given)
    tools, choice = _tools(given)
    return {
        "chat": True,
        "prompts": [messages],
        "do_preprocess": isinstance(messages, list),  # a text is a whole prompt, as in LMDeploy
        "variables": variables,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": given.parallel_tool_calls is not False,
    }


def _check_messages(messages: list) -> list[str]:
    """The texts of messages that a template can take."""
    if len(messages) > MOST_MESSAGES:
        raise ParamError("messages", f"messages: {MOST_MESSAGES} at most, not {len(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        if not isinstance(calls := message.get("tool_calls"), list | None):
            raise ParamError("messages", f"message {number}: tool_calls is a list, not {shown(calls)}")
        if isinstance(parts := message.get("content"), list) and len(parts) > MOST_PARTS:
            raise ParamError("messages", f"message {number}: {MOST_PARTS} parts at most, not {len(parts)}")
    try:
        checked = conversation.checked(messages)
    except ValueError as error:
        raise ParamError("messages", str(error)) from None
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ParamError(
                "messages", f"message {number}: a role is one of {', '.join(ROLES)}, not {shown(message['role'])}"
            )
    return [message["content"] or "" for message in checked]


def _variables(given: ChatBody) -> dict:
    variables = dict(given.chat_template_kwargs or {})
    for name, value in variables.items():
        if name not in VARIABLES:
            raise ParamError(
                "chat_template_kwargs", f"chat_template_kwargs holds {', '.join(VARIABLES)}, not {shown(name)}"
            )
        if not isinstance(value, bool | int | float | str | None):
            raise ParamError("chat_template_kwargs", f"chat_template_kwargs: {name} is no list or object")
    if given.reasoning_effort is not None:
        variables = {"reasoning_effort": given.reasoning_effort, **variables}
        if given.reasoning_effort == "none":
            variables = {"enable_thinking": False, **variables}
    if given.enable_thinking is not None:
        variables = {"enable_thinking": given.enable_thinking, **variables}
    return variables


def _tools(given: ChatBody) -> tuple[list[dict] | None, str]:
    """The tools that the model is shown, and what it may do with them."""
    try:
        tools = conversation.checked_tools(given.tools) or []
    except ValueError as error:
        raise ParamError("tools", str(error)) from None
    names = tuple(tool["function"]["name"] for tool in tools)
    for number, name in enumerate(names):
        if not 1 <= len(name) <= 128 or not all(letter.isalnum() or letter in "_-.:/" for letter in name):
            raise ParamError("tools", f"tool {number}: a name is letters, digits, _ and -, not {shown(name)}")
        if (kind := tools[number].get("type", "function")) != "function":
            raise ParamError("tools", f"tool {number}: the type is 'function', not {shown(kind)}")
        parameters = tools[number]["function"].get("parameters")
        if not isinstance(parameters, dict | None):
            raise ParamError("tools", f"tool {number}: parameters is a JSON schema, not {shown(parameters)}")
    choice: Any = ("auto" if tools else "none") if given.tool_choice is None else given.tool_choice
    if isinstance(choice, dict):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, dict) else None
        if choice not in names:
            raise ParamError("tool_choice", f"tool_choice names a function of tools, not {shown(choice)}")
        tools = [tools[names.index(choice)]]
    if choice == "required" and not tools:
        raise ParamError("tool_choice", "tool_choice is 'required', but there are no tools")
    return (None if choice == "none" else tools or None), choice


# Completions ----------------------------------------------------------------------------------------------------------


def _completion(given: CompletionBody) -> dict:
    prompt = given.prompt
    if prompt is None:
        raise ParamError("prompt", "prompt is missing")
    if _is_prompt(prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        prompts = prompt
    else:
        raise ParamError(
            "prompt",
            f"prompt is a text, a list of texts, or one or several lists of at least one token id, not {shown(prompt)}",
        )
    if len(prompts) > MOST_PROMPTS:
        raise ParamError("prompt", f"prompt: {MOST_PROMPTS} prompts at most, not {len(prompts)}")
    if given.best_of is not None and given.best_of < (given.n or 1):
        raise ParamError("best_of", f"best_of is n or more, not {given.best_of} with n={given.n or 1}")
    best_of = given.best_of if given.best_of != (given.n or 1) else None
    if best_of and given.stream:
        raise ParamError("best_of", "best_of: the best answers cannot be streamed, as they are known at the end")
    return {"chat": False, "prompts": prompts, "do_preprocess": False, "echo": given.echo is True, "best_of": best_of}


def _is_prompt(value) -> bool:
    """Whether it is a text, or token ids."""
    if isinstance(value, list):
        return bool(value) and all(type(token) is int for token in value)
    return isinstance(value, str)


# Both -----------------------------------------------------------------------------------------------------------------


def _config(given: Any, chat: bool, advice: dict, defaults: dict) -> GenerationConfig:
    wanted = dict(defaults) if chat else {"max_new_tokens": COMPLETION_TOKENS, **defaults}
    for name, ours in FIELDS.items():
        if (value := getattr(given, name)) is not None:
            wanted[ours] = value
    if given.seed is not None:
        wanted["random_seed"] = given.seed % 2**32
    if given.top_k is not None:
        wanted["top_k"] = max(0, given.top_k)
    most = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
    if most == 0 and not (not chat and given.echo):
        raise ParamError("max_tokens", "max_tokens is a whole number, 1 or more (0 only for completions with echo)")
    if most is not None:
        wanted["max_new_tokens"] = most
    wanted.setdefault("max_new_tokens", None)
    least, most = wanted.get("min_new_tokens"), wanted["max_new_tokens"]
    if least is not None and most is not None and least > most:
        raise ParamError("min_tokens", f"min_tokens is at most max_tokens, {most}, not {least}")
    if given.logit_bias is not None:
        wanted["logit_bias"] = {_token(key): value for key, value in given.logit_bias.items()}
    wanted["logprobs"] = _logprobs(given, chat)
    try:
        if not {"temperature", "top_k", "top_p"} & wanted.keys() or "top_k" in {*wanted, *advice}:
            return GenerationConfig.from_hf(advice, **wanted)
        return GenerationConfig.from_hf(advice, top_k=0, **wanted)  # in OpenAI's sense: no bound but top_p
    except ValueError as error:
        raise ParamError(None, str(error)) from None


def _token(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise ParamError("logit_bias", f"logit_bias is an object of token ids and numbers; {shown(key)} is no token id")
    return int(key)


def _logprobs(given: Any, chat: bool) -> int | None:
    """How many alternatives are told beside each token; None: no log-probabilities at all."""
    if not chat:
        return (1 if given.logprobs else None) if isinstance(given.logprobs, bool) else given.logprobs
    if given.top_logprobs and not given.logprobs:
        raise ParamError("top_logprobs", "top_logprobs needs logprobs: true")
    return (given.top_logprobs or 0) if given.logprobs else None


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


def _grammar(given: Sampling) -> tuple[str | None, str | None]:
    """The parameter that says what the answer must look like, and the grammar of it; None where that is free."""
    ways = [name for name in ("response_format", *GUIDED) if getattr(given, name) is not None]
    if given.response_format == {"type": "text"}:
        ways.remove("response_format")
    if not ways:
        return None, None
    if len(ways) > 1:
        raise ParamError(ways[1], f"{' and '.join(ways)} say the same thing in two ways: give one of them")
    from jaxserve.text import grammar

    try:
        if ways == ["response_format"]:
            return ways[0], grammar.from_response_format(given.response_format)
        return ways[0], grammar.from_guided(**{ways[0]: getattr(given, ways[0])})
    except ValueError as error:
        raise ParamError(ways[0], str(error)) from None
