"""Which module knows an architecture; the modules are imported only when a checkpoint asks for them."""

from importlib import import_module

FAMILIES = {  # architectures[0] of config.json -> module in this folder
    "InternLM2ForCausalLM": "internlm",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen_moe",
}


def family(name):
    """The module of a family, by the name that ModelConfig.family carries ("llama", "qwen", ...)."""
    assert name in FAMILIES.values(), name
    return import_module(f"jaxserve.models.{name}")
