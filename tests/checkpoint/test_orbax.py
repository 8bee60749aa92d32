import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxserve import checkpoint
from jaxserve._version import __version__
from jaxserve.checkpoint import CheckpointError, orbax


def mesh(tp):
    return Mesh(np.array(jax.devices()[:tp]), ("tp",))


def params(tp):
    """A tree with what the engine's has: tuples, dicts, dtypes, a tied head."""
    rng = np.random.default_rng(0)

    def put(shape, spec, dtype):
        values = (rng.standard_normal(shape) * 8).astype(jnp.dtype(dtype))
        return jax.device_put(values, NamedSharding(mesh(tp), PartitionSpec(*spec)))

    embed = put((12, 8), ("tp", None), "bfloat16")
    layer = {"qkv": put((8, 4, 3, 2), (None, "tp"), "bfloat16"), "packed": put((4, 8), (None, "tp"), "int32")}
    layer |= {"q8": put((4, 8), (), "int8"), "f8": put((4, 8), (), "float8_e4m3fn"), "norm": put((8,), (), "float32")}
    return {"embed": embed, "layers": (layer, layer["norm"]), "head": {"embed": embed}}


def like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source"
    path.mkdir()
    save_file({"x": np.zeros(2, np.float32)}, path / "model.safetensors")
    files = {"config.json": '{"vocab_size": 12}', "generation_config.json": '{"top_k": 5}', "tokenizer.json": "{}"}
    files |= {"chat_template.jinja": "{{ x }}", "merges.txt": "", "model.safetensors.index.json": "{}"}
    files |= {"modeling.py": "", "README.md": ""}
    for name, text in files.items():
        (path / name).write_text(text)
    with checkpoint.open(path) as found:
        yield found


@pytest.fixture
def saved(tmp_path, source, monkeypatch):
    monkeypatch.setattr(orbax, "PART", 200)  # several parts
    seen = []
    orbax.save(params(2), {"tp": 2, "dtype": "bfloat16"}, tmp_path / "out", source, lambda *step: seen.append(step))
    assert len(seen) > 1
    assert seen[-1][0] == seen[-1][1]
    return tmp_path / "out"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_restores_what_was_saved_onto_any_mesh(saved, tp):
    want, found, seen = params(tp), checkpoint.open(saved), []
    got = found.restore(like(want), lambda *step: seen.append(step))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert got["embed"] is got["head"]["embed"]  # once in the file, once in memory
    assert seen[-1][0] == seen[-1][1] > 0


def test_what_goes_along(saved):
    found = checkpoint.open(saved)
    assert found.meta == {"jaxserve": __version__, "tp": 2, "dtype": "bfloat16"}
    assert (found.config, found.generation_config) == ({"vocab_size": 12}, {"top_k": 5})
    assert (found.shape("layers.0.qkv"), found.dtype("head.embed")) == ((8, 4, 3, 2), np.dtype(jnp.bfloat16))
    files = {file.name for file in saved.iterdir() if file.is_file()}
    assert files == {
        "jaxserve.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
    }


def test_nothing_is_overwritten_and_nothing_half_done_stays(saved, source, monkeypatch):
    with pytest.raises(CheckpointError, match="exists already"):
        orbax.save(params(2), {}, saved, source)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(orbax, "_copy_side_files", fail)
    with pytest.raises(OSError, match="disk full"):
        orbax.save(params(2), {}, saved.parent / "other", source)
    assert {file.name for file in saved.parent.iterdir()} == {"out", "source"}


def test_where_nothing_can_be_written(source, tmp_path, monkeypatch):
    weights = {"weight": jnp.ones((512, 1024))}
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/x: nothing can be written in .*file \\("):
        orbax.save(weights, {}, tmp_path / "file" / "x", source)
    monkeypatch.setattr(orbax.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(CheckpointError, match="new: the weights take 2 MiB, and 1 MiB are free there"):
        orbax.save(weights, {}, tmp_path / "new", source)
    assert {file.name for file in tmp_path.iterdir()} == {"file", "source"}


def test_a_model_that_differs(saved):
    found, want = checkpoint.open(saved), like(params(2))
    wider = jax.ShapeDtypeStruct((8, 6, 3, 2), jnp.bfloat16, sharding=want["embed"].sharding)
    with pytest.raises(CheckpointError, match=r"layers.0.qkv is bfloat16\[8, 4, 3, 2\], and bfloat16\[8, 6, 3, 2\]"):
        found.restore(want | {"layers": (want["layers"][0] | {"qkv": wider}, want["layers"][1])})
    other = jax.ShapeDtypeStruct((12, 8), jnp.float32, sharding=want["embed"].sharding)
    with pytest.raises(CheckpointError, match=r"embed is bfloat16.*converted for dtype bfloat16, tp 2; convert"):
        found.restore(want | {"embed": other})
    with pytest.raises(CheckpointError, match="tensor more is missing"):
        found.restore(want | {"more": other})
    del want["head"]
    with pytest.raises(CheckpointError, match=r"array head.embed is not part of this model"):
        found.restore(want)


def test_a_partial_folder(saved):
    files = [file for file in (saved / "weights" / "0").rglob("*") if file.is_file()]
    data = max(files, key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=rf"{data.name}: {len(whole) - 3} bytes instead of {len(whole)}"):
        checkpoint.open(saved)
    data.unlink()
    with pytest.raises(CheckpointError, match=f"{data.name}: the file is missing"):
        checkpoint.open(saved)


def test_damage_inside_a_file(saved):
    found = checkpoint.open(saved)
    for file in (saved / "weights" / "0").rglob("*"):
        if file.is_file():
            file.write_bytes(b"\x00" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="weights/0: not readable"):
        found.restore(like(params(2)))


@pytest.mark.parametrize("change", [{"format": 99}, {"arrays": {"embed": {"shape": 3}}}, {"files": None}, {"meta": 1}])
def test_a_bad_manifest(saved, change):
    manifest = json.loads((saved / "jaxserve.json").read_text())
    (saved / "jaxserve.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=r"jaxserve.json: (format 99|corrupt)"):
        checkpoint.open(saved)
