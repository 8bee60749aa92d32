"""The head of a GGUF file: its metadata and where each tensor is.  Knows no model.

The gguf package has a reader too; it makes an array of every string (2 s for a vocabulary of 49152) and trusts the
file.  Here every count and offset is checked against the length of the file before anything is allocated.
Format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.mapped import MappedFile

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


class Stored(NamedTuple):
    """A tensor as the file holds it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]  # slowest axis first, as in numpy (GGUF writes it last)
    offset: int  # bytes from the start of the file
    size: int  # bytes


class Head(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


class _Cursor:
    """Reads forward; running over the end of the file is a CheckpointError that says what was being read."""

    def __init__(self, file: MappedFile):
        self.path, self.buffer, self.size = file.path, file.buffer, file.size
        self.at = 0
        self.what = "the header"

    def skip(self, size: int) -> int:
        """Moves past `size` bytes that the file must have; returns where they start."""
        start = self.at
        if size > self.size - start:
            raise CheckpointError(f"{self.path}: truncated or corrupt: {self.what} goes past the end of the file")
        self.at = start + size
        return start

    def number(self, code: str):
        return struct.unpack_from("<" + code, self.buffer, self.skip(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        size = self.number("Q")
        # a vocabulary may hold broken UTF-8; escapes keep its tokens apart
        return self.buffer[(start := self.skip(size)) : start + size].decode("utf-8", "backslashreplace")

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == STRING:
                self._room(count, 8)
                return [self.text() for _ in range(count)]
            if kind in SCALARS:
                start = self.skip(count * struct.calcsize("<" + SCALARS[kind]))
                return np.frombuffer(self.buffer, np.dtype("<" + SCALARS[kind]), count, start).tolist() if count else []
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path}: corrupt: {self.what} has the unknown type {kind}")
        value = self.number(SCALARS[kind])
        return float(str(np.float32(value))) if kind == FLOAT32 else value  # 1e-05, not 9.999999747378752e-06

    def _room(self, count: int, least: int) -> None:
        """CheckpointError unless `count` things of `least` bytes can follow."""
        start = self.skip(count * least)
        self.at = start


def read_head(file: MappedFile) -> Head:
    """Metadata and tensor table of a GGUF file; CheckpointError names what is wrong with it."""
    cursor = _Cursor(file)
    if file.size < 24 or cursor.number("I") != 0x46554747:
        raise CheckpointError(f"{file.path}: not a GGUF file (it does not start with GGUF)")
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{file.path}: GGUF version {version}; 2 and 3, little-endian, are read")
    tensor_count, pair_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for i in range(pair_count):
        cursor.what = f"metadata entry {i} of {pair_count}"
        key = cursor.text()
        cursor.what = f"metadata {key[:80]}"
        if key in metadata:
            raise CheckpointError(f"{file.path}: corrupt: {cursor.what} appears twice")
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{file.path}: one of {metadata['split.count']} parts of a split model; "
            "join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
        )
    infos = [_tensor_info(cursor, i, tensor_count) for i in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise CheckpointError(f"{file.path}: corrupt: general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Stored] = {}
    for info in infos:
        if info.name in tensors:
            raise CheckpointError(f"{file.path}: corrupt: tensor {info.name} appears twice")
        tensors[info.name] = stored = info._replace(offset=start + info.offset)
        if (over := stored.offset + stored.size - file.size) > 0:
            raise CheckpointError(
                f"{file.path}: truncated: tensor {info.name} ends {over} bytes after the end of the file; "
                "download it again"
            )
    return Head(metadata, tensors)


def _tensor_info(cursor: _Cursor, i: int, count: int) -> Stored:
    """One row of the tensor table; its offset still counts from the start of the data."""
    cursor.what = f"tensor {i} of {count}"
    name = cursor.text()
    cursor.what = f"tensor {name[:80]}"
    if not 1 <= (axes := cursor.number("I")) <= 4:
        raise CheckpointError(f"{cursor.path}: corrupt: {cursor.what} has {axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{cursor.path}: {cursor.what} has the unknown type {kind}") from None
    if kind.name not in READABLE:
        raise CheckpointError(f"{cursor.path}: {cursor.what} is {kind.name}; jaxserve reads {', '.join(READABLE)}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise CheckpointError(f"{cursor.path}: corrupt: {cursor.what}, {list(shape)}, has no whole blocks of {block}")
    return Stored(name, kind, shape, offset, math.prod(shape) // block * block_bytes)


def open_head(path: Path) -> tuple[MappedFile, Head]:
    """Maps a GGUF file and reads its head; the mapping is closed again when the head is bad."""
    file = MappedFile(path)
    try:
        return file, read_head(file)
    except CheckpointError:
        file.close()
        raise
