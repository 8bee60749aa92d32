"""Tools in the messages of a model whose chat template does not know them, or is particular about them.

Such a model is told in a system message, in the way of Hermes, which `jaxserve.text.tools.hermes` reads:
so every model can be asked for tools, and those that were never trained to call any still can be made to by a grammar.
"""

import hashlib
import json
import string

RESULTS = ("tool", "environment", "function")  # roles of messages that bring what a tool gave

TOLD = """You can call functions. These are their names and arguments, a JSON object for each function:
<tools>
{tools}
</tools>

To call a function, reply with a JSON object between tags, and with another one for each further call:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>

What a function returns is in the next message, between <tool_response> and </tool_response>."""


def told(messages: list[dict], tools: list[dict] | None, system: bool = True) -> list[dict]:
    """The messages with `tools`, calls and results written into their texts.

    messages, tools: as `jaxserve.text.chat` checks them.  system: there may be a system message; else the first
    message of the user begins with it.
    """
    made: list[dict] = []
    for message in messages:
        if message["role"] in RESULTS:
            text = f"<tool_response>\n{message['content'] or ''}\n</tool_response>"
            if made and made[-1].get("results"):
                made[-1]["content"] += "\n" + text
            else:
                made.append({"role": "user", "content": text, "results": True})
        elif message.get("tool_calls"):
            parts = [message["content"] or "", *map(_call, message["tool_calls"])]
            made.append({"role": message["role"], "content": "\n".join(filter(None, parts))})
        else:
            made.append(message)
    made = [{key: value for key, value in message.items() if key != "results"} for message in made]
    if tools:
        shown = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        made = _before(made, TOLD.format(tools=shown), system)
    return made


def _before(messages: list[dict], text: str, system: bool) -> list[dict]:
    first = messages[0]
    instructed = first["role"] in ("system", "developer")
    if instructed and first["content"]:
        text = f"{first['content']}\n\n{text}"
    rest = messages[instructed:]
    if system or not rest or rest[0]["role"] != "user":
        return [{"role": "system", "content": text}, *rest]
    return [{**rest[0], "content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]


def _call(call: dict) -> str:
    function = call["function"]
    said = {"name": function["name"], "arguments": function.get("arguments") or {}}
    return f"<tool_call>\n{json.dumps(said, ensure_ascii=False)}\n</tool_call>"


def fitting(messages: list[dict], template: str) -> list[dict]:
    """The messages as a template that knows tools takes them; `template` is its source, "" if it is no jinja.

    Results have the role "tool", and Mistral's templates refuse ids of calls that are not nine letters and digits.
    """
    short = "[TOOL_CALLS]" in template
    made = []
    for message in messages:
        if template and message["role"] in RESULTS and message["role"] not in template:
            message = {**message, "role": "tool"}
        if short and message.get("tool_calls"):
            calls = [{**call, "id": _short(call.get("id"))} for call in message["tool_calls"]]
            message = {**message, "tool_calls": calls}
        if short and "tool_call_id" in message:
            message = {**message, "tool_call_id": _short(message["tool_call_id"])}
        made.append(message)
    return made


def _short(id) -> str:
    """The same id for the same one."""
    letters = string.ascii_letters + string.digits
    if isinstance(id, str) and len(id) == 9 and all(letter in letters for letter in id):
        return id
    digest = hashlib.sha256(str(id).encode("utf-8", "replace")).digest()
    return "".join(letters[byte % len(letters)] for byte in digest[:9])
