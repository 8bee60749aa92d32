"""Makes the golden logits in this folder with transformers and PyTorch.

Run by hand, once, in an environment of its own (torch, transformers, safetensors, ml_dtypes), from the root:

    PYTHONPATH=. python tests/data/families/make.py [CASE ...]

Neither jaxserve nor a test imports it.  An .npz file holds the config.json and the seed of a tiny checkpoint, token
sequences, and their logits in float32; the weights are made again from the seed by scripts/tiny_checkpoint.py.
rope.json holds rotary frequencies of released models.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scripts import tiny_checkpoint
from tests.oracle import from_internlm2

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 48,
    "beta_fast": 6.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "truncate": False,
}
DYNAMIC = {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
LLAMA, QWEN2, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
MOE, INTERNLM2 = "Qwen3MoeForCausalLM", "InternLM2ForCausalLM"
CASES = {
    "llama": (LLAMA, {}),
    "llama_tied": (LLAMA, {"tie_word_embeddings": True}),
    "llama_mha": (LLAMA, {"num_key_value_heads": None, "head_dim": None}),
    "llama_bias": (LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama_llama3": (LLAMA, {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama_linear": (LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama_dynamic": (LLAMA, DYNAMIC),
    "llama_yarn": (LLAMA, {"rope_scaling": YARN}),
    "llama_mscale": (LLAMA, {"rope_theta": None, "rope_parameters": MSCALE}),
    "internlm2": (INTERNLM2, {"bias": False}),
    "internlm2_bias": (INTERNLM2, {"bias": True}),
    "internlm2_dynamic": (INTERNLM2, DYNAMIC | {"rope_theta": 1000000.0}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", {"rope_theta": 1000000.0}),
    "mixtral_window": ("MixtralForCausalLM", {"sliding_window": 8}),
    "qwen2": (QWEN2, {}),
    "qwen2_yarn": (QWEN2, {"rope_theta": 1000000.0, "rope_scaling": YARN}),
    "qwen2_window": (QWEN2, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": (QWEN3, {"head_dim": 32}),
    "qwen3_tied": (QWEN3, {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3_moe": (MOE, {"norm_topk_prob": True}),
    "qwen3_moe_mixed": (MOE, {"norm_topk_prob": False, "mlp_only_layers": [0], "head_dim": 32}),
}

ROPES = {  # config.json keys of released models, and the length of the sequence
    "llama2-7b": ({"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}, 100),
    "llama3.1-8b": ({"rope_theta": 5e5, "head_dim": 128, "max_position_embeddings": 131072}, 100),
    "qwen2.5-7b": ({"rope_theta": 1e6, "head_dim": 128, "max_position_embeddings": 32768}, 100),
    "vicuna-16k": ({"head_dim": 128, "max_position_embeddings": 4096}, 100),
    "internlm2.5-7b": ({"rope_theta": 1e6, "head_dim": 128, "max_position_embeddings": 32768}, 100),
    "internlm2.5-7b, long": ({"rope_theta": 1e6, "head_dim": 128, "max_position_embeddings": 32768}, 200000),
    "mscale": ({"rope_theta": 5e4, "head_dim": 64, "max_position_embeddings": 4096}, 100),
}
SCALINGS = {
    "llama3.1-8b": LLAMA3 | {"original_max_position_embeddings": 8192},
    "qwen2.5-7b": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "vicuna-16k": {"type": "linear", "factor": 4.0},
    "internlm2.5-7b": {"type": "dynamic", "factor": 2.0},
    "internlm2.5-7b, long": {"type": "dynamic", "factor": 2.0},
    "mscale": {key: value for key, value in MSCALE.items() if key != "rope_theta"},
}


def main():
    here = Path(__file__).parent
    found = {name: frequencies(*ROPES[name], SCALINGS.get(name)) for name in ROPES}
    (here / "rope.json").write_text(json.dumps(found) + "\n")
    for index, (name, (architecture, changes)) in enumerate(CASES.items()):
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        hf, random = tiny_checkpoint.config(architecture, **changes), np.random.RandomState(index)
        sequences = [random.randint(0, hf["vocab_size"], length) for length in (24, 9)]
        out = {"config": json.dumps(hf), "seed": index, "transformers": transformers.__version__}
        for number, tokens in enumerate(sequences):
            out |= {f"tokens{number}": tokens.astype(np.int32), f"logits{number}": logits(hf, index, tokens)}
        np.savez(here / f"{name}.npz", **out)
        print(name, [float(out[f"logits{i}"].std()) for i in range(2)])


def logits(hf, seed, tokens):
    """float32[T, V] of one sequence through a fresh model: dynamic NTK remembers the longest sequence it met."""
    arrays = tiny_checkpoint.tensors(hf, seed)
    if hf["architectures"] == ["InternLM2ForCausalLM"]:  # no class in transformers: as the Llama that it equals
        arrays = {key: np.ascontiguousarray(array) for key, array in from_internlm2(arrays, hf).items()}
        hf = hf | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": hf.get("bias")}
    with tempfile.TemporaryDirectory() as folder:
        save_file(arrays, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        config = {key: value for key, value in hf.items() if value is not None or key == "sliding_window"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model, report = getattr(transformers, hf["architectures"][0]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)[None]).logits[0].numpy()


def frequencies(hf, length, scaling):
    """transformers' inverse frequencies for a sequence of `length` tokens, and the factor of cos and sin."""
    hf = {"hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0} | hf | {"rope_scaling": scaling}
    config = transformers.LlamaConfig(**hf)
    if scaling:
        compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
        inv_freq, scale = compute(config, torch.device("cpu"), seq_len=length)
    else:
        inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return {"config": hf, "length": length, "inv_freq": [float(f"{x:.9g}") for x in inv_freq], "scale": scale}


if __name__ == "__main__":
    main()
