"""A decoder with no cache, no pages, no batch: what every fast path must equal.

numpy in float64, straight from the tensor names and the config.json of a Hugging Face checkpoint.  It shares no code
with jaxserve, so that a mistake there is not repeated here.
T tokens, N query heads, K kv heads, H head dim, D width.
"""

import json
import math
from pathlib import Path

import numpy as np


def logits(checkpoint, config, tokens, rope_len=None, cached=None):
    """Logits float64[T, V] of a token sequence.

    `checkpoint` is {name: array} or a folder with safetensors files; `config` the config.json as a dict, or None for
    the folder's.  `rope_len` is the length that fixes the base of dynamic NTK (a request's prompt); None: that of
    `tokens`.  `cached(keys, values)`, [T, K, H], is what a cache would give back of them.
    """
    weights, config = load(checkpoint, config)
    x = weights["model.embed_tokens.weight"][np.asarray(tokens)]
    turns = angles(config, np.arange(len(tokens)), rope_len or len(tokens))
    for layer in range(config["num_hidden_layers"]):
        part = Part(weights, f"model.layers.{layer}.")
        x = x + attention(part, config, layer, part.norm("input_layernorm", x, config), turns, cached)
        x = x + feed_forward(part, config, layer, part.norm("post_attention_layernorm", x, config))
    x = Part(weights, "model.").norm("norm", x, config)
    return x @ weights["model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"].T


def greedy(checkpoint, config, prompt, n, cached=None):
    """The n tokens that follow `prompt`, each the most likely one."""
    weights, config = load(checkpoint, config)
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(logits(weights, config, tokens, len(prompt), cached)[-1].argmax()))
    return tokens[len(prompt) :]


def load(checkpoint, config=None):
    """All tensors in float64 under Llama's names, and the config."""
    if isinstance(checkpoint, dict):
        weights = checkpoint
    else:
        import ml_dtypes  # noqa: F401  tells numpy about bfloat16
        from safetensors import safe_open

        weights, folder = {}, Path(checkpoint)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "numpy") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = config or json.loads((folder / "config.json").read_text())
    if config["architectures"][0] == "InternLM2ForCausalLM" and "output.weight" in weights:
        weights = from_internlm2(weights, config)
    return {name: array.astype(np.float64, copy=False) for name, array in weights.items()}, config


