"""Mixtral: Mistral with a mixture of experts in every layer."""

from jaxserve.models import llama
from jaxserve.models.config import common, need


def config(hf):
    """MixtralForCausalLM's config.json.  The chosen experts' weights always sum to 1."""
    return common(
        "mixtral",
        hf,
        window=hf.get("sliding_window"),
        experts=need(hf, "num_local_experts"),
        experts_per_token=need(hf, "num_experts_per_tok"),
        expert_ffn=need(hf, "intermediate_size"),
    )


def weights(cfg):
    """Llama's, with w1 (gate), w3 (up) and w2 (down) of every expert."""
    moe = llama.experts(cfg, llama.LAYER + "block_sparse_moe.", "w1", "w3", "w2")
    return (*llama.ends(cfg), *llama.attention(cfg), *moe)
