"""SmoothQuant: smoothing changes nothing, folders are read back, and outliers cost less."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from jaxserve.lite import calibrate, gptq_folder, smooth_quant
from jaxserve.lite.folder import Folder
from scripts import tiny_checkpoint
from tests.serve import tiny


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 96, (4, 24), dtype=np.int32)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "InternLM2ForCausalLM"])
def test_smoothing_changes_nothing(tmp_path, windows, architecture):
    tiny_checkpoint.write(tmp_path, tiny_checkpoint.config(architecture))
    model = open_model(str(tmp_path), EngineConfig())
    for block in calibrate.layers(model, windows):
        most = smooth_quant.largest(block)
        layer = smooth_quant.smoothed(block, most)
        for before, after in zip(block.outputs(), block.outputs(layer)):
            np.testing.assert_allclose(after, before, atol=2e-4)
        smoother = next(iter(block.inputs(*calibrate.MAPS, layer=layer)))
        plain = next(iter(block.inputs(*calibrate.MAPS)))
        for path in calibrate.MAPS:
            ratio = [np.abs(x[path]).max(0).max() / np.median(np.abs(x[path]).max(0)) for x in (smoother, plain)]
            assert ratio[0] < ratio[1], path


@pytest.mark.parametrize("dtype", smooth_quant.DTYPES)
def test_read_back(tmp_path, windows, dtype):
    (plain := tmp_path / "plain").mkdir()
    tiny.write(plain)
    with checkpoint.open(plain) as source:
        model = open_model(str(plain), EngineConfig())
        folder = Folder(tmp_path / "out", source, smooth_quant.in_config(model.cfg, dtype))
        smooth_quant.quantize(model, windows, folder, dtype, batch=2)
        path = folder.finish("float16")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "smooth_quant", "quant_dtype": dtype}
    model, smooth = open_model(str(plain), EngineConfig()), []
    for block in calibrate.layers(model, windows, batch=2):
        smooth.append(smooth_quant.smoothed(block, smooth_quant.largest(block)))
    with checkpoint.open(path) as source:
        for index, layer in enumerate(smooth):
            name = f"model.layers.{index}.mlp.down_proj.weight"
            want = np.asarray(layer.ffn.down.weight).T
            np.testing.assert_allclose(source.read(name).astype(np.float32), want, atol=np.abs(want).max() / 15)
            steps = np.abs(source.read(name).astype(np.float32) - want).mean() / np.abs(want).mean()
            assert steps < (0.01 if dtype == "int8" else 0.04)
            norm = source.read(f"model.layers.{index}.input_layernorm.weight")
            np.testing.assert_allclose(norm, layer.norm1, rtol=1e-3)


def test_rounding():
    weight = np.array([[1.0, -0.5, 0.0], [-2.0, 0.25, 0.0]], np.float32)
    q, scale = smooth_quant.rounded(weight, "int8")
    assert q.dtype == np.int8 and q.tolist() == [[64, -127, 0], [-127, 64, 0]]
    np.testing.assert_allclose(scale[:2], [2 / 127, 0.5 / 127], rtol=1e-3)
    q, scale = smooth_quant.rounded(weight, "float8_e4m3fn")
    assert q.dtype == ml_dtypes.float8_e4m3fn and np.isfinite(q.astype(np.float32)).all()
    np.testing.assert_allclose(q.astype(np.float32) * scale, weight, rtol=0.07)


def test_weights_that_are_too_large_are_named(tmp_path, windows):
    (plain := tmp_path / "plain").mkdir()
    tiny.write(plain)
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e37
    save_file(tensors, plain / "model.safetensors")
    model = open_model(str(plain), EngineConfig())
    folder = Folder(tmp_path / "out", model.source, smooth_quant.in_config(model.cfg, "int8"))
    with pytest.raises(ValueError, match=r"layer 1, ffn\.gate_up: weights of .*e\+\d\d are too large"):
        smooth_quant.quantize(model, windows, folder, "int8")


def test_factors():
    most, weight = np.array([8.0, 0.5, 0.0], np.float32), np.array([[0.5, -2], [0.5, 0.1], [1, 1]], np.float32)
    np.testing.assert_allclose(smooth_quant.factors(most, weight), [2, 1, 1])
    np.testing.assert_allclose(smooth_quant.factors(most, weight, 1.0), [8, 0.5, 1])
    np.testing.assert_allclose(smooth_quant.factors(most, weight, 0.0), [0.5, 2, 1])


def test_outliers_cost_less():
    """What the method is for: one input a hundred times the others'."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((200, 64)).astype(np.float32)
    x[:, 7] *= 100
    weight = draw.standard_normal((64, 32)).astype(np.float32)
    by = smooth_quant.factors(np.abs(x).max(0), weight)

    def error(x, weight):
        q, scale = smooth_quant.rounded(weight, "int8")
        each = np.abs(x).max(1, keepdims=True) / 127
        return float(jnp.linalg.norm((np.rint(x / each) * each) @ (q * scale) - x @ weight))

    assert error(x / by, weight * by[:, None]) < 0.3 * error(x, weight)


def test_a_mixture_of_experts_is_refused(tmp_path):
    tiny_checkpoint.write(tmp_path, tiny_checkpoint.config("Qwen3MoeForCausalLM"))
    cfg = open_model(str(tmp_path), EngineConfig()).cfg
    for refuse in (lambda: smooth_quant.in_config(cfg, "int8"), lambda: gptq_folder.group_of(cfg)):
        with pytest.raises(ValueError, match="only `jaxserve lite auto_awq` takes it"):
            refuse()
