"""InternLM2 and 2.5: Llama under other names, with q, k and v in one matrix ordered by kv head."""

from jaxserve.models.config import common
from jaxserve.models.table import Row

LAYER = "model.layers.{}."


def config(hf):
    """InternLM2ForCausalLM's config.json."""
    bias = bool(hf.get("bias", False))
    return common("internlm", hf, qkv_bias=bias, o_bias=bias)


def weights(cfg):
    """InternLM2's names; w1 is the gate, w3 up, w2 down."""
    width, ffn, vocab, q = cfg.width, cfg.ffn, cfg.vocab, cfg.heads * cfg.head_dim
    fused = q + 2 * cfg.kv_heads * cfg.head_dim
    qkv, o = (LAYER + "attention.wqkv",), (LAYER + "attention.wo",)
    gate_up = (LAYER + "feed_forward.w1", LAYER + "feed_forward.w3")
    down = (LAYER + "feed_forward.w2",)
    rows = (
        Row(("model.tok_embeddings",), "embed", ((vocab, width),), ("tp", None)),
        Row((LAYER + "attention_norm",), "layers.{}.norm1", ((width,),), (None,)),
        Row(qkv, "layers.{}.mixer.qkv", ((fused, width),), (None, "tp", None, None), "wqkv", cfg.qkv_bias),
        Row(o, "layers.{}.mixer.o", ((width, q),), ("tp", None), "linear", cfg.o_bias),
        Row((LAYER + "ffn_norm",), "layers.{}.norm2", ((width,),), (None,)),
        Row(gate_up, "layers.{}.ffn.gate_up", ((ffn, width),) * 2, (None, None, "tp"), "gate_up"),
        Row(down, "layers.{}.ffn.down", ((width, ffn),), ("tp", None), "linear"),
        Row(("model.norm",), "norm", ((width,),), (None,)),
    )
    head = Row(("output",), "head", ((vocab, width),), (None, "tp"), "linear")
    return rows if cfg.tied else (*rows, head)
