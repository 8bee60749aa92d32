"""The folder of a quantized model: all or nothing, in shards or not, with what other engines need beside weights."""

import errno
import json
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jaxserve import checkpoint
from jaxserve.checkpoint.safetensors import INDEX, SafetensorsFolder
from jaxserve.lite import folder as folders
from jaxserve.lite.folder import Folder
from jaxserve.text.tokenizer import Tokenizer
from tests.serve import tiny

NAME = "model.layers.{}.mlp.down_proj"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny.write(tmp_path_factory.mktemp("model"))
    (path / "modeling_tiny.py").write_text("raise SystemExit")
    return path


@pytest.fixture
def source(model):
    with SafetensorsFolder(model) as source:
        yield source


def packed(layer):
    """Stored tensors of one map of a layer [96, 64], and its norm."""
    name = NAME.format(layer)
    words = np.random.default_rng(layer).integers(-(2**31), 2**31, (96, 8)).astype(np.int32)
    return {
        f"{name}.qweight": words,
        f"{name}.qzeros": words[:3],
        f"{name}.scales": np.full((3, 64), 0.1, np.float16),
        f"model.layers.{layer}.input_layernorm.weight": np.full(64, 1 + layer, np.float32),
    }


def filled(path, source, **settings):
    made = Folder(path, source, CONFIG, settings)
    for layer in (0, 1):
        made.write(layer, packed(layer), {"error": layer})
    return made


def stored(path):
    out = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            out |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return out


def test_nothing_is_there_before_all_is(tmp_path, source):
    made = filled(tmp_path / "out", source)
    assert not (tmp_path / "out").exists() and made.done(1) and not made.done(2)
    assert made.about(1) == {"error": 1}
    assert made.finish() == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "generation_config.json",
    } == {path.name for path in (tmp_path / "out").iterdir()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == CONFIG
    assert config["torch_dtype"] == "float16" and "dtype" not in config
    with pytest.raises(ValueError, match="exists already"):
        Folder(tmp_path / "out", source, CONFIG)


def test_tensors_are_those_written_and_the_rest(tmp_path, source):
    tensors = stored(filled(tmp_path / "out", source).finish("bfloat16"))
    gone = {f"{NAME.format(layer)}.weight" for layer in (0, 1)}
    assert set(tensors) == (source.names - gone) | set(packed(0)) | set(packed(1))
    for name, array in (packed(0) | packed(1)).items():
        np.testing.assert_array_equal(tensors[name], array.astype(tensors[name].dtype))
        assert tensors[name].dtype == ("bfloat16" if "norm" in name else array.dtype)
    np.testing.assert_array_equal(
        tensors["model.norm.weight"], source.read("model.norm.weight").astype(tensors["model.norm.weight"].dtype)
    )


def test_shards_hold_the_same(tmp_path, source, monkeypatch):
    whole = stored(filled(tmp_path / "whole", source).finish())
    monkeypatch.setattr(folders, "SHARD", 20000)
    path = filled(tmp_path / "shards", source).finish()
    places = json.loads((path / INDEX).read_text())["weight_map"]
    assert len(set(places.values())) > 3 and set(places) == set(whole)
    with SafetensorsFolder(path) as read:
        for name, array in whole.items():
            np.testing.assert_array_equal(read.read(name), array)


def test_a_run_goes_on_only_with_the_same_settings(tmp_path, source):
    filled(tmp_path / "out", source, seed=1)
    again = Folder(tmp_path / "out", source, CONFIG, {"seed": 1})
    assert again.resumed and again.done(1)
    np.testing.assert_array_equal(again.read(1)[f"{NAME.format(1)}.qweight"], packed(1)[f"{NAME.format(1)}.qweight"])
    again.close()
    other = Folder(tmp_path / "out", source, CONFIG, {"seed": 2})
    assert not other.resumed and not other.done(0)


def test_one_run_at_a_time(tmp_path, source):
    """A second one would remove what the first has done, and then find layers of the first among its own."""
    made = filled(tmp_path / "out", source, seed=1)
    for seed in (1, 2):
        with pytest.raises(ValueError, match="out: another run is writing it; wait for it, or give another --work-dir"):
            Folder(tmp_path / "out", source, CONFIG, {"seed": seed})
    made.finish()
    assert set(stored(tmp_path / "out")) >= set(packed(1))


def test_a_link_in_place_of_an_unfinished_run(tmp_path, source, model):
    (tmp_path / ".out.partial").symlink_to(model)
    with pytest.raises(ValueError, match=r"\.out\.partial is a link"):
        Folder(tmp_path / "out", source, CONFIG)
    assert (model / "config.json").exists()


def test_a_damaged_unfinished_run(tmp_path, source):
    made = filled(tmp_path / "out", source)
    (made.partial / "layer-00001.safetensors").write_bytes(b"{")
    for use in (partial(made.read, 1), partial(made.about, 1), made.finish):
        with pytest.raises(ValueError, match=r"layer-00001\.safetensors is damaged .*; remove it, and the same"):
            use()
    (made.partial / "settings.json").write_bytes(b"\xff")
    made.close()
    again = Folder(tmp_path / "out", source, CONFIG)
    assert again.discarded and [file.name for file in again.partial.iterdir()] == ["settings.json"]


def test_a_run_goes_on_only_with_the_same_files(model, tmp_path):
    """Not with half of it made of a model that was at this path before."""
    shutil.copytree(model, tmp_path / "model")
    with SafetensorsFolder(tmp_path / "model") as source:
        filled(tmp_path / "out", source)
        assert Folder(tmp_path / "out", source, CONFIG).resumed
    file = tmp_path / "model" / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with SafetensorsFolder(tmp_path / "model") as source:
        again = Folder(tmp_path / "out", source, CONFIG)
    assert again.discarded and not again.resumed and not again.done(0)


def test_a_text_that_does_not_fit_on_the_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"config\.json could not be written: No space left"):
        folders._write_text(tmp_path / "config.json", "{}")


