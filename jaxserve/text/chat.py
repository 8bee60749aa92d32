"""Chat templates: OpenAI messages to the prompt of a model.

A template is the checkpoint's own (jinja), one given as a file, or texts around each message, as LMDeploy has them;
`internlm2` is built in, as the template in InternLM2's checkpoints knows no tools.
"""

import json
import logging
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jaxserve.config import ChatTemplateConfig
from jaxserve.text import tool_prompt
from jaxserve.text.jinja import Jinja
from jaxserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RESERVED = {"messages", "tools", "add_generation_prompt", "documents", "chat_template", "tokenize"}
_MARK = "\ue000end of reply\ue000"  # where a reply that is to be continued ends in the rendered text


@dataclass(frozen=True)
class Delimited:
    """Texts before and after the messages of each role, with LMDeploy's names for them."""

    system: str = ""
    meta_instruction: str | None = None  # the system message of a chat without one
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""  # after a reply, when more follows
    environment: str | None = None  # results of tools
    eoenv: str = ""
    names: tuple[tuple[str, str], ...] = ()  # a message's name -> how its header says it
    call: tuple[str, str] | None = None  # around the JSON of a tool call
    stop_words: tuple[str, ...] = ()

    adds_bos = True
    source = ""

    @property
    def takes_tools(self) -> bool:
        return self.call is not None

    def render(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool, **_) -> str:
        instructed = messages[0]["role"] in ("system", "developer")
        parts = [self._message(number, message) for number, message in enumerate(messages)]
        if tools:
            parts.insert(instructed, self._message(-1, {"role": "system", "name": "plugin", "content": _list(tools)}))
        if self.meta_instruction is not None and not instructed:
            parts.insert(0, self.system + self.meta_instruction + self.eosys)
        return "".join(parts) + (self.assistant if add_generation_prompt else "")

    def _message(self, number: int, message: dict) -> str:
        role, name = message["role"], message.get("name")
        if role == "tool":
            role, name = "environment", "plugin"
        if role == "developer":
            role = "system"
        around = {
            "system": (self.system, self.eosys),
            "user": (self.user, self.eoh),
            "assistant": (self.assistant, self.eoa + self.separator),
        }
        if self.environment is not None:
            around["environment"] = (self.environment, self.eoenv)
        if role not in around:
            raise ValueError(f"message {number}: the role {message['role']!r} is none of {', '.join(around)}")
        before, after = around[role]
        header = dict(self.names).get(name) if isinstance(name, str) else None
        if header:
            before = f"{before.strip()} name={header}\n"
        return before + (message["content"] or "") + self._calls(message) + after

    def _calls(self, message: dict) -> str:
        if not message.get("tool_calls") or self.call is None:
            return ""
        start, end = self.call
        functions = [call["function"] for call in message["tool_calls"]]
        calls = [{"name": function.get("name"), "parameters": function.get("arguments")} for function in functions]
        return "".join(start + json.dumps(call, ensure_ascii=False) + end for call in calls)


INTERNLM2 = Delimited(
    system="<|im_start|>system\n",
    meta_instruction=(
        "You are an AI assistant whose name is InternLM (书生·浦语).\n"
        "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
        "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
        "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
        "English and 中文.\n"
    ),
    eosys="<|im_end|>\n",
    user="<|im_start|>user\n",
    eoh="<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    eoa="<|im_end|>",
    separator="\n",
    environment="<|im_start|>environment\n",
    eoenv="<|im_end|>\n",
    names=(("plugin", "<|plugin|>"), ("interpreter", "<|interpreter|>")),
    call=("<|action_start|><|plugin|>\n", "<|action_end|>"),
    stop_words=("<|im_end|>", "<|action_end|>"),
)


