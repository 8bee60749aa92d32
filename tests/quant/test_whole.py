"""Models of quantized folders answer as the same models with their weights as values."""

import jax
import numpy as np
import pytest

from jaxserve import mesh as meshes
from jaxserve import ops, weights
from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.safetensors import SafetensorsFolder, save
from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.quant.dense import Dense
from jaxserve.quant.fp8 import Fp8
from jaxserve.quant.int4 import Int4
from jaxserve.quant.int8 import Int8
from scripts import tiny_checkpoint
from tests import oracle
from tests.engine import build
from tests.models.test_families import engine_logits
from tests.quant import folders

NODES = dict.fromkeys(("awq", "gptq", "gptq-sym", "gptq-v2", "compressed", "compressed-asym", "act-order"), Int4)
NODES |= dict.fromkeys(("act-order8", "gptq8", "gptq8-asym", "compressed8", "w8", "smooth", "w8a8"), Int8)
NODES |= {kind: Fp8 for kind in folders.EIGHT if kind.startswith("fp8")}
# Where activations are rounded too: how far results may be off, in parts of what they are.
ROUGH = {"smooth": 0.02, "w8a8": 0.02} | {kind: 0.06 for kind in NODES if kind.startswith("fp8")}


@pytest.fixture
def as_stored(monkeypatch):
    """The CPU holds weights as a GPU would."""
    monkeypatch.setattr(loading, "UNPACKED_SHARE", 0)


def model(folder, kind, architecture="LlamaForCausalLM", **changes):
    hf = tiny_checkpoint.config(architecture, **changes)
    return hf, folders.write(folder, hf, kind)


def linear(layer):
    return {"qkv": layer.mixer.qkv, "o": layer.mixer.o, "gate_up": layer.ffn.gate_up, "down": layer.ffn.down}


SPLIT = ("awq", "act-order", "gptq8-asym", "w8a8", "fp8-static", "fp8-block")


@pytest.mark.parametrize("kind, tp", [*((kind, 1) for kind in NODES), *((kind, 4) for kind in SPLIT)])
def test_maps(tmp_path, as_stored, kind, tp):
    """Every linear map of a layer against what its format's numbers mean."""
    _, values = model(tmp_path, kind, num_hidden_layers=1)
    held = loading.open_model(str(tmp_path), EngineConfig(tp=tp))
    maps = linear(held.read().layers[0])
    split = kind.startswith("act-order") and tp > 1  # no device has the inputs that its part of `o` and `down` wants
    assert {name: type(map_) for name, map_ in maps.items()} == {
        name: Dense if split and name in ("o", "down") else NODES[kind] for name in maps
    }
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(3, n)).astype(np.float32) for name, n in (("qkv", 64), ("o", 64), ("down", 96))}
    x["gate_up"] = x["qkv"]
    want = {name: x["qkv"] @ values[f"model.layers.0.self_attn.{name}_proj.weight"].T for name in "qkv"}
    want["o"] = x["o"] @ values["model.layers.0.self_attn.o_proj.weight"].T
    want |= {name: x["qkv"] @ values[f"model.layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up")}
    want["down"] = x["down"] @ values["model.layers.0.mlp.down_proj.weight"].T

    inputs = {"qkv": 64, "gate_up": 64, "o": 64 if tp == 1 else 128, "down": 96 if tp == 1 else 512}  # padded for tp
    padded = {name: np.pad(x[name], ((0, 0), (0, n - x[name].shape[1]))) for name, n in inputs.items()}
    with meshes.on(held.mesh):
        out = jax.jit(lambda maps, x: {name: map_.dot(x[name]) for name, map_ in maps.items()})(maps, padded)
    qkv, both = np.asarray(out["qkv"])[:, :2], np.asarray(out["gate_up"])[..., :96]
    found = {"q": qkv[:, :, :2], "k": qkv[:, :, 2], "v": qkv[:, :, 3], "gate": both[:, 0], "up": both[:, 1]}
    found |= {"o": np.asarray(out["o"]), "down": np.asarray(out["down"])}
    for name, expected in want.items():
        error = np.linalg.norm(found[name].reshape(3, -1) - expected) / np.linalg.norm(expected)
        assert error < ROUGH.get(kind, 1e-3), name


WHOLE = [
    ("InternLM2ForCausalLM", "compressed", 2),
    ("MixtralForCausalLM", "awq", 2),
    ("MixtralForCausalLM", "w8a8", 1),
    ("Qwen3MoeForCausalLM", "act-order", 1),
    ("Qwen3MoeForCausalLM", "fp8-block", 2),
]


@pytest.mark.parametrize("architecture, kind, tp", WHOLE)
def test_logits(tmp_path, as_stored, architecture, kind, tp):
    hf, values = model(tmp_path, kind, architecture, moe_intermediate_size=64, num_hidden_layers=1)
    held = loading.open_model(str(tmp_path), EngineConfig(tp=tp))
    params, prompt = held.read(), list(range(3, 19))
    assert {type(map_) for map_ in linear(params.layers[0]).values()} == {NODES[kind]}
    found = engine_logits(weights.padded(held.cfg, tp), params, held.mesh, prompt)
    want = oracle.logits(values, hf, prompt)
    assert np.linalg.norm(found - want) / np.linalg.norm(want) < 3 * ROUGH.get(kind, 1e-3)


