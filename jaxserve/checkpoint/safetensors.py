"""Hugging Face folders: config.json beside one safetensors file, or beside shards and their index.

The safetensors library checks each header (sizes, overlaps, holes); the bytes are then read from our own mapping,
because the library's keeps every page that it touched in the process and its numpy side has no float8.
"""

import json
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxserve.checkpoint import CheckpointError, missing, read_json
from jaxserve.checkpoint.mapped import MappedFile

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Tensor(NamedTuple):
    """Where a tensor is."""

    file: MappedFile
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


class SafetensorsFolder:
    """A Checkpoint (see the package's docstring) over *.safetensors."""

    def __init__(self, path: Path):
        """Reads configs and headers, no weights.  CheckpointError names the file and the tensor."""
        self.path = Path(path)
        self.config = read_json(self.path / "config.json")
        self.generation_config = read_json(self.path / "generation_config.json", {})
        self.tokenizer_data = read_json(self.path / "tokenizer_data.json", {}) or None
        self._files: list[MappedFile] = []
        self._tensors = self._find()
        self.names = set(self._tensors)

    def _find(self) -> dict[str, Tensor]:
        shards = _weight_map(self.path)
        if shards is None:
            return self._add(_only_file(self.path))
        tensors = {}
        for shard in sorted(set(shards.values())):
            wanted = [name for name, file in shards.items() if file == shard]
            if not (self.path / shard).exists():
                raise CheckpointError(
                    f"{self.path / shard}: this shard is missing ({INDEX} says that it holds {wanted[0]}"
                    f"{f' and {len(wanted) - 1} more' if wanted[1:] else ''}); download the model again"
                )
            found = self._add(self.path / shard)
            for name in wanted:
                if name not in found:
                    raise CheckpointError(f"{self.path / shard}: tensor {name} is missing, which {INDEX} says is here")
                tensors[name] = found[name]
        return tensors

    def _add(self, path: Path) -> dict[str, Tensor]:
        """Checks one file's header and maps it."""
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {_blame(path)} ({error})") from error
        header, start = _header(path)
        file = MappedFile(path)
        self._files.append(file)
        found = {}
        for name, (kind, shape, first, last) in header.items():
            if kind not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} has dtype {kind}, which jaxserve does not read")
            found[name] = Tensor(file, np.dtype(DTYPES[kind]), shape, start + first, last - first)
        return found

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise missing(self.path, name, self.names)
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensor(name).dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or the slice `index` of it, as a new array."""
        file, dtype, shape, offset, size = self._tensor(name)
        first, rows = 0, 1
        if index and shape and size:  # only these rows are touched
            first, last, _ = index[0].indices(shape[0])
            rows, size = max(0, last - first), size // shape[0]
        with file.reading(offset + first * size, rows * size):
            return np.array(file.view(dtype, shape, offset)[index or ...])

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index of a sharded model, tensor name -> file name; None for a model in one file."""
    if (folder / "model.safetensors").exists() or not (folder / INDEX).exists():
        return None
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / INDEX}: has no weight_map")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: tensor {name} is said to be in {shard!r}, no file of this folder")
    return shards


def _only_file(folder: Path) -> Path:
    if (whole := folder / "model.safetensors").exists():
        return whole
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(f"{folder / INDEX}: the file is missing, and there are {len(found)} *.safetensors files")
    return found[0]


def _once(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):  # the library takes the last one, another reader may take the first
        raise ValueError("a name appears twice in the header")
    return found


def _header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """({name: (dtype, shape, first byte, last byte)}, where the data starts); CheckpointError where it is no header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length + 8 > os.fstat(file.fileno()).st_size:
                raise ValueError("the header ends after the end of the file")
            entries = json.loads(file.read(length), object_pairs_hook=_once)
        entries.pop("__metadata__", None)
        header = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path}: no usable safetensors header: {error}") from error
    return header, length + 8


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a file, of any type in DTYPES; KeyError where the file has no such."""
    header, start = _header(path)
    kind, shape, first, last = header[name]
    dtype = np.dtype(DTYPES[kind])
    return np.fromfile(path, dtype, (last - first) // dtype.itemsize, offset=start + first).reshape(shape)


def _blame(path: Path) -> str:
    """What is wrong with a file that the library refused, with the name of the tensor where one is to blame."""
    try:
        header, start = _header(path)
        room = path.stat().st_size - start
        for name, (kind, shape, first, last) in header.items():
            size = math.prod(shape) * np.dtype(DTYPES[kind]).itemsize if kind in DTYPES else last - first
            if size != last - first:
                return f"corrupt: tensor {name}, {kind} {list(shape)}, takes {size} bytes and not {last - first}"
            if last > room:
                return f"truncated: tensor {name} ends {last - room} bytes after the end of the file; download it again"
    except (CheckpointError, TypeError, ValueError):
        pass
    return "corrupt or no safetensors file; download it again"


def save(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file, all or nothing.  OSError where it cannot be written, such as on a full disk."""
    try:
        save_file(tensors, file, metadata)
    except (OSError, SafetensorError) as error:  # the library has an exception of its own for a full disk
        file.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from None


def write(source, folder: Path) -> None:
    """Writes a checkpoint into the empty `folder`: model.safetensors, config.json and what else `source` knows."""
    tensors = {name: source.read(name) for name in sorted(source.names)}
    save(tensors, folder / "model.safetensors", {"format": "pt"})
    sides = {"config": source.config, "generation_config": source.generation_config}
    for name, value in (sides | {"tokenizer_data": source.tokenizer_data}).items():
        if value:
            (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False), "utf-8")
