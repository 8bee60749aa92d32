"""How models write tool calls, one module a format: `Parser`, `grammar` and whether markers are special tokens.

A format is found from the model (`detect`), or given by a name that LMDeploy or vLLM has for it (`named`).
"""

from types import ModuleType

from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import hermes, internlm2, llama3, mistral
from jaxserve.text.tools.pieces import Arguments, Call, Piece, Text

__all__ = ["FORMATS", "NAMES", "Arguments", "Call", "Piece", "Text", "detect", "named"]

FORMATS: dict[str, ModuleType] = {"internlm2": internlm2, "hermes": hermes, "llama3": llama3, "mistral": mistral}
NAMES = {
    **{name: name for name in FORMATS},
    **dict.fromkeys(("internlm", "internlm2_5", "intern-s1"), "internlm2"),
    **dict.fromkeys(("qwen", "qwen2", "qwen2d5", "qwen2.5", "qwen25", "qwen3"), "hermes"),
    **dict.fromkeys(("llama", "llama3.1", "llama3_json", "llama4_json"), "llama3"),
}


def named(name: str) -> str:
    """The format's own name for one that LMDeploy or vLLM has; ValueError if it is not there."""
    found = NAMES.get(name.lower())
    if found is None:
        raise ValueError(f"there is no tool call format {name!r:.80}; there are {', '.join(NAMES)}")
    return found


def detect(config: dict, template: str | None, tokenizer: Tokenizer) -> str | None:
    """The format of a model's tool calls; None if it has one that is not there.

    config: its config.json.  template: its chat template's source.  A model whose template knows no tools is told of
    them in Hermes' way (`ChatTemplate`).
    """
    template = template or ""
    if config.get("model_type") == "internlm2" or _has(tokenizer, internlm2.START, internlm2.PLUGIN):
        return "internlm2"
    if "tools" not in template:
        return "hermes"
    if hermes.START in template:
        return None if "<parameter=" in template else "hermes"  # Qwen3-Coder's are no JSON
    if mistral.START in template or _has(tokenizer, mistral.START):
        return "mistral"
    if llama3.TAG in template or llama3.FUNCTION in template or ("ipython" in template and '"parameters"' in template):
        return "llama3"
    return None


def _has(tokenizer: Tokenizer, *tokens: str) -> bool:
    return all(tokenizer.id_of(token) is not None for token in tokens)