class ChatTemplate:
    """Messages to a prompt for one model.  stop_words: texts that end its reply."""

    def __init__(
        self,
        style: Jinja | Delimited,
        tokenizer: Tokenizer,
        meta_instruction: str | None = None,
        tool_style: Jinja | None = None,
        completion: bool = False,
    ):
        self.style = style
        self.tool_style = tool_style or style
        self.tokenizer = tokenizer
        self.meta_instruction = meta_instruction
        self.completion = completion
        self.stop_words = () if completion else style.stop_words

    @classmethod
    def for_model(
        cls,
        config: dict,
        tokenizer: Tokenizer,
        override: ChatTemplateConfig | str | Path | None = None,
        meta_instruction: str | None = None,
        capability: str | None = None,
    ) -> "ChatTemplate":
        """The chat template of a model: `override`, InternLM2's for its family, the checkpoint's, or none ("base").

        config: the model's config.json.  override: a .jinja file, a JSON file in LMDeploy's form or what it holds, or
        the name of a built-in template.  meta_instruction: the system message of a chat without one.  capability:
        "chat" (the default), or "completion" for no template at all.  ValueError where one of them cannot be used.
        """
        given, jinja = _read_override(override, tokenizer)
        meta = given.meta_instruction if meta_instruction is None else meta_instruction
        capability = capability or given.capability or "chat"
        if capability == "completion":
            return cls(Delimited(), tokenizer, completion=True)
        if capability != "chat":
            raise ValueError(f"the capability {capability!r} is not there; chat and completion are")
        given = replace(given, meta_instruction=meta)
        if jinja is not None:
            return cls(jinja, tokenizer, meta)
        if (texts := _delimited(config, tokenizer, given)) is not None:
            return cls(texts, tokenizer)
        styles = {key: Jinja(source, tokenizer.named) for key, source in tokenizer.templates.items()}
        style = styles.get("default") or (next(iter(styles.values())) if len(styles) == 1 else None)
        if style is None:
            raise ValueError(
                f"the model's chat templates are {', '.join(styles)}, none of them the default: give a file"
            )
        made = cls(style, tokenizer, meta, styles.get("tool_use"))
        made.stop_words += tuple(given.stop_words or ())
        return made

    @property
    def source(self) -> str:
        """The jinja of the template that shows tools; "" if it is no jinja."""
        return self.tool_style.source

    @property
    def takes_tools(self) -> bool:
        """Whether the template itself shows a list of tools to the model; where not, `render` adds it to a message."""
        return self.tool_style.takes_tools and not self.completion

    def render(
        self,
        messages: str | list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        **variables,
    ) -> str:
        """The prompt as text.  A text alone is a user's message; a last message of the assistant is to be continued.

        tools: OpenAI's list.  variables: for the checkpoint's template (enable_thinking and the like).  ValueError
        names the message (the first is 0) that cannot be used, or gives the template's own reason.
        """
        messages, tools = checked(messages), checked_tools(tools)
        if "developer" not in self.source:  # OpenAI's name for it since its models think; few templates know it
            messages = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
        number = len(messages) - 1
        if self.completion:
            return "".join(message["content"] or "" for message in messages)
        if refused := RESERVED & variables.keys():
            raise ValueError(f"a chat template's variable cannot be called {', '.join(sorted(refused))}")
        if self.meta_instruction is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.meta_instruction}, *messages]
        continues = add_generation_prompt and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        style = self.tool_style if tools else self.style
        draw = partial(self._continued, style, number) if continues else style.render
        if self.tool_style.takes_tools:
            messages = tool_prompt.fitting(messages, self.tool_style.source)
            return draw(messages, tools, add_generation_prompt, **variables)
        try:
            return draw(tool_prompt.told(messages, tools), None, add_generation_prompt, **variables)
        except ValueError:
            if not tools:
                raise
            told = tool_prompt.told(messages, tools, system=False)  # some templates know no system message
            return draw(told, None, add_generation_prompt, **variables)

    def _continued(self, style, number: int, messages: list[dict], tools: list[dict] | None, _, **variables) -> str:
        """The prompt for the rest of the last message, whose number is given for an error."""
        last = messages[-1]
        if not last["content"] and len(messages) > 1:
            return style.render(messages[:-1], tools, True, **variables)
        marked = [*messages[:-1], last | {"content": last["content"] + _MARK}]
        text, mark, _ = style.render(marked, tools, False, **variables).partition(_MARK)
        if not mark:
            raise ValueError(f"message {number}: the chat template leaves out the reply that is to be continued")
        return text

    def encode(
        self,
        messages: str | list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = True,
        **variables,
    ) -> list[int]:
        """The prompt as token ids, with one beginning-of-text token where the model wants one."""
        text = self.render(messages, tools, add_generation_prompt, **variables)
        adds = self.completion or self.style.adds_bos
        bos = self.tokenizer.named.get("bos_token")
        return self.tokenizer.encode(text, bos=adds and not (bos and text.startswith(bos)))


