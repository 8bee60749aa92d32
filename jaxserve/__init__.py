"""jaxserve serves language models with JAX.  The public names; each is imported when it is first used."""

from importlib import import_module

from jaxserve._version import __version__
from jaxserve.pipeline import pipeline  # at once: imported later, the module of that name would take its place

_HOMES = {
    "Pipeline": "jaxserve.pipeline",
    "Session": "jaxserve.pipeline",
    "Response": "jaxserve.reply",
    "EngineConfig": "jaxserve.config",
    "TurbomindEngineConfig": "jaxserve.config",
    "PytorchEngineConfig": "jaxserve.config",
    "GenerationConfig": "jaxserve.config",
    "ChatTemplateConfig": "jaxserve.config",
    "Tokenizer": "jaxserve.text.tokenizer",
}
__all__ = ["__version__", "pipeline", *_HOMES]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__():
    return sorted(__all__)
