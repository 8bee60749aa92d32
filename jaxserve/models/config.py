"""The numbers that describe a decoder, and what every family reads from config.json.

Knows the spellings of Hugging Face's config.json; what differs between families (windows, biases, experts) is in the
family's own file, which calls `common` and replaces what it knows better.
"""

import math
from dataclasses import dataclass

from jaxserve.models import FAMILIES, family

MOST_LAYERS = 4096  # each is looked for in the checkpoint


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: frequencies theta^(-2i/H), changed as `kind` says (rope.py has the formulas)."""

    theta: float = 10000.0
    kind: str = "default"  # "default", "linear", "dynamic", "llama3" or "yarn"
    factor: float = 1.0
    original: int = 0  # positions the model was trained for, before scaling
    low_factor: float = 1.0  # llama3
    high_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: computed from factor and the two mscales
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: whole dimensions as the limits of its ramp


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's numbers.  Hashable: it is jit's static argument."""

    family: str  # module in jaxserve/models
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    eps: float
    rope: Rope
    tied: bool  # the head is the embedding
    dtype: str  # of the checkpoint: "bfloat16", "float16" or "float32"
    max_position: int  # tokens
    window: int | None = None  # tokens a query sees, itself included (key > query - window); None: all before it
    window_layers: tuple[int, ...] | None = None  # layers that the window covers; None: all
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk: bool = True  # the chosen experts' probabilities are made to sum to 1
    sparse_layers: tuple[int, ...] | None = None  # layers with experts; None: all, where experts > 0

    def window_at(self, layer):
        """The sliding window of one layer, or None."""
        return self.window if self.window_layers is None or layer in self.window_layers else None

    def sparse_at(self, layer):
        """Whether one layer's ffn is a mixture of experts."""
        return self.experts > 0 and (self.sparse_layers is None or layer in self.sparse_layers)


def from_hf(hf):
    """A ModelConfig from the dict of a config.json; ValueError where it describes what jaxserve does not compute."""
    names = hf.get("architectures") or ["nothing"]
    if not isinstance(names, list) or str(names[0]) not in FAMILIES:
        name = names[0] if isinstance(names, list) else names
        raise ValueError(f"architectures names {str(name)[:60]}; jaxserve knows {', '.join(FAMILIES)}")
    try:
        return family(FAMILIES[str(names[0])]).config(hf)
    except (TypeError, AttributeError, KeyError, OverflowError) as error:  # a stranger wrote it
        raise ValueError(f"config.json holds a value of the wrong kind: {error}") from error


def common(name, hf, **own):
    """What all families read the same way; `own` are the fields that family `name` knows better."""
    if (act := hf.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {act}; only silu is supported")
    width, heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if not (head_dim := hf.get("head_dim")):
        if width % heads:
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}, and no head_dim")
        head_dim = width // heads
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even one")
    if (layers := need(hf, "num_hidden_layers")) > MOST_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers is {layers}; {MOST_LAYERS} is the most")
    fields = {
        "family": name,
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": need(hf, "intermediate_size"),
        "vocab": need(hf, "vocab_size"),
        "eps": float(need(hf, "rms_norm_eps", float)),
        "rope": read_rope(hf),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "dtype": read_dtype(hf),
        "max_position": read_max_position(hf),
    }
    return ModelConfig(**fields | own)


def need(hf, key, kind=int):
    """A positive number that config.json must have."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} must be a positive number, found {value!r}")
    return value


def read_dtype(hf):
    """The dtype of the weights; bfloat16 where config.json names none."""
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"config.json: dtype is {name}; bfloat16, float16 and float32 are supported")
    return name


def rope_dict(hf):
    """The rope settings as one dict: rope_parameters (transformers 5), or rope_scaling beside rope_theta."""
    found = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError("config.json: a different rope for each kind of layer is not supported")
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found["rope_theta"] = found.get("rope_theta") or hf.get("rope_theta") or 10000.0
    return found


def read_rope(hf):
    """The Rope of a config.json, from either of its spellings."""
    found = rope_dict(hf)
    kind = found["rope_type"]
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise ValueError(f"rope_type is {kind}; default, linear, dynamic, llama3 and yarn are supported")
    partial = found.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial}; only whole heads are rotated")
    theta = float(need(found, "rope_theta", float))
    if kind == "default":
        return Rope(theta)
    original = need(hf, "max_position_embeddings")
    if kind in ("llama3", "yarn"):  # the others count from the length that the config declares, as transformers does
        original = hf.get("original_max_position_embeddings") or found.get("original_max_position_embeddings", original)
    factor = found.get("factor")
    if factor is None and kind == "yarn":
        factor = hf["max_position_embeddings"] / original
    if factor is None or factor < 1:
        raise ValueError(f"rope_type {kind} needs a factor of 1 or more, found {factor!r}")
    rope = {"theta": theta, "kind": kind, "factor": float(factor), "original": int(original)}
    if kind == "llama3":
        rope |= {"low_factor": float(need(found, "low_freq_factor", float))}
        rope |= {"high_factor": float(need(found, "high_freq_factor", float))}
    if kind == "yarn":
        attention = found.get("attention_factor")
        rope |= {
            "beta_fast": float(found.get("beta_fast") or 32),
            "beta_slow": float(found.get("beta_slow") or 1),
            "attention_factor": None if attention is None else float(attention),
            "mscale": float(found.get("mscale") or 0),
            "mscale_all_dim": float(found.get("mscale_all_dim") or 0),
            "truncate": bool(found.get("truncate", True)),
        }
    return Rope(**rope)


def read_max_position(hf):
    """Tokens the model can attend over.  A yarn block stretches a config that still declares the original length."""
    declared, found = need(hf, "max_position_embeddings"), rope_dict(hf)
    if found["rope_type"] == "yarn" and found.get("factor") and found.get("original_max_position_embeddings"):
        return max(declared, int(found["factor"] * found["original_max_position_embeddings"]))
    return declared