def _read_override(override, tokenizer: Tokenizer) -> tuple[ChatTemplateConfig, Jinja | None]:
    if override is None or isinstance(override, ChatTemplateConfig):
        return override or ChatTemplateConfig(), None
    path = Path(override)
    if not path.is_file():
        if _built_in(str(override)):
            return ChatTemplateConfig(model_name=str(override)), None
        raise ValueError(f"the chat template {str(override)!r} is no file, and not internlm2 or base")
    if path.suffix == ".json":
        return ChatTemplateConfig.from_json(path), None
    return ChatTemplateConfig(), Jinja(path.read_text(encoding="utf-8"), tokenizer.named, str(path))


def _built_in(name: str | None) -> Delimited | None:
    """A built-in template by its name; LMDeploy knows InternLM2's also as internlm2-chat-7b and the like."""
    if name and re.fullmatch(r"internlm2[\w-]*", name):
        return INTERNLM2
    return Delimited() if name == "base" else None


def _delimited(config: dict, tokenizer: Tokenizer, given: ChatTemplateConfig) -> Delimited | None:
    """The built-in template or the texts that are asked for; None if it is the checkpoint's own template."""
    names = ("system", "meta_instruction", "eosys", "user", "eoh", "assistant", "eoa", "separator", "stop_words")
    texts = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if "stop_words" in texts:
        texts["stop_words"] = tuple(texts["stop_words"])
    if built_in := _built_in(given.model_name):
        return replace(built_in, **texts)
    if texts.keys() - {"meta_instruction", "stop_words"}:
        return Delimited(**texts)
    if _is_internlm2(config):
        return replace(INTERNLM2, **texts)
    if tokenizer.templates:
        if given.model_name:
            log.warning("no chat template is called %r: the checkpoint's own is used", given.model_name)
        return None
    log.warning("the model has no chat template: the texts of a chat are put one after the other")
    return Delimited(**texts)


def checked(messages: str | list[dict]) -> list[dict]:
    """Messages with their content as one text and the arguments of tool calls read; ValueError names what is wrong."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages are a text or a list of at least one message, not {messages!r:.80}")
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message) -> dict:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is no object with role and content: {message!r:.80}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"message {number} has no role" if role is None else f"message {number}: {role!r:.80} is no role"
        )
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list | tuple):
        content = "\n".join(_part(number, part) for part in content)
    elif content is None and not calls:
        if role != "assistant":
            raise ValueError(f"message {number} ({role}) has no content")
        content = ""  # the course's script sends back a reply that was a tool call without the call
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"message {number} ({role}): the content is a text or a list of parts, not {content!r:.80}")
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name), str | None):
            raise ValueError(f"message {number} ({role}): its {name} is a text, not {message[name]!r:.80}")
    made = {**message, "content": content}
    if calls:
        made["tool_calls"] = [_call(number, call) for call in calls]
    return made


def _part(number: int, part) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or "type" not in part:
        raise ValueError(f"message {number}: a part of the content is an object with a type, not {part!r:.80}")
    if "image" in str(part["type"]):
        raise ValueError(f"message {number}: images are not supported by this model")
    if part["type"] != "text":
        raise ValueError(f"message {number}: parts of the type {part['type']!r:.80} are not supported, only text")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"message {number}: a part of the type text has no text")
    return part["text"]


def _call(number: int, call) -> dict:
    """A tool call with its arguments as an object: OpenAI sends JSON in a text, templates write JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number}: a tool call has no function with a name: {call!r:.80}")
    if not isinstance(call.get("id"), str | None) or call.get("type") not in ("function", None):
        raise ValueError(f"message {number}: a tool call has the type 'function', and a text as its id: {call!r:.80}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"message {number}: the arguments of {function['name']} are not JSON: {error}") from None
    elif not isinstance(arguments, dict | None):
        raise ValueError(f"message {number}: the arguments of {function['name']} are no object: {arguments!r:.80}")
    return {**call, "function": {**function, "arguments": arguments}}


def checked_tools(tools: list[dict] | None) -> list[dict] | None:
    """Tools in OpenAI's form (a function alone is put into it), None for none; ValueError names what is wrong."""
    made = []
    for number, tool in enumerate(tools or ()):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} is no function with a name: {tool!r:.80}")
        made.append(tool if "function" in tool else {"type": "function", "function": tool})
    return made or None


def _list(tools: list[dict]) -> str:
    """Functions as InternLM2 was trained to see them."""
    keys = ("description", "name", "parameters")
    return json.dumps([{key: tool["function"].get(key) for key in keys} for tool in tools], ensure_ascii=False)


def _is_internlm2(config: dict) -> bool:
    architecture = next(iter(config.get("architectures") or ()), "")
    return config.get("model_type") == "internlm2" or architecture.startswith("InternLM2")
