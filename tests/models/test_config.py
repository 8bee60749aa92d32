import pytest

from jaxserve.models import FAMILIES, family
from jaxserve.models.config import Rope, from_hf
from scripts import tiny_checkpoint


def read(architecture="LlamaForCausalLM", **changes):
    return from_hf(tiny_checkpoint.config(architecture, **changes))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_architecture_has_a_config_and_a_table(architecture):
    cfg = read(architecture)
    hash(cfg)
    assert (cfg.layers, cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.vocab) == (2, 64, 4, 2, 16, 97)
    assert cfg.rope == Rope(10000.0) and cfg.dtype == "float32" and not cfg.tied
    rows = family(cfg.family).weights(cfg)
    assert all(len(row.sources) == len(row.shapes) for row in rows)
    paths = {row.path for row in rows}
    assert {"embed", "norm", "head", "layers.{}.norm1", "layers.{}.mixer.qkv", "layers.{}.ffn.down"} <= paths
    tied = read(architecture, tie_word_embeddings=True)
    assert {row.path for row in family(cfg.family).weights(tied)} == paths - {"head"}


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"BertModel.*LlamaForCausalLM"):
        from_hf({"architectures": ["BertModel"]})
    with pytest.raises(ValueError, match="names nothing"):
        from_hf({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"hidden_size": None}, "hidden_size must be a positive number, found None"),
        ({"vocab_size": "97"}, "vocab_size must be a positive number, found '97'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive number, found 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; 4096 is the most"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, found inf"),
        ({"rope_theta": "x"}, "rope_theta must be a positive number, found 'x'"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, found -1"),
        ({"rope_scaling": 5}, "a value of the wrong kind"),
        ({"num_key_value_heads": "x"}, "a value of the wrong kind"),
        ({"architectures": [["x"]]}, "architectures names"),
        ({"architectures": "LlamaForCausalLM"}, "architectures names LlamaForCausalLM"),
        ({"architectures": {"a": 1}}, "architectures names"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"dtype": "float8_e4m3fn"}, "dtype is float8_e4m3fn"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is longrope"),
        ({"rope_scaling": {"type": "linear"}}, "linear needs a factor of 1 or more, found None"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "found 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "different rope for each kind of layer"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_head_dim_and_kv_heads_have_defaults():
    cfg = read(head_dim=None, num_key_value_heads=None)
    assert (cfg.head_dim, cfg.kv_heads) == (16, 4)
    assert read("Qwen3ForCausalLM", head_dim=None).head_dim == 128


def test_both_spellings_of_rope_and_dtype():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2}}
    new = {"rope_theta": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}}
    assert read(**old).rope == read(**new).rope == Rope(5e5, "dynamic", 2.0, original=128)
    assert read(rope_theta=None).rope.theta == 10000.0
    assert read(dtype=None, torch_dtype="torch.float16").dtype == "float16"
    assert read(dtype=None).dtype == "bfloat16"


def test_yarn_stretches_the_positions_of_a_config_that_declares_the_original():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    cfg = read("Qwen2ForCausalLM", max_position_embeddings=32768, rope_scaling=yarn)
    assert cfg.max_position == 131072 and cfg.rope.original == 32768
    cfg = read(max_position_embeddings=128, rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 32})
    assert cfg.max_position == 128 and cfg.rope.factor == 4.0


def test_biases():
    llama = read(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = read("Qwen2ForCausalLM")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = read("Qwen3ForCausalLM", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)
    internlm = read("InternLM2ForCausalLM", bias=True)
    assert (internlm.qkv_bias, internlm.o_bias, internlm.mlp_bias) == (True, True, False)


def test_windows():
    assert read(sliding_window=8).window is None  # Llama has none
    assert read("MistralForCausalLM", sliding_window=8).window_at(0) == 8
    assert read("MistralForCausalLM").window is None
    hf = tiny_checkpoint.config("MistralForCausalLM")
    del hf["sliding_window"]
    assert from_hf(hf).window == 4096
    assert read("Qwen2ForCausalLM", sliding_window=8).window is None
    on = {"use_sliding_window": True, "sliding_window": 8}
    assert read("Qwen2ForCausalLM", **on).window is None  # the first 28 layers see everything
    some = read("Qwen2ForCausalLM", max_window_layers=1, **on)
    assert [some.window_at(layer) for layer in range(2)] == [None, 8]
    named = read("Qwen3ForCausalLM", layer_types=["sliding_attention", "full_attention"], **on)
    assert [named.window_at(layer) for layer in range(2)] == [8, None]
    assert read("Qwen3MoeForCausalLM", **on).window_at(0) == 8


def test_experts():
    mixtral = read("MixtralForCausalLM")
    assert (mixtral.experts, mixtral.experts_per_token, mixtral.expert_ffn, mixtral.norm_topk) == (4, 2, 96, True)
    assert mixtral.sparse_at(1) and not read().sparse_at(0)
    moe = read("Qwen3MoeForCausalLM", mlp_only_layers=[0])
    assert (moe.expert_ffn, moe.norm_topk) == (48, False)
    assert [moe.sparse_at(layer) for layer in range(2)] == [False, True]
    rows = {(row.path, row.layers) for row in family("qwen_moe").weights(moe)}
    assert {("layers.{}.ffn.down", (0,)), ("layers.{}.ffn.down", (1,))} <= rows
    assert read("Qwen3MoeForCausalLM", decoder_sparse_step=2).sparse_layers == (1,)
    renamed = tiny_checkpoint.config("Qwen3MoeForCausalLM", num_local_experts=4)
    del renamed["num_experts"]
    assert from_hf(renamed).experts == 4