def test_answers(tmp_path, as_stored):
    """Tokens, through the whole engine."""
    hf, values = model(tmp_path, "awq")
    requests = [(list(range(3, 3 + n)), 12) for n in (1, 5, 20)]
    with build.engine(tmp_path) as engine:
        found = build.run(engine, requests)
    for (prompt, count), tokens in zip(requests, found):
        want = oracle.greedy(values, hf, prompt, count)
        end = want.index(build.EOS) if build.EOS in want else count
        assert tokens[:end] == want[:end]


@pytest.mark.parametrize("kind", ["awq", "fp8-block", "w8a8"])
def test_held_as_values(tmp_path, kind):
    """What the CPU does where memory is no matter; activations are rounded all the same."""
    model(tmp_path, kind)
    held = loading.open_model(str(tmp_path), EngineConfig())
    for map_ in linear(held.read().layers[0]).values():
        assert type(map_) is (Dense if kind == "awq" else NODES[kind]) and map_.weight.dtype == np.float32
    assert "held as float32 values" in held.holds()


@pytest.mark.parametrize("kind", ["awq", "act-order8", "fp8-static", "fp8-block"])
def test_shapes_are_known_before(tmp_path, as_stored, kind):
    model(tmp_path, kind, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3, head_dim=32)
    for tp in (1, 2, 4):
        held = loading.open_model(str(tmp_path), EngineConfig(tp=tp))
        arrays = held.read()
        assert jax.tree.structure(held.shapes) == jax.tree.structure(arrays)
        for shape, array in zip(jax.tree.leaves(held.shapes), jax.tree.leaves(arrays)):
            assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)


@pytest.mark.parametrize(
    "q, k, words",
    [
        (0.0, 0.0, "q_proj.input_scale is 0.0, and activations"),
        (1.0, np.nan, "v_proj.input_scale has values that are no numbers"),
    ],
)
def test_scales_of_activations_are_numbers(tmp_path, as_stored, q, k, words):
    model(tmp_path, "fp8-static", num_hidden_layers=1)
    with SafetensorsFolder(tmp_path) as source:
        tensors = {name: source.read(name) for name in source.names}
    for name, value in {"q": q, "k": k, "v": q}.items():
        tensors[f"model.layers.0.self_attn.{name}_proj.input_scale"] = np.array([value], np.float32)
    save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        loading.open_model(str(tmp_path), EngineConfig()).read()


@pytest.mark.parametrize(
    "stored, asked", [("awq", "hf"), ("awq", "gptq"), (None, "awq"), (None, "gptq"), ("fp8", "awq")]
)
def test_the_format_asked_for_must_be_there(tmp_path, stored, asked):
    if stored:
        model(tmp_path, stored)
    else:
        tiny_checkpoint.write(tmp_path, build.HF)
    with pytest.raises(ValueError, match=f"model_format={asked}, and the checkpoint has {stored or 'unquantized'}"):
        loading.open_model(str(tmp_path), EngineConfig(model_format=asked))


@pytest.mark.parametrize(
    "kind, asked", [("awq", "awq"), ("smooth", "hf"), ("fp8", "fp8"), ("w8a8", "compressed-tensors")]
)
def test_the_format_may_be_said(tmp_path, kind, asked):
    model(tmp_path, kind)
    loading.open_model(str(tmp_path), EngineConfig(model_format=asked))


@pytest.mark.parametrize("kind, tp", [("awq", 2), ("fp8-static", 1), ("act-order8", 1), (None, 1)])
def test_converted(tmp_path, as_stored, kind, tp):
    """`convert` keeps weights as the engine holds them; what is read back is the same, bit by bit."""
    if kind:
        model(tmp_path / "stored", kind, num_hidden_layers=1)
    else:
        tiny_checkpoint.write(tmp_path / "stored", build.HF)
    config, said = EngineConfig(tp=tp), []
    loading.convert(str(tmp_path / "stored"), tmp_path / "converted", config, said.append)
    before = loading.open_model(str(tmp_path / "stored"), config)
    after = loading.open_model(str(tmp_path / "converted"), config)
    assert after.held == before.held and after.holds() == before.holds() and (not kind or before.holds() in said)
    want, found = before.read(), after.read()
    assert jax.tree.structure(found) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_converted_for_another_kind_of_device(tmp_path, as_stored, monkeypatch):
    model(tmp_path / "stored", "awq", num_hidden_layers=1)
    loading.convert(str(tmp_path / "stored"), tmp_path / "converted", EngineConfig())
    with pytest.raises(ValueError, match="model_format=gptq, and the checkpoint has awq weights"):
        loading.open_model(str(tmp_path / "converted"), EngineConfig(model_format="gptq"))
    with pytest.raises(ValueError, match="is needed; it was converted for dtype float32, tp 1, kv_heads 2; convert"):
        loading.open_model(str(tmp_path / "converted"), EngineConfig(dtype="bfloat16"))
    monkeypatch.setattr(ops, "layout", lambda: "the kernels of a GPU")
    with pytest.raises(ValueError, match="laid out for the reference.*convert the original folder again"):
        loading.open_model(str(tmp_path / "converted"), EngineConfig())
