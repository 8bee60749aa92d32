"""Tool calls of Llama 3.1 and later: JSON, alone or after a token; and functions in tags, for tools of one's own.

{"name": "add", "parameters": {"a": 3, "b": 5}}
<|python_tag|>{"name": "add", "parameters": {"a": 3}}; {"name": "add", "parameters": {"a": 5}}
<function=add>{"a": 3, "b": 5}</function>
"""

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.calls import Named, Objects
from jaxserve.text.tools.hermes import new_id
from jaxserve.text.tools.rules import Rules
from jaxserve.text.tools.scanner import Scanner
from jaxserve.text.tools.values import BLANKS

TAG, FUNCTION, END = "<|python_tag|>", "<function=", "</function>"
skip_special = False  # the tag is a special token


def Parser(tools: list[dict], whole: bool = False) -> Scanner:
    """The pieces of one answer; see `Scanner`."""
    return Scanner(tools, {TAG: _read, FUNCTION: _read_function}, new_id, first=_read_first, whole=whole)


def _read(sink):
    return Objects(sink, separators=BLANKS + ";,")


def _read_first(sink):
    return Objects(sink, separators=BLANKS + ";,", strict=True)


def _read_function(sink):
    return Named(sink, lambda head: head.strip().removesuffix(">").strip(), END)


def grammar(tools: list[dict], choice: str, parallel: bool, tokenizer: Tokenizer) -> str:
    """llguidance's JSON text for answers that call the tools; see `Rules`."""
    rules = Rules(tools, choice, tokenizer, lambda name: (f'{{"name": {name}, "parameters": ', "}"))
    return rules.text("", rules.calls, repeats=parallel, between='"; "')
