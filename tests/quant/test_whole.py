"""Models of quantized folders answer as the same models with their weights as values."""

import numpy as np
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.quant.dense import Dense
from jaxserve.quant.int4 import Int4
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build
from tests.quant import folders

CASES = {
    "awq": ("LlamaForCausalLM", {}),
    "gptq": ("Qwen2ForCausalLM", {}),
    "compressed": ("InternLM2ForCausalLM", {}),
    "act-order": ("LlamaForCausalLM", {}),
    "gptq8": ("Qwen3ForCausalLM", {}),
}


def model(folder, kind, architecture=None, **changes):
    hf = tiny_checkpoint.config(architecture or CASES[kind][0], **changes)
    return hf, folders.write(folder, hf, kind)


@pytest.mark.parametrize("kind, tp", [*((kind, 1) for kind in CASES), ("awq", 2), ("compressed", 2), ("awq", 4)])
def test_tokens_equal_the_oracles(tmp_path, kind, tp):
    hf, values = model(tmp_path, kind)
    engine = build.engine(tmp_path, tp=tp)
    try:
        layer = engine.runner.params.layers[0]
        held = Int4 if kind in ("awq", "gptq", "compressed") else Dense
        assert all(type(x) is held for x in (layer.mixer.qkv, layer.mixer.o, layer.ffn.gate_up, layer.ffn.down))
        requests = [(list(range(3, 3 + n)), 12) for n in (1, 5, 20)]
        expected = [oracle.greedy(values, hf, prompt, count) for prompt, count in requests]
        found = build.run(engine, requests)
    finally:
        engine.close()
    ends = [tokens.index(build.EOS) if build.EOS in tokens else len(tokens) for tokens in expected]
    assert [tokens[:n] for tokens, n in zip(found, ends)] == [tokens[:n] for tokens, n in zip(expected, ends)]


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_are_held_as_values(tmp_path, architecture):
    _, values = model(tmp_path, "awq", architecture, moe_intermediate_size=64)
    held = loading.open_model(str(tmp_path), EngineConfig())
    layer = held.read().layers[0]
    assert type(layer.mixer.qkv) is Int4
    name = next(name for name in values if "experts.1." in name and ("down" in name or "w2" in name))
    np.testing.assert_array_equal(layer.ffn.down.weight[1].T, values[name].astype(np.float16))


def test_shapes_are_known_before(tmp_path):
    import jax

    model(tmp_path, "awq", num_attention_heads=6, num_key_value_heads=3, head_dim=32)
    for tp in (1, 2, 4):
        held = loading.open_model(str(tmp_path), EngineConfig(tp=tp))
        arrays = held.read()
        assert jax.tree.structure(held.shapes) == jax.tree.structure(arrays)
        for shape, array in zip(jax.tree.leaves(held.shapes), jax.tree.leaves(arrays)):
            assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


@pytest.mark.parametrize("stored, asked", [("awq", "hf"), ("awq", "gptq"), (None, "awq"), (None, "gptq")])
def test_the_format_asked_for_must_be_there(tmp_path, stored, asked):
    if stored:
        model(tmp_path, stored)
    else:
        tiny_checkpoint.write(tmp_path, build.HF)
    with pytest.raises(ValueError, match=f"model_format={asked}, and the checkpoint has {stored or 'unquantized'}"):
        loading.open_model(str(tmp_path), EngineConfig(model_format=asked))


def test_the_format_may_be_said(tmp_path):
    model(tmp_path, "awq")
    assert loading.open_model(str(tmp_path), EngineConfig(model_format="awq")).source.method == "awq"
