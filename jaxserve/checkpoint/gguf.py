"""GGUF files (llama.cpp) read as if they were Hugging Face checkpoints: its names, shapes, config and row order.

Quantized tensors are dequantized to float32 as they are read, a few rows at a time; F16 and BF16 stay what they are.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from jaxserve.checkpoint import CheckpointError, missing
from jaxserve.checkpoint.gguf_header import Head, Stored, open_head
from jaxserve.checkpoint.gguf_metadata import model_config, sampling_config, tokenizer_dict

NATIVE = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CHUNK = 1 << 20  # elements dequantized at a time: the package's temporaries are several times as large

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {  # blk.N.KEY -> model.layers.N.VALUE; "{}" is an expert
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
INTERNLM2_TOP = {"token_embd": "model.tok_embeddings", "output_norm": "model.norm", "output": "output"}
INTERNLM2 = {
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "attn_q": "attention.wqkv",  # fused with attn_k and attn_v
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
NO_WEIGHTS = ("rope_freqs.weight",)  # read by model_config


class Source(NamedTuple):
    """A Hugging Face tensor in terms of the file's.  Rows of a vector are its elements."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pick: Callable  # int[n] rows -> [(tensor of the file, int[m] places among the n, int[m] its rows), ...]


class GGUFFile:
    """A Checkpoint (see the package's docstring) over one GGUF file."""

    def __init__(self, path: Path):
        """Reads the head, no weights.  CheckpointError names the file and the tensor or the metadata key."""
        self.path = Path(path)
        self._file, head = open_head(self.path)
        try:
            self.config = model_config(self.path, head, self._floats)
            self.generation_config = sampling_config(self.path, head.metadata)
            self.tokenizer_data = tokenizer_dict(self.path, head.metadata)
            self._sources = _sources(self.path, head, self.config)
        except CheckpointError:
            self.close()
            raise
        self.names = set(self._sources)

    def _floats(self, stored: Stored) -> np.ndarray:
        """A whole vector."""
        out = np.empty((stored.shape[0], 1), np.float32)
        self._fill(out, np.arange(len(out)), stored, np.arange(len(out)), slice(0, 1))
        return out[:, 0]

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            raise missing(self.path, name, self.names)
        return self._sources[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._source(name).dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the slice `index` of it, as a new array; only its blocks are dequantized."""
        shape, dtype, pick = self._source(name)
        index = (*(index or ()), slice(None), slice(None))
        rows = np.arange(shape[0])[index[0]]
        columns = range(shape[1] if len(shape) > 1 else 1)[index[1]] if len(shape) > 1 else range(1)
        assert columns.step == 1
        out = np.empty((len(rows), len(columns)), dtype)
        for stored, places, stored_rows in pick(rows):
            self._fill(out, places, stored, stored_rows, slice(columns.start, max(columns.stop, columns.start)))
        return out if len(shape) > 1 else out[:, 0]

    def _fill(self, out, places, stored, rows, columns):
        """out[places] = the file's `rows`, cut to `columns`."""
        block, block_bytes = GGML_QUANT_SIZES[stored.kind]
        width = stored.shape[-1] if len(stored.shape) > 1 else 1
        row_bytes = width // block * block_bytes
        grid = self._file.view(np.uint8, (stored.size // row_bytes if row_bytes else 0, row_bytes), stored.offset)
        first, last = columns.start // block, -(-columns.stop // block)  # blocks that hold these columns
        step = max(1, CHUNK // max(1, (last - first) * block))
        native = NATIVE.get(stored.kind.name)
        low, high = (rows.min(), rows.max() + 1) if len(rows) else (0, 0)
        with self._file.reading(stored.offset + int(low) * row_bytes, int(high - low) * row_bytes):
            for i in range(0, len(rows), step):
                data = grid[:, first * block_bytes : last * block_bytes][rows[i : i + step]]
                part = data.view(native) if native else dequantize(data, stored.kind)
                out[places[i : i + step]] = part[:, columns.start - first * block : columns.stop - first * block]

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def tokenizer_data(path: Path) -> dict:
    """What the metadata of a GGUF file knows of the tokenizer; reads no weights (about 0.1 s).

    Plain JSON types only, so that the same dict is also written as `tokenizer_data.json` in a converted folder:

        "model": str            "gpt2" (byte-level BPE with merges) or "llama" (SentencePiece: scores, byte fallback)
        "pre": str              llama.cpp's name of the pre-tokenizer ("smollm", "llama-bpe", "qwen2", ..., "default")
        "tokens": list[str]     id -> text as stored: byte-level characters for "gpt2", "▁" for a space in "llama"
        "scores": list[float]   one a token for "llama", else []
        "token_types": list[int]  each 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused or 6 byte ("<0x0A>")
        "merges": list[str]     "left right", best first, for "gpt2", else []
        "bos_id", "eos_id", "unk_id", "pad_id": int | None
        "stop_ids": list[int]   ids that end a reply: eos, eot, eom, and control tokens named like an end of turn
        "add_bos", "add_eos": bool   what encoding a plain text adds (llama.cpp's default where the file is silent)
        "add_space_prefix": bool     "llama" only: a text starts as if a space stood before it
        "chat_template": str | None  jinja

    CheckpointError where the file has no tokenizer, or one of another kind.
    """
    file, head = open_head(Path(path))
    file.close()
    data = tokenizer_dict(Path(path), head.metadata)
    if data is None:
        raise CheckpointError(f"{path}: the file holds no tokenizer")
    return data


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps `rows` of a q or k matrix: it interleaves the two halves of each head."""
    head, i = np.divmod(rows, head_dim)
    half, j = np.divmod(i, head_dim // 2)
    return head * head_dim + 2 * j + half


def _sources(path: Path, head: Head, config: dict) -> dict[str, Source]:
    """Hugging Face names of all tensors; CheckpointError for a tensor that the architecture does not know."""
    architecture = config["architectures"][0]
    top, layer = TOP, LAYER
    if architecture == "MixtralForCausalLM":
        layer = LAYER | MIXTRAL
    if architecture == "InternLM2ForCausalLM":
        top, layer = INTERNLM2_TOP, INTERNLM2
    out: dict[str, Source] = {}
    for stored in head.tensors.values():
        if stored.name in NO_WEIGHTS:
            continue
        base, _, suffix = stored.name.rpartition(".")
        found = re.fullmatch(r"blk\.(\d+)\.([a-z_]+)(?:\.(\d+))?", base)
        part = found[2] if found else base
        one = found and found[3]  # old files hold each expert of Mixtral on its own: blk.0.ffn_gate.7.weight
        name = (layer if found else top).get(f"{part}_exps" if one else part)
        if layer is INTERNLM2 and part in ("attn_k", "attn_v"):
            continue
        if name is None or suffix not in ("weight", "bias"):
            raise CheckpointError(f"{path}: tensor {stored.name} is not part of a {architecture} that jaxserve knows")
        if len(stored.shape) == 1 and stored.kind.name not in NATIVE:
            raise CheckpointError(f"{path}: tensor {stored.name} is a vector in blocks ({stored.kind.name})")
        name = (f"model.layers.{found[1]}.{name}" if found else name) + f".{suffix}"
        if len(stored.shape) == 3 and "{}" in name:
            experts, *shape = stored.shape
            for e in range(experts):
                out[name.format(e)] = _plain(stored, tuple(shape), e * shape[0])
        elif layer is INTERNLM2 and part == "attn_q":
            out[name] = _fused(path, head, stored, config)
        elif config["model_type"] in ("llama", "mistral", "mixtral") and part in ("attn_q", "attn_k"):
            out[name] = _permuted(stored, config["head_dim"])
        else:
            out[name.format(one)] = _plain(stored, stored.shape)
    return out


def _dtype(*stored: Stored) -> np.dtype:
    kinds = {NATIVE.get(tensor.kind.name, np.float32) for tensor in stored}
    return np.dtype(kinds.pop() if len(kinds) == 1 else np.float32)


def _plain(stored: Stored, shape: tuple[int, ...], first: int = 0) -> Source:
    return Source(shape, _dtype(stored), lambda rows: [(stored, np.arange(len(rows)), rows + first)])


def _permuted(stored: Stored, head_dim: int) -> Source:
    def pick(rows):
        return [(stored, np.arange(len(rows)), interleaved(rows, head_dim))]

    return Source(stored.shape, _dtype(stored), pick)


def _fused(path: Path, head: Head, q: Stored, config: dict) -> Source:
    """InternLM2's wqkv: for each kv head its queries, k and v (llama.cpp has three matrices, q and k interleaved)."""
    try:
        k, v = (head.tensors[q.name.replace("attn_q", name)] for name in ("attn_k", "attn_v"))
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {error.args[0]} is missing") from None
    width, kv_heads = config["head_dim"], config["num_key_value_heads"]
    group = config["num_attention_heads"] // kv_heads

    def pick(rows):
        kv, i = np.divmod(rows, (group + 2) * width)
        slot, i = np.divmod(i, width)
        cases = (
            (q, slot < group, interleaved((kv * group + slot) * width + i, width)),
            (k, slot == group, interleaved(kv * width + i, width)),
            (v, slot == group + 1, kv * width + i),
        )
        return [(stored, np.flatnonzero(here), at[here]) for stored, here, at in cases]

    return Source((sum(t.shape[0] for t in (q, k, v)), *q.shape[1:]), _dtype(q, k, v), pick)
