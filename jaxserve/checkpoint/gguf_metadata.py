"""What a GGUF file's metadata says, in Hugging Face's words: config.json, generation_config.json, the tokenizer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.gguf_header import Head

ARCHITECTURES = {  # general.architecture -> (architectures[0], model_type)
    "llama": ("LlamaForCausalLM", "llama"),
    "internlm2": ("InternLM2ForCausalLM", "internlm2"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>")  # end a reply even where the metadata names only another eos
ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")  # byte-level ones that llama.cpp gives a bos
CONTROL = 3  # token type


class _Metadata:
    """Typed look-ups; CheckpointError names the key."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def get(self, key: str, kind: type, default=None):
        """A value of the given type, or `default`; a float may be written as an int."""
        value = self.values.get(self.prefix + key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.path}: metadata {self.prefix}{key} is {str(value)[:80]!r}, not one {kind.__name__}"
            )
        return value

    def need(self, key: str, kind: type = int):
        """A positive number that must be there."""
        value = self.get(key, kind)
        if value is None or not 0 < value < math.inf:
            found = "missing" if value is None else f"{value}"
            raise CheckpointError(f"{self.path}: metadata {self.prefix}{key} is {found}; a positive number is needed")
        return value


def model_config(path: Path, head: Head, floats: Callable) -> dict:
    """A config.json.  `floats(stored)` reads a vector of the file."""
    name = head.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: general.architecture is {name!r}; jaxserve reads {', '.join(ARCHITECTURES)}")
    architecture, model_type = ARCHITECTURES[name]
    metadata = _Metadata(path, head.metadata, f"{name}.")
    width, heads = metadata.need("embedding_length"), metadata.need("attention.head_count")
    head_dim = metadata.get("attention.key_length", int) or width // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(key, int, head_dim) != head_dim:
            raise CheckpointError(
                f"{path}: {name}.{key} is {metadata.get(key, int)} where heads are {head_dim} wide; "
                "only heads of one width, rotated whole, are supported"
            )
    if "token_embd.weight" not in head.tensors:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": width,
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", int) or heads,
        "head_dim": head_dim,
        "vocab_size": head.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": metadata.need("attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.get("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "torch_dtype": _compute_dtype(head),
    }
    biased = "blk.0.attn_output.bias" in head.tensors
    config["bias" if name == "internlm2" else "attention_bias"] = biased
    if "blk.0.ffn_down.bias" in head.tensors:
        config["mlp_bias"] = True
    if window := metadata.get("attention.sliding_window", int):
        config |= {"sliding_window": window}
        if name == "llama":
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        else:
            config["use_sliding_window"] = False  # llama.cpp has none for the Qwens
    config |= _experts(metadata, name)
    if scaling := _rope_scaling(path, head, metadata, config, floats):
        config["rope_scaling"] = scaling
    return config | _special_ids(path, head.metadata)


