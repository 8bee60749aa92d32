"""Llama 1 to 3.x, and the tables that most families share."""

from jaxserve.models.config import common
from jaxserve.models.table import Row

LAYER = "model.layers.{}."


def config(hf):
    """LlamaForCausalLM's config.json."""
    bias = bool(hf.get("attention_bias", False))
    return common("llama", hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def weights(cfg):
    """Embedding, attention, gated MLP, norms, head."""
    return (*ends(cfg), *attention(cfg), *mlp(cfg))


def ends(cfg):
    """What stands before and after the layers, and the layers' norms."""
    width, vocab = cfg.width, cfg.vocab
    rows = (
        Row(("model.embed_tokens",), "embed", ((vocab, width),), ("tp", None)),
        Row((LAYER + "input_layernorm",), "layers.{}.norm1", ((width,),), (None,)),
        Row((LAYER + "post_attention_layernorm",), "layers.{}.norm2", ((width,),), (None,)),
        Row(("model.norm",), "norm", ((width,),), (None,)),
    )
    head = Row(("lm_head",), "head", ((vocab, width),), (None, "tp"), "linear")
    return rows if cfg.tied else (*rows, head)


def attention(cfg):
    """Projections of the mixer, and its q and k norms."""
    width, q, kv = cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    sources = tuple(LAYER + f"self_attn.{name}_proj" for name in "qkv")
    shapes, o = ((q, width), (kv, width), (kv, width)), LAYER + "self_attn.o_proj"
    rows = (
        Row(sources, "layers.{}.mixer.qkv", shapes, (None, "tp", None, None), "qkv", cfg.qkv_bias),
        Row((o,), "layers.{}.mixer.o", ((width, q),), ("tp", None), "linear", cfg.o_bias),
    )
    norms = tuple(
        Row((LAYER + f"self_attn.{name}",), f"layers.{{}}.mixer.{name}", ((cfg.head_dim,),), (None,))
        for name in ("q_norm", "k_norm")
    )
    return (*rows, *norms) if cfg.qk_norm else rows


def mlp(cfg, layers=None):
    """The gated MLP, of all layers or of those named."""
    width, ffn, mlp = cfg.width, cfg.ffn, LAYER + "mlp."
    gate_up, both = (mlp + "gate_proj", mlp + "up_proj"), ((ffn, width),) * 2
    down = (mlp + "down_proj",)
    return (
        Row(gate_up, "layers.{}.ffn.gate_up", both, (None, None, "tp"), "gate_up", cfg.mlp_bias, layers),
        Row(down, "layers.{}.ffn.down", ((width, ffn),), ("tp", None), "linear", cfg.mlp_bias, layers),
    )


def experts(cfg, ffn, gate, up, down, layers=None):
    """Router `ffn`.gate and experts `ffn`.experts.{}, whose three matrices the families name differently."""
    width, inner, base = cfg.width, cfg.expert_ffn, ffn + "experts.{}."
    gate_up, both = (base + gate, base + up), ((inner, width),) * 2
    spec = (None, None, None, "tp")
    return (
        Row((ffn + "gate",), "layers.{}.ffn.router", ((cfg.experts, width),), (None, None), "linear", layers=layers),
        Row(gate_up, "layers.{}.ffn.gate_up", both, spec, "experts_gate_up", layers=layers),
        Row((base + down,), "layers.{}.ffn.down", ((width, inner),), (None, "tp", None), "experts", layers=layers),
    )
