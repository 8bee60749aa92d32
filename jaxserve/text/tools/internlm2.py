"""InternLM2's and 2.5's tool calls, as LMDeploy reads them; Intern-S1 writes them, too.

    I add.<|action_start|><|plugin|>
    {"name": "add", "parameters": {"a": 3, "b": 5}}<|action_end|>

The end is a stop word, so it rarely comes.  A call's id is its tool's place in the list, and blanks stay.
"""

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.calls import Objects
from jaxserve.text.tools.rules import Rules
from jaxserve.text.tools.scanner import Scanner

START, PLUGIN, END = "<|action_start|>", "<|plugin|>", "<|action_end|>"
skip_special = False  # the markers are special tokens


def Parser(tools: list[dict], whole: bool = False) -> Scanner:
    """The pieces of one answer; see `Scanner`."""
    markers = {START + PLUGIN: _read, f"{START} {PLUGIN}": _read}
    return Scanner(tools, markers, new_id=str, trims=False, whole=whole)


def _read(sink):
    return Objects(sink, END, skips=True)


def grammar(tools: list[dict], choice: str, parallel: bool, tokenizer: Tokenizer) -> str:
    """llguidance's JSON text for answers that call one of the tools; see `Rules`.  The model makes one call only."""
    rules = Rules(tools, choice, tokenizer, lambda name: (f'{{"name": {name}, "parameters": ', "}"))
    return rules.text(START, f'{rules.mark(PLUGIN)} "\\n" {rules.calls} {rules.mark(END)}?', repeats=False)