def test_a_full_disk_leaves_nothing_half_done(tmp_path, source):
    """A limit on the size of a file stands for the disk.  A run can go on after it."""
    made = filled(tmp_path / "out", source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors could not be written"):
            made.finish()
        with pytest.raises(OSError, match=r"could not be written"):
            made.write(2, {"x": np.zeros(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists() and not made.done(2)
    made.finish()
    assert set(stored(tmp_path / "out")) >= set(packed(0))


def test_a_value_that_does_not_fit_is_named(tmp_path, source):
    made = filled(tmp_path / "out", source)
    made.write(1, packed(1) | {"model.layers.1.input_layernorm.weight": np.full(64, 1e5, np.float32)})
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight has values that float16 does not hold"):
        made.finish()
    assert not (tmp_path / "out").exists()


def test_a_gguf_models_tokenizer_becomes_files(tmp_path, source):
    pieces = ["<s>", "</s>", *(chr(c) for c in range(33, 127)), "Ġ", "ab"]
    data = {
        "model": "gpt2", "pre": "default", "tokens": pieces, "scores": [], "merges": ["a b"],
        "token_types": [3, 3] + [1] * (len(pieces) - 2), "bos_id": 0, "eos_id": 1, "unk_id": None, "pad_id": None,
        "stop_ids": [1], "add_bos": True, "add_eos": False, "add_space_prefix": False,
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }  # fmt: skip
    source.tokenizer_data = data
    path = filled(tmp_path / "out", source).finish()
    assert not (path / "tokenizer_data.json").exists()
    with checkpoint.open(path) as read:
        found = Tokenizer.load(read)
    expected = Tokenizer.load(source)
    assert found.encode("ab cab") == expected.encode("ab cab") == [0, *expected.encode("ab cab", bos=False)]
    assert found.chat_template == data["chat_template"]
    assert found.named["eos_token"] == "</s>"
