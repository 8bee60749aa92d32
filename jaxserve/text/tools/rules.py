"""Grammars for answers that call tools: the calls as a format writes them, arguments as their JSON schemas say."""

import json
from collections.abc import Callable

from jaxserve.text import grammar
from jaxserve.text.tokenizer import Tokenizer

MOST_CALLS = 16  # of one answer: held to a grammar, a small model may repeat a call as long as it is let
FURTHER = f"{{0,{MOST_CALLS - 1}}}"


class Rules:
    """Rules of Lark for one request's tools.

    tools: OpenAI's list.  choice: "required", "auto", or the name of the one that must be called; with "auto" an answer
    may be text as well, and only calls are bound.  write: a name (as JSON) -> the texts around its arguments; the
    second of three is a marker.  ValueError, naming the tool, for parameters that cannot be followed.
    """

    def __init__(self, tools: list[dict], choice: str, tokenizer: Tokenizer, write: Callable[[str], tuple[str, ...]]):
        self._free, self._tokenizer = choice == "auto", tokenizer
        functions = [tool["function"] for tool in tools if choice in ("auto", "required", tool["function"]["name"])]
        if not functions:
            raise ValueError(f"there is no tool {choice!r:.80}" if tools else "there are no tools")
        self._lines: list[str] = []
        self.calls = "(" + " | ".join(f"tool_{number}" for number in range(len(functions))) + ")"  # any one of them
        for number, function in enumerate(functions):
            before, *markers, after = write(json.dumps(function["name"], ensure_ascii=False))
            parts = [grammar.quoted(before), *map(self.mark, markers), f"%json {_parameters(function)}"]
            self.line(f"tool_{number}", " ".join(parts + [grammar.quoted(after)] * bool(after)))

    def mark(self, marker: str) -> str:
        """A marker in a rule."""
        return grammar.special(marker, self._tokenizer)

    def line(self, name: str, rule: str) -> str:
        """Adds a rule; its name."""
        self._lines.append(f"{name}: {rule}")
        return name

    def text(self, start: str, body: str, repeats: bool, between: str = "") -> str:
        """llguidance's JSON text.  start: the marker of a call, "" if calls begin with "{"; body: the rule of what
        follows; repeats: up to MOST_CALLS calls may come, with `between` between them."""
        self.line("body", body)
        mark = self.mark(start) if start else ""
        if not self._free:
            more = f"({between} {mark} body){FURTHER}" if repeats else ""
            self.line("start", f"{mark} body {more}")
        elif not start:
            more = f"({between} body){FURTHER}" if repeats else ""
            self.line("start", f"TEXT? | body {more}")
            self.line("TEXT", "/[^{](?s:.*)/")
        else:
            special = mark.startswith("<[")
            self.line("start", f"({'TEXT? ' + mark if special else 'opening'} body){'*' if repeats else '?'} TEXT?")
            self.line("TEXT", "/(?s:.+)/")
            if not special:
                self.line("opening[lazy]", f"/(?s:.*)/ {mark}")
        return grammar.lark("\n".join(self._lines))


def _parameters(function: dict) -> str:
    given = function.get("parameters") or {"type": "object", "properties": {}}
    try:
        if not isinstance(given, dict):
            raise ValueError("parameters is a JSON schema")
        schema = grammar.guided_schema(given, strict=function.get("strict") is True)
        if schema.setdefault("type", "object") != "object":
            raise ValueError("the type of parameters is object")
        return json.dumps(schema, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"tool {function['name']!r:.80}: {error}"[:300]) from None
