"""AWQ folders of tiny models: the layout, a model that rounding alone changes, and runs that are interrupted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.lite import awq, awq_layout, calibrate, experts, rounding, scales
from jaxserve.lite.folder import Folder
from jaxserve.models.config import from_hf
from jaxserve.quant.int4 import nearest
from scripts import tiny_checkpoint
from tests import oracle
from tests.lite.test_calibrate import WINDOWS, opened

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ's: which of 8 outputs each nibble of an int32 is, from the lowest


def quantized(folder, model, stop=None, batch=1, **settings):
    """Writes an AWQ folder of an open model; stop: after so many layers, as if killed."""
    settings = awq.Settings(awq.choose_group(model.cfg), **settings)
    new = Folder(folder, model.source, settings.in_config(awq.skipped(model.cfg)))

    def watch(block, layer, about):
        if block.index + 1 == stop:
            raise KeyboardInterrupt

    awq.quantize(model, WINDOWS, new, settings, batch=batch, watch=watch)
    return new.finish("float32")


def by_hand(tensors, name, group):
    """(nibbles [in, out], zeros, values) of a stored map, one integer at a time."""
    words, zeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
    assert (words.dtype, zeros.dtype, scales.dtype) == (np.int32, np.int32, np.float16)
    apart = []
    for stored in (words.view(np.uint32), zeros.view(np.uint32)):
        out = np.zeros((stored.shape[0], stored.shape[1] * 8), int)
        for column in range(out.shape[1]):
            out[:, column] = (stored[:, column // 8] >> (4 * PLACES.index(column % 8))) & 15
        apart.append(out)
    q, zero = apart
    of = np.arange(len(q)) // group
    return q, zero, ((q - zero[of]) * scales[of].astype(np.float32)).astype(np.float32)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_folder_reads_back_nibble_by_nibble(tmp_path, architecture):
    changes = {"moe_intermediate_size": 64} if "Moe" in architecture else {}
    model, hf = opened(tmp_path / "model", architecture, **changes)
    uneven = 2 if architecture == "InternLM2ForCausalLM" else 1  # each size of a batch is compiled for
    made = quantized(tmp_path / "made", model, batch=uneven)
    tensors, plain = load_file(made / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4)
    group, values = config["group_size"], {}
    with checkpoint.open(made) as source:
        names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        for name in names:
            q, zero, value = by_hand(tensors, name, group)
            np.testing.assert_array_equal(source.read(f"{name}.nibbles"), q.T)
            np.testing.assert_array_equal(source.read(f"{name}.zero"), zero.T)
            values[f"{name}.weight"] = value.T
        assert set(source.names) == set(plain)
    expected = {name for name in plain if ".layers." in name and plain[name].ndim == 2 and "mlp.gate.w" not in name}
    assert set(values) == expected
    values |= {name: array for name, array in tensors.items() if name in plain}
    again = loading.open_model(str(made), EngineConfig(dtype="float32"))
    assert again.source.method == "awq"
    found = oracle.logits(values, {k: v for k, v in hf.items() if k != "quantization_config"}, WINDOWS[0])
    exact = oracle.logits(tmp_path / "model", hf, WINDOWS[0])
    assert np.square(found - exact).mean() < 0.05 * np.square(exact).mean()


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "InternLM2ForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"]
)
def test_scales_leave_the_model_as_it_is(tmp_path, architecture):
    model, _ = opened(tmp_path, architecture)
    random = np.random.default_rng(0)
    for block in calibrate.layers(model, WINDOWS):
        layer, cfg = block.layer, model.cfg
        paths = calibrate.MAPS if isinstance(layer.ffn, calibrate.GatedMLP) else calibrate.MAPS[:2]
        for path in paths:
            inputs = len(calibrate.at(layer, path).weight)
            scale = np.exp(random.standard_normal(inputs)).astype(np.float32)
            if path == "mixer.o":  # one for all queries of a head
                scale = scale.reshape(cfg.kv_heads, -1, cfg.head_dim)
                scale = np.broadcast_to(scale[:, :1], scale.shape).reshape(-1)
            layer = scales.fold(layer, path, jnp.asarray(scale))
        if "ffn.router" in block.rows:
            seen, width, inner = experts.look(block, layer), cfg.width, (cfg.experts, cfg.expert_ffn)
            layer, _ = experts.scaled_together(layer, seen, np.exp(random.standard_normal(width)).astype(np.float32))
            layer, seen = experts.scaled_apart(layer, seen, np.exp(random.standard_normal(inner)).astype(np.float32))
        for before, after in zip(block.outputs(), block.outputs(layer)):
            np.testing.assert_allclose(after, before, atol=2e-4)
        tensors = awq_layout.norms(block, layer)
        assert not np.allclose(next(iter(tensors.values())), block.layer.norm1)


def test_rounding_to_nearest_is_the_engines():
    weight = np.random.default_rng(0).standard_normal((64, 24)).astype(np.float32)
    q, scale, zero = nearest(jnp.asarray(weight), 32)
    found = rounding.round_to_nearest(jnp.asarray(weight), 32)
    np.testing.assert_array_equal(found.q, q)
    np.testing.assert_array_equal(found.zero, zero)
    np.testing.assert_array_equal(found.scale, np.asarray(scale).astype(np.float16))


def test_what_is_searched_is_better_than_what_is_not():
    random = np.random.default_rng(0)
    weight = jnp.asarray(random.standard_normal((64, 40)), jnp.float32)
    x = random.standard_normal((500, 64)) @ random.standard_normal((64, 64)) * np.exp(random.standard_normal(64))
    moments = rounding.damped(jnp.asarray(x.T @ x / 500, jnp.float32), 50000)
    ways = {
        "nearest": rounding.round_to_nearest(weight, 32),
        "clipped": rounding.clipped(weight, jnp.diag(moments), 32),
        "compensated": rounding.compensated(weight, moments, 32),
        "solved": rounding.solved(weight, moments, 32),
    }
    lost = {name: float(rounding.error(weight, found.values(), moments)[0]) for name, found in ways.items()}
    assert lost["solved"] < lost["compensated"] < lost["clipped"] < lost["nearest"]
    for found in (ways["solved"], rounding.solved(weight, moments, 32, symmetric=True)):
        assert set(np.unique(found.q)) <= set(range(16)) and (found.scale > 0).all()
    assert (found.zero == 8).all()


def test_an_interrupted_run_gives_the_same_bytes(tmp_path):
    model, _ = opened(tmp_path / "model")
    whole = quantized(tmp_path / "whole", model, search="all")
    with pytest.raises(KeyboardInterrupt):
        quantized(tmp_path / "parts", model, stop=1, search="all")
    assert not (tmp_path / "parts").exists()
    parts = quantized(tmp_path / "parts", model, search="all")
    assert sorted(file.name for file in parts.iterdir()) == sorted(file.name for file in whole.iterdir())
    for file in whole.iterdir():
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_layer_that_overflows_is_named(tmp_path):
    opened(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = 1e38
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    model = loading.open_model(str(tmp_path / "model"), EngineConfig(dtype="float32"))
    with pytest.raises(ValueError, match=r"layer 1: the inputs of model\.layers\.1\.self_attn\.q_proj"):
        quantized(tmp_path / "made", model)


def test_groups_have_to_fit():
    cfg = calibrate_config(hidden_size=576, num_attention_heads=9, head_dim=64, intermediate_size=1536)
    assert awq.choose_group(cfg) == 64
    assert awq.choose_group(cfg, 32) == 32
    with pytest.raises(
        ValueError, match=r"128 do not divide the maps' inputs \(576, 1536\); --w-group-size 64 is the la"
    ):
        awq.choose_group(cfg, 128)
    with pytest.raises(ValueError, match="maps with 100 outputs"):
        awq.choose_group(calibrate_config(intermediate_size=100))


def calibrate_config(**changes):
    return from_hf(tiny_checkpoint.config("LlamaForCausalLM", num_key_value_heads=1, **changes))


def test_the_quantized_model_is_nearer_than_one_rounded_to_nearest(tmp_path):
    model, _ = opened(tmp_path / "model")
    blocks = calibrate.layers(model, WINDOWS, both=True)
    lost = {}
    for name, run in (("found", None), ("nearest", 0)):
        for block in blocks if run is None else calibrate.layers(model, WINDOWS, both=True):
            if run is None:
                tensors, about, *_ = awq.quantized(block, awq.Settings(32), WINDOWS.size)
                tensors = {name: np.asarray(array) for name, array in tensors.items()}
                layer = awq_layout.restored(block, tensors)
                assert all(errors["found"] < errors["nearest"] for errors in about["errors"].values())
            else:
                layer = block.layer
                for path in calibrate.MAPS:
                    weight = calibrate.at(layer, path).weight
                    rounded = rounding.round_to_nearest(weight.reshape(len(weight), -1), 32).values()
                    layer = calibrate.placed(layer, path, rounded.reshape(weight.shape))
            block.follow(layer)
        apart = [q - e for q, e in zip(block.outputs(layer), block.outputs(exact=True))]
        lost[name] = sum(float(jnp.square(a).sum()) for a in apart)
    assert lost["found"] < 0.5 * lost["nearest"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpus_way_gives_as_good_a_model(tmp_path, monkeypatch, dtype):
    opened(tmp_path / "model")
    model = loading.open_model(str(tmp_path / "model"), EngineConfig(dtype=dtype))
    lost = []
    for way in (False, True):
        monkeypatch.setattr(calibrate, "hurries", lambda mesh, way=way: way)
        monkeypatch.setattr(calibrate, "_roomy", lambda model, windows, way=way: way)
        blocks = calibrate.layers(model, WINDOWS, both=True, batch=2)
        for block in blocks:
            made = awq.quantized(block, awq.Settings(32), WINDOWS.size)
            block.follow(made.layer, made.outputs)
            for after, before in zip(*made.outputs or ((), ())):
                assert after.shape == before.shape
        plain = block.outputs(exact=True)
        lost.append(sum(float(jnp.square(q - e).mean()) for q, e in zip(block.outputs(made.layer), plain)))
    assert lost[1] < 1.3 * lost[0]
