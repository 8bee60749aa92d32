"""Writes a random checkpoint of any family: config.json and model.safetensors as on the Hugging Face hub.

The same seed gives the same tensors everywhere (numpy's frozen RandomState, one stream a tensor), which is how golden
outputs can be kept without the weights that made them.  Names and shapes come from the family's weight table.

    python scripts/tiny_checkpoint.py Qwen3ForCausalLM /tmp/tiny --set vocab_size=1000 --set 'dtype="bfloat16"'
"""

import argparse
import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve.models import family
from jaxserve.models.config import from_hf

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,  # odd: no number of devices divides it
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}
OWN = {
    "InternLM2ForCausalLM": {"model_type": "internlm2"},
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": None},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": {"model_type": "qwen2"},
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
    },
}


def config(architecture, **changes):
    """A tiny config.json of an architecture, as a dict; `changes` are keys of config.json."""
    return {"architectures": [architecture]} | TINY | OWN[architecture] | changes


def tensors(hf, seed=0):
    """{name: float32 array} of every tensor that the checkpoint of config `hf` holds."""
    cfg = from_hf(hf)
    out = {}
    for row in family(cfg.family).weights(cfg):
        layers = range(cfg.layers) if row.layers is None else row.layers
        for source, shape in zip(row.sources, row.shapes, strict=True):
            per_layer, per_expert = source.count("{}") > 0, source.count("{}") > 1
            for layer in layers if per_layer else (0,):
                for expert in range(cfg.experts) if per_expert else (0,):
                    name = source.format(layer, expert)
                    out[name + ".weight"] = _random(seed, name + ".weight", shape)
                    if row.bias:
                        out[name + ".bias"] = _random(seed, name + ".bias", shape[:1])
    return out


def _random(seed, name, shape):
    """Matrices keep the size of what they multiply, norms are near 1, biases near 0."""
    draw = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).standard_normal(shape)
    if len(shape) == 2:
        return (draw * (1.0 if "embed" in name else 1.5 * shape[1] ** -0.5)).astype(np.float32)
    return (0.2 * draw + (0.0 if name.endswith(".bias") else 1.0)).astype(np.float32)


def write(folder, hf, seed=0):
    """Writes the checkpoint into `folder`, in the dtype that `hf` names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(from_hf(hf).dtype, from_hf(hf).dtype))
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    arrays = {name: array.astype(dtype) for name, array in tensors(hf, seed).items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description="Writes a random checkpoint of any family.")
    parser.add_argument("architecture", choices=OWN)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of config.json")
    args = parser.parse_args()
    changes = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    hf = config(args.architecture, **changes)
    write(args.folder, hf, args.seed)
    print(json.dumps({"folder": str(args.folder), "parameters": sum(t.size for t in tensors(hf, args.seed).values())}))


if __name__ == "__main__":
    main()
