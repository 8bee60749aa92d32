"""GPTQ folders: read back by our loader, and by a dequantizer that is written here."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxserve import checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from jaxserve.lite import evaluate, gptq_folder
from jaxserve.lite.folder import Folder
from tests import oracle
from tests.serve import tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("plain"), intermediate_size=64)  # few shapes to compile for


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 256, (6, 40), dtype=np.int32)


def made(plain, path, windows, stop=None, **settings):
    """A GPTQ folder of the model; stop: the layer before which the run is killed."""
    settings = gptq_folder.Settings(32, **settings)
    with checkpoint.open(plain) as source:
        folder = Folder(path, source, settings.in_config())
        model = open_model(str(plain), EngineConfig())

        def progress(done, total):
            if done == stop:
                raise KeyboardInterrupt

        gptq_folder.quantize(model, windows, folder, settings, batch=2, progress=progress)
        return folder.finish("float16")


def by_hand(folder):
    """{name: float32} of a folder's tensors, its packed maps as values [out, in]."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, tensors = config["bits"], load_file(folder / "model.safetensors")
    most, values = 2**bits - 1, {}
    for name, array in tensors.items():
        base, _, part = name.rpartition(".")
        if part == "qweight":
            zeros, scales, of = (tensors[f"{base}.{rest}"] for rest in ("qzeros", "scales", "g_idx"))
            inputs, outputs = array.shape[0] * 32 // bits, array.shape[1]
            value = np.zeros((outputs, inputs), np.float32)
            for k in range(inputs):
                for n in range(outputs):
                    q = (int(array[k * bits // 32, n]) >> (k % (32 // bits) * bits)) & most
                    zero = ((int(zeros[of[k], n * bits // 32]) >> (n % (32 // bits) * bits)) & most) + 1
                    value[n, k] = (q - zero) * np.float32(scales[of[k], n])
            values[f"{base}.weight"] = value
        elif part not in ("qzeros", "scales", "g_idx"):
            values[name] = array.astype(np.float32)
    return values


KINDS = [
    {},
    {"symmetric": False, "desc_act": True},
    {"bits": 8},
]


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_read_back(plain, windows, tmp_path, settings):
    folder = made(plain, tmp_path / "out", windows, **settings)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq" and config["group_size"] == 32
    assert config["sym"] is settings.get("symmetric", True) and config["desc_act"] is settings.get("desc_act", False)
    values = by_hand(folder)
    original = load_file(plain / "model.safetensors")
    assert values.keys() == original.keys()
    with checkpoint.open(folder) as source:
        for name, value in values.items():
            np.testing.assert_allclose(source.read(name).astype(np.float32), value, rtol=1e-3, atol=1e-6)
            most = 0.02 if settings.get("bits") == 8 else 0.15
            assert np.linalg.norm(value - original[name]) <= most * np.linalg.norm(original[name]), name
    scored = evaluate.score(folder, EngineConfig(dtype="float32"), windows[:2])[0] if not settings else None
    if scored is not None:
        hf = json.loads((folder / "config.json").read_text())
        for row, window in zip(scored, windows[:2]):
            logits = oracle.logits(values, hf, window)[:-1]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(row, -logprobs[np.arange(39), window[1:]], atol=1e-2)


def test_a_killed_run_goes_on(plain, windows, tmp_path):
    whole = made(plain, tmp_path / "whole", windows, symmetric=False)
    with pytest.raises(KeyboardInterrupt):
        made(plain, tmp_path / "killed", windows, stop=1, symmetric=False)
    assert not (tmp_path / "killed").exists()
    resumed = made(plain, tmp_path / "killed", windows, symmetric=False)
    for name, array in load_file(whole / "model.safetensors").items():
        np.testing.assert_array_equal(array, load_file(resumed / "model.safetensors")[name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_words(bits, axis):
    values = np.random.default_rng(1).integers(0, 2**bits, (16, 24)).astype(np.uint8)
    stored = gptq_folder.words(values, axis, bits)
    assert stored.dtype == np.int32 and stored.shape[axis] == values.shape[axis] * bits // 32
    np.testing.assert_array_equal(gptq_folder.unworded(stored, axis, bits), values)


def test_groups(plain):
    with checkpoint.open(plain) as source:
        from jaxserve.models.config import from_hf

        cfg = from_hf(source.config)
    assert gptq_folder.group_of(cfg) == 64 and gptq_folder.group_of(cfg, 32) == 32
    with pytest.raises(ValueError, match=r"groups of 128 do not divide the maps' inputs \(64\).* 64 is the largest"):
        gptq_folder.group_of(cfg, 128)
