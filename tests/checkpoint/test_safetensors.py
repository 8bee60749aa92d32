import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from jaxserve import checkpoint
from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.safetensors import DTYPES, INDEX, SafetensorsFolder, write

DTYPE_NAMES = sorted(DTYPES)
MATRIX = np.arange(48, dtype=np.float32).reshape(6, 8)


def folder(path, tensors, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / name)
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return path


def sharded(path):
    folder(path, {"a": MATRIX, "b": MATRIX + 1}, "model-00001-of-00002.safetensors")
    folder(path, {"c": MATRIX + 2}, "model-00002-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": files | {"c": "model-00002-of-00002.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("kind", DTYPE_NAMES)
def test_every_dtype_comes_back_whole_and_in_slices(tmp_path, kind):
    dtype = np.dtype(DTYPES[kind])
    values = (1 + np.arange(48).reshape(6, 8) % 5).astype(dtype)
    with checkpoint.open(folder(tmp_path, {"x": values, "v": values[0].copy()})) as found:
        assert found.names == {"x", "v"}
        assert (found.shape("x"), found.dtype("x")) == ((6, 8), dtype)
        np.testing.assert_array_equal(found.read("x"), values)
        np.testing.assert_array_equal(found.read("x", (slice(1, 4), slice(2, 7))), values[1:4, 2:7])
        np.testing.assert_array_equal(found.read("x", (slice(3, None),)), values[3:])
        np.testing.assert_array_equal(found.read("v", (slice(2, 3),)), values[0, 2:3])
        assert found.read("x", (slice(2, 2),)).shape == (0, 8)


def test_what_is_read_stays_when_the_file_is_closed(tmp_path):
    with checkpoint.open(folder(tmp_path, {"x": MATRIX})) as found:
        values = found.read("x")
    values += 1  # a copy: writable, and not the mapping
    np.testing.assert_array_equal(values, MATRIX + 1)


def test_unaligned_and_empty_tensors(tmp_path):
    tensors = {"a": np.ones(3, np.uint8), "b": MATRIX, "empty": np.zeros((0, 4), np.float32)}
    with checkpoint.open(folder(tmp_path, tensors)) as found:
        np.testing.assert_array_equal(found.read("b"), MATRIX)
        assert found.read("empty").shape == (0, 4)


def test_shards(tmp_path):
    with checkpoint.open(sharded(tmp_path)) as found:
        assert found.names == {"a", "b", "c"}
        for i, name in enumerate("abc"):
            np.testing.assert_array_equal(found.read(name), MATRIX + i)


def test_configs(tmp_path):
    folder(tmp_path, {"x": MATRIX})
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    (tmp_path / "tokenizer_data.json").write_text('{"model": "gpt2"}')
    with checkpoint.open(tmp_path) as found:
        assert found.config == {"architectures": ["LlamaForCausalLM"]}
        assert found.generation_config == {"temperature": 0.6}
        assert found.tokenizer_data == {"model": "gpt2"}
        assert found.path == tmp_path


def test_write_reads_back(tmp_path):
    source = checkpoint.open(folder(tmp_path / "a", {"x": MATRIX, "y": MATRIX.astype(ml_dtypes.bfloat16)}))
    (tmp_path / "b").mkdir()
    write(source, tmp_path / "b")
    with checkpoint.open(tmp_path / "b") as found:
        assert (found.names, found.config) == (source.names, source.config)
        assert found.dtype("y") == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.read("x"), MATRIX)


def test_a_missing_tensor_is_named_with_what_is_near(tmp_path):
    with (
        checkpoint.open(folder(tmp_path, {"model.norm.weight": MATRIX})) as found,
        pytest.raises(CheckpointError, match=r"model.norms.weight is missing \(there is model.norm.weight\)"),
    ):
        found.read("model.norms.weight")


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_truncated_file_is_named(tmp_path, at):
    file = folder(tmp_path, {"first": MATRIX, "second": MATRIX}) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:at])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        checkpoint.open(tmp_path)


def test_a_truncated_file_names_the_tensor(tmp_path):
    file = folder(tmp_path, {"first": MATRIX, "second": MATRIX}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"truncated: tensor second ends 5 bytes after the end"):
        checkpoint.open(tmp_path)


def with_header(file, change):
    """Rewrites a file's header."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: h["x"].update(shape=[6, 9]), "tensor x, F32 .6, 9., takes 216 bytes and not 192"),
        (lambda h: h["x"].update(dtype="F64"), "tensor x, F64"),
        (lambda h: h["x"].update(dtype="F6"), "model.safetensors"),
        (lambda h: h["x"].update(data_offsets=[0, 1 << 60]), "tensor x"),
        (lambda h: h["x"].update(data_offsets=[192, 0]), "model.safetensors"),
        (lambda h: h["x"].update(shape=[-6, -8]), "model.safetensors"),
        (lambda h: h["x"].pop("dtype"), "model.safetensors"),
        (lambda h: b'{"x":' * 100_000, "model.safetensors"),
        (lambda h: b"[]", "model.safetensors"),
        (lambda h: json.dumps(h).encode()[:-1] + b"," + json.dumps(h).encode()[1:], "a name appears twice"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, change, message):
    with_header(folder(tmp_path, {"x": MATRIX}) / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 1 << 31, 1 << 60, (1 << 64) - 1])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    file = folder(tmp_path, {"x": MATRIX}) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        checkpoint.open(tmp_path)


def test_random_bytes_are_refused(tmp_path):
    file = folder(tmp_path, {"x": MATRIX}) / "model.safetensors"
    file.write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        checkpoint.open(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    data = save({"x": np.zeros(4, np.uint8)}).replace(b'"U8"', b'"F4"').replace(b"[4]", b"[8]")
    (folder(tmp_path, {"x": MATRIX}) / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="tensor x has dtype F4"):
        checkpoint.open(tmp_path)


def test_a_missing_shard_is_named_with_its_tensors(tmp_path):
    (sharded(tmp_path) / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: this shard.*holds a and 1 more"):
        checkpoint.open(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    folder(sharded(tmp_path), {"a": MATRIX}, "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors: tensor b is missing"):
        checkpoint.open(tmp_path)


def test_shards_without_an_index(tmp_path):
    (sharded(tmp_path) / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX}: the file is missing"):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_a_bad_index(tmp_path, content):
    (sharded(tmp_path) / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [None, "{", "[1]", "\x00"])
def test_a_bad_config(tmp_path, content):
    file = folder(tmp_path, {"x": MATRIX}) / "config.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(CheckpointError, match=r"config.json"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=f"(?s){name}.*unpickling a file runs whatever code.*save_pretrained"):
            checkpoint.open(path)


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no weights here"):
        checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="nothing exists"):
        checkpoint.open(tmp_path / "x")
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(CheckpointError, match="a model is a GGUF file, or the folder"):
        checkpoint.open(tmp_path / "notes.md")


def test_reading_gives_its_memory_back(tmp_path):
    """The process does not grow with the file (Linux counts mapped pages as its own until they are released)."""
    rss = pytest.importorskip("psutil").Process().memory_info
    size = 64 << 20
    with checkpoint.open(folder(tmp_path, {"x": np.ones((size // 4096, 1024), np.float32)})) as found:
        before = rss().rss
        for row in range(0, size // 4096, 512):
            found.read("x", (slice(row, row + 512),))
        assert rss().rss - before < size / 4
