"""Tool calls of the Hermes and Qwen families, one after the other; the format for models that know no other.

    <tool_call>
    {"name": "add", "arguments": {"a": 3, "b": 5}}
    </tool_call>

SmolLM2 writes a list between the tags.
"""

import secrets

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.calls import Objects
from jaxserve.text.tools.rules import Rules
from jaxserve.text.tools.scanner import Scanner
from jaxserve.text.tools.values import BLANKS

START, END = "<tool_call>", "</tool_call>"
skip_special = False  # in some vocabularies the markers are special tokens


def Parser(tools: list[dict], whole: bool = False) -> Scanner:
    """The pieces of one answer; see `Scanner`."""
    return Scanner(tools, {START: _read}, new_id, whole=whole)


def _read(sink):
    return Objects(sink, END, BLANKS + "[],")


def new_id(place: int) -> str:
    """A call's id as OpenAI's are."""
    return f"call_{secrets.token_hex(12)}"


def grammar(tools: list[dict], choice: str, parallel: bool, tokenizer: Tokenizer) -> str:
    """llguidance's JSON text for answers that call the tools; see `Rules`."""
    rules = Rules(tools, choice, tokenizer, lambda name: (f'{{"name": {name}, "arguments": ', "}"))
    return rules.text(START, f'"\\n" {rules.calls} "\\n" {rules.mark(END)}', repeats=parallel, between='"\\n"')
