"""Layers one after the other, without a cache, equal the oracle's; and what a quantizer may do with them."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.lite import calibrate
from scripts import tiny_checkpoint
from tests import oracle

FAMILIES = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "InternLM2ForCausalLM": {"bias": True},
    "MistralForCausalLM": {"sliding_window": 5},
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {"mlp_only_layers": [0]},
}
WINDOWS = np.random.default_rng(0).integers(3, 97, (3, 24)).astype(np.int32)


def opened(folder, architecture="LlamaForCausalLM", **changes):
    """(Model, config.json) of a tiny checkpoint, which is written first."""
    hf = tiny_checkpoint.config(architecture, **FAMILIES[architecture] | changes)
    tiny_checkpoint.write(folder, hf)
    return loading.open_model(str(folder), EngineConfig(dtype="float32")), hf


def logits(model, hidden):
    """What the head makes of the last layer's hidden states."""
    params = model.read()
    x = calibrate.rms_norm(np.concatenate(hidden), params.norm, model.cfg.eps)
    return np.asarray(params.head.dot(x))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_hidden_states_equal_the_oracles(tmp_path, architecture):
    model, hf = opened(tmp_path, architecture)
    uneven = 2 if architecture == "MistralForCausalLM" else 1  # each size of a batch is compiled for
    for block in calibrate.layers(model, WINDOWS, batch=uneven):  # noqa: B007
        pass
    found = logits(model, list(block.outputs()))
    expected = np.stack([oracle.logits(tmp_path, hf, window) for window in WINDOWS])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_what_comes_into_the_maps(tmp_path):
    model, _ = opened(tmp_path)
    block = next(calibrate.layers(model, WINDOWS, batch=2))
    batches = list(block.inputs(*calibrate.MAPS))
    assert [len(taken["ffn.down"]) for taken in batches] == [48, 24]
    taken, layer = batches[0], block.layer
    out = block.hidden[0].reshape(48, -1) + layer.mixer.o.dot(taken["mixer.o"]) + layer.ffn.down.dot(taken["ffn.down"])
    np.testing.assert_allclose(out, next(block.outputs()).reshape(48, -1), atol=1e-5)


def test_later_layers_see_what_was_followed(tmp_path):
    model, _ = opened(tmp_path)
    plain = list(calibrate.layers(model, WINDOWS))
    for both in (False, True):
        for block in calibrate.layers(model, WINDOWS, both=both):
            if block.index == 0:
                block.follow(calibrate.placed(block.layer, "mixer.o", 0 * block.layer.mixer.o.weight))
                assert block.exact is block.hidden
        assert not np.allclose(block.hidden[0], plain[1].hidden[0])
        np.testing.assert_array_equal(block.exact[0], plain[1].hidden[0] if both else block.hidden[0])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM"])
def test_maps_have_their_names_in_the_checkpoint(tmp_path, architecture):
    model, _ = opened(tmp_path, architecture)
    stored = load_file(tmp_path / "model.safetensors")
    block = next(calibrate.layers(model, WINDOWS))
    for path in calibrate.MAPS:
        weight = calibrate.at(block.layer, path).weight
        parts = block.tensors(path, weight)
        for name, part in parts.items():
            np.testing.assert_array_equal(part, stored[f"{name}.weight"])
        np.testing.assert_array_equal(calibrate.join(model.cfg, block.rows[path], list(parts.values())), weight)


@pytest.mark.parametrize(
    "value, words",
    [
        (np.nan, "layer 1: tensor model.layers.1.mlp.gate_proj.weight or model.layers.1.mlp.up_proj.weight has"),
        (np.inf, "layer 1: tensor .*up_proj.weight has values that are no numbers"),
        (3e38, "layer 1: its output has values that are no numbers, or too large"),
    ],
    ids=str,
)
def test_values_that_are_no_numbers_are_named(tmp_path, value, words):
    model, _ = opened(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    model = loading.open_model(str(tmp_path), EngineConfig(dtype="float32"))
    with pytest.raises(ValueError, match=words):
        list(calibrate.layers(model, WINDOWS))