def _compute_dtype(head: Head) -> str:
    """The dtype to compute in: the file's own where it has one; quantized models were made from bfloat16."""
    kinds = {stored.kind.name for stored in head.tensors.values()}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _experts(metadata: _Metadata, name: str) -> dict:
    count = metadata.get("expert_count", int, 0)
    if name == "qwen3moe":
        return {
            "num_experts": metadata.need("expert_count"),
            "num_experts_per_tok": metadata.need("expert_used_count"),
            "moe_intermediate_size": metadata.need("expert_feed_forward_length"),
            "intermediate_size": metadata.get("feed_forward_length", int)
            or metadata.need("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    config = {"intermediate_size": metadata.need("feed_forward_length")}
    if count and name == "llama":
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": count}
        config |= {"num_experts_per_tok": metadata.need("expert_used_count")}
    elif count:
        raise CheckpointError(f"{metadata.path}: {name} with {count} experts is not supported")
    return config


def _rope_scaling(path: Path, head: Head, metadata: _Metadata, config: dict, floats: Callable) -> dict | None:
    """config.json's rope_scaling, from the metadata or from the table of factors that llama 3.1 files carry."""
    if freqs := head.tensors.get("rope_freqs.weight"):
        return _llama3(path, floats(freqs), config)
    kind = metadata.get("rope.scaling.type", str, "none")
    factor = metadata.get("rope.scaling.factor", float) or metadata.get("rope.scale_linear", float) or 1.0
    if kind == "none" and "rope.scale_linear" in str(sorted(metadata.values)):
        kind = "linear"  # files from before scaling types
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(f"{path}: {metadata.prefix}rope.scaling.type is {kind!r}; linear and yarn are supported")
    scaling = {"rope_type": "yarn", "factor": factor}
    scaling["original_max_position_embeddings"] = metadata.need("rope.scaling.original_context_length")
    for key in ("beta_fast", "beta_slow"):
        if value := metadata.get(f"rope.scaling.yarn_{key}", float):
            scaling[key] = value
    if (attention := metadata.get("rope.scaling.attn_factor", float, 1.0)) != 1.0:
        scaling["attention_factor"] = attention * (1 + 0.1 * math.log(factor))  # theirs is on top of yarn's own
    return scaling


def _llama3(path: Path, factors: np.ndarray, config: dict) -> dict | None:
    """rope_scaling of llama 3.1 from the factors by which each frequency is divided.

    Between two limits 1/factor is linear in the frequency f: (1-s)/F + s with s = (original*f/2pi - low)/(high - low).
    Only ratios of original, low and high show, so low is taken as 1, as all published models have it.
    """
    half = config["head_dim"] // 2
    if factors.shape != (half,) or not (np.isfinite(factors).all() and (factors >= 1).all()):
        raise CheckpointError(f"{path}: tensor rope_freqs.weight is not {half} factors of 1 or more")
    factor = float(factors.max())
    if factor == 1:
        return None
    waves = config["rope_theta"] ** (-np.arange(half) / half) / (2 * math.pi)  # turns a token
    smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    low, high, original = 1.0, 4.0, 8192.0  # llama 3.1's own, for a table with too little in between to tell
    if between.sum() >= 2:
        slope, offset = np.polyfit(waves[between], smooth[between], 1)
        if slope > 0 > offset:
            high = round(1 - 1 / offset, 3)
            original = round(slope * (high - low))
    again = np.clip((original * waves - low) / (high - low), 0, 1)
    again = 1 / ((1 - again) / factor + again)
    if not np.allclose(again, factors, rtol=1e-3):
        raise CheckpointError(f"{path}: tensor rope_freqs.weight is no llama3 rope scaling, and no other is known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(original),
    }


def _special_ids(path: Path, values: dict) -> dict:
    metadata = _Metadata(path, values, "tokenizer.ggml.")
    stops = _stop_ids(metadata)
    found = {
        "bos_token_id": metadata.get("bos_token_id", int),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": metadata.get("padding_token_id", int),
    }
    return {key: value for key, value in found.items() if value is not None}


def _stop_ids(metadata: _Metadata) -> list[int]:
    """eos, eot and eom, then control tokens that are named like an end of turn."""
    ids = [metadata.get(f"{key}_token_id", int) for key in ("eos", "eot", "eom")]
    tokens, types = metadata.get("tokens", list, []), metadata.get("token_type", list, [])
    named = enumerate(zip(tokens, types, strict=False))
    ids += [i for i, (token, kind) in named if kind == CONTROL and token in END_OF_TURN]
    return list(dict.fromkeys(i for i in ids if i is not None))


def sampling_config(path: Path, values: dict) -> dict:
    """A generation_config.json, where the file says how to sample; else {}."""
    metadata = _Metadata(path, values, "general.sampling.")
    keys = {"temp": "temperature", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
    found = {name: metadata.get(key, float) for key, name in keys.items()} | {"top_k": metadata.get("top_k", int)}
    found = {name: value for name, value in found.items() if value is not None}
    return found | {"do_sample": found.get("temperature", 1.0) > 0} if found else {}


def tokenizer_dict(path: Path, values: dict) -> dict | None:
    """The dict that `gguf.tokenizer_data` describes; None where the file holds no tokenizer."""
    metadata = _Metadata(path, values, "tokenizer.ggml.")
    kind = metadata.get("model", str, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(f"{path}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are supported")
    tokens = metadata.get("tokens", list, [])
    types = metadata.get("token_type", list) or [1] * len(tokens)
    scores = metadata.get("scores", list, []) if kind == "llama" else []
    merges = metadata.get("merges", list, []) if kind == "gpt2" else []
    if not all(isinstance(text, str) for text in (*tokens, *merges)) or not tokens:
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens or merges is not a list of texts")
    if len(types) != len(tokens) or (kind == "llama" and len(scores) != len(tokens)):
        raise CheckpointError(
            f"{path}: tokenizer.ggml has {len(tokens)} tokens, {len(types)} types and {len(scores)} scores"
        )
    pre = metadata.get("pre", str, "default")
    bos, eos, unk, pad = (metadata.get(f"{key}_token_id", int) for key in ("bos", "eos", "unknown", "padding"))
    stops = _stop_ids(metadata)
    for i in (bos, eos, unk, pad, *stops):
        if i is not None and not 0 <= i < len(tokens):
            raise CheckpointError(f"{path}: a special token of tokenizer.ggml has id {i} of {len(tokens)}")
    return {
        "model": kind,
        "pre": pre,
        "tokens": tokens,
        "scores": scores,
        "token_types": types,
        "merges": merges,
        "bos_id": bos,
        "eos_id": eos,
        "unk_id": unk,
        "pad_id": pad,
        "stop_ids": stops,
        "add_bos": metadata.get("add_bos_token", bool, kind == "llama" or pre in ADDS_BOS),
        "add_eos": metadata.get("add_eos_token", bool, False),
        "add_space_prefix": metadata.get("add_space_prefix", bool, kind == "llama"),
        "chat_template": _Metadata(path, values).get("tokenizer.chat_template", str),
    }
