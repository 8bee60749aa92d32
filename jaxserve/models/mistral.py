"""Mistral: Llama's tensors with a sliding window."""

from jaxserve.models import llama
from jaxserve.models.config import common

weights = llama.weights


def config(hf):
    """MistralForCausalLM's config.json; one that does not mention the window has the first model's 4096."""
    return common("mistral", hf, window=hf.get("sliding_window", 4096))
