"""Qwen3-MoE: Qwen3's attention, a mixture of experts in most layers."""

from jaxserve.models import llama
from jaxserve.models.config import common, need


def config(hf):
    """Qwen3MoeForCausalLM's config.json."""
    layers, every = need(hf, "num_hidden_layers"), hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or ()
    bias = bool(hf.get("attention_bias", False))
    return common(
        "qwen_moe",
        hf,
        window=need(hf, "sliding_window") if hf.get("use_sliding_window") else None,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        experts=need(hf, "num_experts" if "num_experts" in hf else "num_local_experts"),
        experts_per_token=need(hf, "num_experts_per_tok"),
        expert_ffn=need(hf, "moe_intermediate_size"),
        norm_topk=bool(hf.get("norm_topk_prob", False)),
        sparse_layers=tuple(i for i in range(layers) if i not in dense and (i + 1) % every == 0),
    )


def weights(cfg):
    """Qwen3's, with experts in the sparse layers."""
    dense = tuple(i for i in range(cfg.layers) if i not in cfg.sparse_layers)
    moe = llama.experts(cfg, llama.LAYER + "mlp.", "gate_proj", "up_proj", "down_proj", cfg.sparse_layers)
    return (*llama.ends(cfg), *llama.attention(cfg), *llama.mlp(cfg, dense), *moe)