def from_internlm2(weights, config):
    """The tensors of an InternLM2 checkpoint as Llama has them: q, k and v apart, Llama's names."""
    kv_heads, heads = config["num_key_value_heads"], config["num_attention_heads"]
    names = {
        "model.tok_embeddings": "model.embed_tokens",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {}
    for name, array in weights.items():
        if "wqkv" in name:
            groups = array.reshape(kv_heads, heads // kv_heads + 2, -1, *array.shape[1:])
            for letter, rows in (("q", groups[:, :-2]), ("k", groups[:, -2]), ("v", groups[:, -1])):
                renamed = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                out[renamed] = rows.reshape(-1, *array.shape[1:])
            continue
        if name.startswith("output."):
            name = "lm_head." + name.removeprefix("output.")
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = array
    return out


class Part:
    """The tensors below one name."""

    def __init__(self, weights, prefix):
        self.weights, self.prefix = weights, prefix

    def linear(self, name, x):
        out = x @ self.weights[f"{self.prefix}{name}.weight"].T
        bias = self.weights.get(f"{self.prefix}{name}.bias")
        return out if bias is None else out + bias

    def norm(self, name, x, config):
        weight = self.weights[f"{self.prefix}{name}.weight"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def has(self, name):
        return f"{self.prefix}{name}.weight" in self.weights

    def below(self, name):
        return Part(self.weights, self.prefix + name)


def attention(part, config, layer, x, turns, cached=None):
    count, heads = len(x), config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    part = part.below("self_attn.")
    q = part.linear("q_proj", x).reshape(count, heads, -1)
    k = part.linear("k_proj", x).reshape(count, kv_heads, -1)
    v = part.linear("v_proj", x).reshape(count, kv_heads, -1)
    if part.has("q_norm"):
        q, k = part.norm("q_norm", q, config), part.norm("k_norm", k, config)
    q, k = rotate(q, *turns), rotate(k, *turns)
    if cached:
        k, v = cached(k, v)
    k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))
    scores = np.einsum("qnh,knh->nqk", q, k) / math.sqrt(q.shape[-1])
    back = np.arange(count)[:, None] - np.arange(count)[None]  # how far before the query a key is
    seen = (back >= 0) & (back < window(config, layer, count))
    probabilities = softmax(np.where(seen, scores, -np.inf))
    return part.linear("o_proj", np.einsum("nqk,knh->qnh", probabilities, v).reshape(count, -1))


def window(config, layer, count):
    """Tokens that a query sees, itself included."""
    family, size = config["architectures"][0], config.get("sliding_window")
    if family.startswith("Qwen"):
        dense_first = family != "Qwen3MoeForCausalLM" and layer < config.get("max_window_layers", 28)
        size = size if config.get("use_sliding_window") and not dense_first else None
    elif family not in ("MistralForCausalLM", "MixtralForCausalLM"):
        size = None
    return size or count


def feed_forward(part, config, layer, x):
    for name, w1, w3, w2 in (("block_sparse_moe.", "w1", "w3", "w2"), ("mlp.", "gate_proj", "up_proj", "down_proj")):
        moe = part.below(name)
        if not moe.has("gate"):
            continue
        scores, out = softmax(moe.linear("gate", x)), np.zeros_like(x)
        for t, row in enumerate(scores):
            chosen = np.argsort(-row, kind="stable")[: config["num_experts_per_tok"]]
            normed = config.get("norm_topk_prob", "Mixtral" in config["architectures"][0])
            share = row[chosen] / (row[chosen].sum() if normed else 1)
            for expert, weight in zip(chosen, share, strict=True):
                out[t] += weight * gated(moe.below(f"experts.{expert}."), x[t], w1, w3, w2)
        return out
    return gated(part.below("mlp."), x, "gate_proj", "up_proj", "down_proj")


def gated(part, x, gate, up, down):
    a = part.linear(gate, x)
    return part.linear(down, a / (1 + np.exp(-a)) * part.linear(up, x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, cos, sin):
    """x [T, N, H]; plane i is made of coordinates i and i + H/2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1)


def angles(config, position, rope_len):
    """cos and sin [T, H/2] for any rope that the tested families have."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type") or rope.get("type") or "default", rope.get("factor")
    theta, limit = rope.get("rope_theta") or config.get("rope_theta", 10000.0), config["max_position_embeddings"]
    dim, scale = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"], 1.0
    if kind == "dynamic" and rope_len > limit:
        theta *= (factor * rope_len / limit - (factor - 1)) ** (dim / (dim - 2))
    frequency = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    original = rope.get("original_max_position_embeddings", limit)
    if kind == "linear":
        frequency /= factor
    elif kind == "llama3":
        low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
        for i, wavelength in enumerate(2 * math.pi / frequency):
            if wavelength > low:
                frequency[i] /= factor
            elif wavelength >= high:
                mix = original / wavelength - rope["low_freq_factor"]
                mix /= rope["high_freq_factor"] - rope["low_freq_factor"]
                frequency[i] *= (1 - mix) / factor + mix
    elif kind == "yarn":
        frequency, scale = yarn(rope, theta, dim, original, frequency)
    angle = np.outer(position, frequency)
    return scale * np.cos(angle), scale * np.sin(angle)


def yarn(rope, theta, dim, original, frequency):
    factor = rope["factor"]

    def dimension(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - first) / (last - first), 0, 1)
    scale = 0.1 * math.log(factor) + 1
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = (0.1 * rope["mscale"] * math.log(factor) + 1) / (0.1 * rope["mscale_all_dim"] * math.log(factor) + 1)
    return frequency / factor * ramp + frequency * (1 - ramp), rope.get("attention_factor") or scale
