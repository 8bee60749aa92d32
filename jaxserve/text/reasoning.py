"""Tells what a model thinks from what it says: <think>...</think>, and the like.

Knows the formats in which thoughts come first and the answer after them, which are nearly all.
"""

from dataclasses import dataclass

from jaxserve.text import grammar as grammars
from jaxserve.text.tokenizer import Tokenizer

BLANKS = " \t\r\n"


@dataclass(frozen=True)
class Format:
    """Texts around the thoughts.  always: they come first even if nothing says so."""

    start: str
    end: str
    always: bool = False


FORMATS = {
    "think": Format("<think>", "</think>"),
    "deepseek-r1": Format("<think>", "</think>", always=True),
    "mistral": Format("[THINK]", "[/THINK]"),
    "seed_oss": Format("<seed:think>", "</seed:think>"),
}
NAMES = {
    **{name: name for name in FORMATS},
    **dict.fromkeys(
        ("default", "qwen3", "intern-s1", "interns1", "glm45", "hunyuan_a13b", "ernie45", "olmo3"), "think"
    ),
    **dict.fromkeys(("deepseek-v3", "deepseek_v3", "deepseek-v31", "deepseek_v31", "deepseek-v32", "smollm3"), "think"),
    **dict.fromkeys(("deepseek_r1", "qwen-qwq", "qwq", "step3", "minimax_m2"), "deepseek-r1"),
}


def named(name: str) -> str:
    """The format's own name for one that LMDeploy or vLLM has; ValueError if it is not there."""
    found = NAMES.get(name.lower())
    if found is None:
        raise ValueError(f"there is no reasoning format {name!r:.80}; there are {', '.join(NAMES)}")
    return found


def detect(config: dict, template: str | None, tokenizer: Tokenizer) -> str | None:
    """The format of a model's thoughts, by its chat template's source or its vocabulary; None if it has none.

    config: its config.json.
    """
    for name, format in FORMATS.items():
        if template and format.end in template:
            return name
        if all(tokenizer.id_of(tag) is not None for tag in (format.start, format.end)):
            return name
    return None


def opens(name: str, prompt: str) -> bool:
    """Whether an answer to `prompt` (its end will do) begins with thoughts, without saying so."""
    format, end = FORMATS[name], prompt.rstrip(BLANKS)
    return end.endswith(format.start) or (format.always and not end.endswith(format.end))


class Splitter:
    """One answer's text as thoughts and words, while it comes in; the same however it is cut into pieces.

    open: it begins with thoughts.  Blanks around thoughts belong to neither.
    """

    def __init__(self, name: str, open: bool = False):
        self._format = FORMATS[name]
        self._open = open
        self._step = self._begin
        self._held = ""  # what may become a tag
        self._blanks: list[str] = []  # they count if something follows

    def feed(self, text: str) -> tuple[str, str]:
        """What is certain once `text` has come: thoughts, words."""
        thoughts: list[str] = []
        words: list[str] = []
        while text:
            text = self._step(text, thoughts, words)
        return "".join(thoughts), "".join(words)

    def finish(self) -> tuple[str, str]:
        """What is left when no more text comes."""
        blanks, held = "".join(self._blanks), self._held
        self._blanks, self._held = [], ""
        if self._step == self._think or (self._step == self._begin and self._open):
            return (blanks + held if held else ""), ""
        return "", (blanks + held if self._step == self._begin else "")

    def _begin(self, text: str, thoughts: list[str], words: list[str]) -> str:
        """The tag that begins thoughts, if it is the first that comes."""
        if not self._held:
            text = self._skip(text)
        begun = self._held + text
        if begun.startswith(self._format.start):
            self._step, self._blanks, self._held = self._gap, [], ""
            return begun[len(self._format.start) :]
        if self._format.start.startswith(begun):
            self._held = begun
            return ""
        self._held = ""
        if self._open:
            self._step, self._blanks = self._think, []
            return begun
        self._step = self._speak
        words += self._blanks
        self._blanks = []
        return begun

    def _skip(self, text: str) -> str:
        """Puts blanks aside that come first."""
        rest = text.lstrip(BLANKS)
        if len(rest) < len(text):
            self._blanks.append(text[: len(text) - len(rest)])
        return rest

    def _gap(self, text: str, thoughts: list[str], words: list[str]) -> str:
        """The blanks between a tag and what follows it: they are nobody's."""
        rest = text.lstrip(BLANKS)
        if rest:
            self._step = self._think
        return rest

    def _think(self, text: str, thoughts: list[str], words: list[str]) -> str:
        text, self._held = self._held + text, ""
        end = self._format.end
        found = text.find(end)
        if found < 0:
            sizes = range(min(len(text), len(end) - 1), 0, -1)
            keep = next((size for size in sizes if text.endswith(end[:size])), 0)
            self._held = text[len(text) - keep :]
        told = text[:found] if found >= 0 else text[: len(text) - keep]
        if kept := told.rstrip(BLANKS):
            thoughts += [*self._blanks, kept]
            self._blanks = []
        if found >= 0:
            self._step, self._blanks = self._gap_after, []
            return text[found + len(end) :]
        if len(kept) < len(told):
            self._blanks.append(told[len(kept) :])
        return ""

    def _gap_after(self, text: str, thoughts: list[str], words: list[str]) -> str:
        rest = text.lstrip(BLANKS)
        if rest:
            self._step = self._speak
        return rest

    def _speak(self, text: str, thoughts: list[str], words: list[str]) -> str:
        words.append(text)
        return ""


def allow_thoughts(grammar: str, name: str, open: bool, tokenizer: Tokenizer) -> str:
    """A grammar for the words of an answer, made one for the whole answer: any thoughts may come first.

    open: as for `Splitter`.  llguidance's JSON text in and out.
    """
    format = FORMATS[name]
    start, end = (grammars.special(tag, tokenizer) for tag in (format.start, format.end))
    lines = ["GAP: /[ \\n]{1,3}/"]
    if end.startswith("<["):
        lines += ["THOUGHTS: /(?s:.+)/", f"closing: THOUGHTS? {end}"]
    else:
        lines += [f"closing[lazy]: /(?s:.*)/ {end}"]
    lines += [f"start: {'' if open else f'({start} closing GAP? | ) '}{'closing GAP? ' if open else ''}@answer"]
    return grammars.lark("\n".join(lines), answer=grammar)
