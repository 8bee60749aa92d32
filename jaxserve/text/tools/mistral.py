"""Mistral's tool calls: a list of them, or, in newer models, one marker for each.

[TOOL_CALLS][{"name": "add", "arguments": {"a": 3, "b": 5}}]
[TOOL_CALLS]add[ARGS]{"a": 3, "b": 5}[TOOL_CALLS]mul[ARGS]{"a": 8, "b": 2}
"""

import re
import secrets
import string

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.calls import Named, Objects, Reader
from jaxserve.text.tools.rules import FURTHER, Rules
from jaxserve.text.tools.scanner import Scanner
from jaxserve.text.tools.values import BLANKS

START, ARGS = "[TOOL_CALLS]", "[ARGS]"
skip_special = False  # the markers are special tokens

_HEAD = re.compile(r"([^\[\]{}]+)(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\])?")


def Parser(tools: list[dict], whole: bool = False) -> Scanner:
    """The pieces of one answer; see `Scanner`."""
    return Scanner(tools, {START: _Either}, new_id, whole=whole)


class _Either:
    """The list, or a name; what comes first says it."""

    def __init__(self, sink):
        self.done = self.failed = False
        self._sink = sink
        self._reader: Reader | None = None

    @property
    def complete(self) -> bool:
        return self._reader is not None and self._reader.complete

    def feed(self, text: str, at: int) -> int:
        """As `Reader.feed`."""
        if self._reader is None:
            if text[at] in BLANKS:
                return at + 1
            listed = text[at] in "[{"
            self._reader = Objects(self._sink, "]", BLANKS + "[,") if listed else Named(self._sink, _name)
        at = self._reader.feed(text, at)
        self.done, self.failed = self._reader.done, self._reader.failed
        return at


def _name(head: str) -> str:
    found = _HEAD.fullmatch(head.strip())
    return found[1].strip() if found else ""


def new_id(place: int) -> str:
    """A call's id as Mistral's templates want it: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def grammar(tools: list[dict], choice: str, parallel: bool, tokenizer: Tokenizer) -> str:
    """llguidance's JSON text for answers that call the tools; see `Rules`."""
    if tokenizer.id_of(ARGS) is not None:
        rules = Rules(tools, choice, tokenizer, lambda name: (name[1:-1], ARGS, ""))
        return rules.text(START, rules.calls, repeats=parallel)
    rules = Rules(tools, choice, tokenizer, lambda name: (f'{{"name": {name}, "arguments": ', "}"))
    more = f'(", " {rules.calls}){FURTHER}' if parallel else ""
    return rules.text(START, f'" "? "[" {rules.calls} {more} "]"', repeats=False)
