"""Qwen2, Qwen2.5 (biased q, k, v) and Qwen3 (normed q and k)."""

from jaxserve.models import llama
from jaxserve.models.config import common, need

weights = llama.weights


def config(hf):
    """Qwen2ForCausalLM's and Qwen3ForCausalLM's config.json."""
    if hf["architectures"][0] == "Qwen2ForCausalLM":
        return common("qwen", hf, qkv_bias=True, **window(hf))
    bias = bool(hf.get("attention_bias", False))
    head_dim = hf.get("head_dim") or 128  # Qwen3's default, whatever the width
    return common("qwen", hf | {"head_dim": head_dim}, qk_norm=True, qkv_bias=bias, o_bias=bias, **window(hf))


def window(hf):
    """The window and the layers it covers: those that layer_types names, else all from max_window_layers on."""
    if not hf.get("use_sliding_window"):
        return {}
    layers, first = need(hf, "num_hidden_layers"), hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    covered = tuple(index for index, kind in enumerate(kinds[:layers]) if kind == "sliding_attention")
    return {"window": need(hf, "sliding_window"), "window_layers": covered} if covered else {}
