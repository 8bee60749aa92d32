"""Folders whose linear maps share int32s: AWQ, GPTQ and compressed-tensors, as one kind of Checkpoint.

A map X is seen in two ways, always [out, in]: `X.weight`, its values, and, where a scale and a zero for every group of
inputs say all (then `packed` has X), `X.nibbles` uint8 of 0 to 15, `X.scale` [out, in/group] and `X.zero` uint8
[out, in/group].  A value is (nibble - zero) * scale.  `X.words` are the nibbles as stored, eight in an int32 (see
`packing`).  With 8 bits it is `X.bytes` int8, and zeros are int16.  Where groups are not of neighbours (GPTQ's
desc_act), `X.order` int32 [in] is the order of inputs in which they are, which nibbles and bytes have.  `eight_bit` is
the same for folders whose elements are int8 or fp8 tensors.
"""

import logging
from typing import NamedTuple

import numpy as np

from jaxserve.checkpoint import CheckpointError, missing, read_json
from jaxserve.checkpoint.eight_bit import SCALES, EightBitFolder
from jaxserve.checkpoint.schemes import Packed, scheme

log = logging.getLogger("jaxserve")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 each of its 8 columns is: stored are 0, 2, 4, 6, 1, 3, 5, 7
OLD_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}  # before config.json had an entry for it
FLOATS = ("float16", "bfloat16", "float32")


class Layout(NamedTuple):
    """Where a format keeps what.  Axes count in the stored order."""

    values: str  # names of the tensors, after that of the map
    scales: str
    zeros: str
    inputs: str  # which group an input has, where groups are not neighbours
    transposed: bool  # stored [in, out]
    values_axis: int  # along which values share an int32
    zeros_axis: int
    order: tuple[int, ...] | None  # place of each value in its int32


LAYOUTS = {
    "awq": Layout("qweight", "scales", "qzeros", "g_idx", True, 1, 1, AWQ_ORDER),
    "gptq": Layout("qweight", "scales", "qzeros", "g_idx", True, 0, 1, None),
    "compressed-tensors": Layout(
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", False, 1, 0, None
    ),
}
PACKED = {layout.values for layout in LAYOUTS.values()}


def unpacked(source):
    """`source`, or a view of it that hides how its maps are packed.  CheckpointError for formats that are not read."""
    found = source.config.get("quantization_config") or source.config.get("compression_config")
    if not found:
        for name, method in OLD_FILES.items():
            if (source.path / name).exists() and any(tensor.endswith(".qweight") for tensor in source.names):
                found = {"quant_method": method} | read_json(source.path / name)
    if not found:
        if tensor := _quantized_tensor(source):
            raise CheckpointError(
                f"{source.path}: tensor {tensor} is of quantized weights, and config.json has no quantization_config "
                "that says of what kind; get config.json again, or take the unquantized version of the model"
            )
        return source
    stored = scheme(source.path, found)
    return (QuantizedFolder if stored.packed else EightBitFolder)(source, stored)


def _quantized_tensor(source):
    """The name of a tensor that only quantized weights have; None without one."""
    for name in sorted(source.names):
        of, _, part = name.rpartition(".")
        weight = f"{of}.weight"
        if part in PACKED or (part in SCALES and weight in source.names and source.dtype(weight).itemsize == 1):
            return name
    return None


class QuantizedFolder:
    """A Checkpoint (see the package's docstring) of another one whose maps are packed."""

    def __init__(self, source, scheme):
        self.source, self.scheme, self.layout = source, scheme, LAYOUTS[scheme.method]
        self.path, self.config, self.method = source.path, source.config, scheme.method
        self.generation_config, self.tokenizer_data = source.generation_config, source.tokenizer_data
        end = f".{self.layout.values}"
        maps = [name.removesuffix(end) for name in sorted(source.names) if name.endswith(end)]
        if not maps:
            raise CheckpointError(f"{self.path}: {self.method} weights are announced, and no tensor is called *{end}")
        self._maps, self.packed = {name: self._inspect(name) for name in maps}, {}
        for name, stored in self._maps.items():
            if stored.groups is None or stored.order is not None:
                zero = scheme.bits == 4 or f"{name}.{self.layout.zeros}" in source.names
                scales = str(source.dtype(f"{name}.{self.layout.scales}"))
                self.packed[name] = Packed(scheme.kind, stored.group, scales, zero, stored.order is not None)
        if odd := len(self._maps) - len(self.packed):
            log.warning("%s: %d of its maps have groups of unequal size; they are held as values", self.path, odd)
        parts = {f"{name}.{part}" for name in self._maps for part in (*self.layout[:4], "weight_shape")}
        self.names = (source.names - parts) | {f"{name}.weight" for name in self._maps}

    def _shape_of(self, name):
        """[out, in] of a map, the tensor of its values checked."""
        layout, values, told = self.layout, f"{name}.{self.layout.values}", f"{name}.weight_shape"
        stored, each = list(self.source.shape(values)), 32 // self.scheme.bits
        kind = self.source.dtype(values)
        if len(stored) != 2 or kind != np.int32:
            raise CheckpointError(f"{self.path}: tensor {values} is {kind} {stored}, not int32 [., .]")
        stored[layout.values_axis] *= each
        shape = stored[::-1] if layout.transposed else stored
        if told in self.source.names:
            shape = [int(n) for n in self.source.read(told).reshape(-1)]
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(f"{self.path}: tensor {values} is said to hold a map of shape {shape}")
        words, axis = list(shape), layout.values_axis ^ layout.transposed
        words[axis] = -(-words[axis] // each)
        self._must_be(values, words, ("int32",))
        return tuple(shape)

    def _must_be(self, tensor, shape, kinds):
        """CheckpointError unless a tensor has the shape, given [out, in], and a type of `kinds`."""
        want = list(shape[::-1] if self.layout.transposed else shape)
        found, kind = list(self.source.shape(tensor)), self.source.dtype(tensor).name
        if found != want or kind not in kinds:
            raise CheckpointError(
                f"{self.path}: tensor {tensor} is {kind} {found}; {' or '.join(kinds)} {want} was expected"
            )

    def _inspect(self, name):
        """A map as Stored, its tensors checked."""
        source, layout, scheme, shape = self.source, self.layout, self.scheme, self._shape_of(name)
        values, scales, zeros, inputs = (f"{name}.{part}" for part in layout[:4])
        group = shape[1] if scheme.group == -1 else scheme.group
        if shape[1] % group:
            fits = next(n for n in range(min(group, shape[1]), 0, -1) if shape[1] % n == 0)
            raise CheckpointError(
                f"{self.path}: tensor {values} has {shape[1]} inputs, which groups of {group} do not divide; "
                f"the largest that do are groups of {fits}"
            )
        count = shape[1] // group
        self._must_be(scales, (shape[0], count), FLOATS)
        if not scheme.symmetric or zeros in source.names:
            self._must_be(zeros, (-(-shape[0] * scheme.bits // 32), count), ("int32",))
        if inputs not in source.names:
            if scheme.ordered and count > 1:
                raise missing(self.path, inputs, source.names)
            return Stored(shape, group)
        groups = source.read(inputs)
        if groups.shape != shape[1:] or groups.dtype.kind != "i":
            raise CheckpointError(
                f"{self.path}: tensor {inputs} is {groups.dtype} {list(groups.shape)}; int32 {[shape[1]]} was expected"
            )
        if (groups == np.arange(shape[1]) // group).all() or (groups == -1).all():  # -1: nobody chose others
            return Stored(shape, group)
        if groups.min() < 0 or groups.max() >= count:
            found = f"from {groups.min()} to {groups.max()}, and there are {count}"
            raise CheckpointError(f"{self.path}: tensor {inputs} puts inputs into groups {found}; get it again")
        even = (np.bincount(groups, minlength=count) == group).all()
        return Stored(shape, group, groups, np.argsort(groups, kind="stable").astype(np.int32) if even else None)

    def shape(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.shape(name)
        shape, group = self._maps[of][:2]
        if part == "order":
            return shape[1:]
        if part == "words":
            stored = self.source.shape(f"{of}.{self.layout.values}")
            return stored[::-1] if self.layout.transposed else stored
        return shape if part in ("weight", "nibbles", "bytes") else (shape[0], shape[1] // group)

    def dtype(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.dtype(name)
        scales = self.source.dtype(f"{of}.{self.layout.scales}")
        own = {"nibbles": np.uint8, "words": np.int32, "bytes": np.int8, "order": np.int32}
        own["zero"] = np.uint8 if self.scheme.bits == 4 else np.int16
        return np.dtype(own[part]) if part in own else scales

    def read(self, name, index=None):
        """A tensor, or the slice `index` of it, as a new array."""
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.read(name, index)
        if part == "order":
            return self._maps[of].order[index or ()]
        if part == "words":
            turned = self.layout.transposed
            words = self.source.read(f"{of}.{self.layout.values}", index and (index[::-1] if turned else index))
            return words.T if turned else words
        rows, columns = (range(*s.indices(n)) for s, n in zip(index or (slice(None),) * 2, self.shape(name)))
        take = {"weight": self._weight, "scale": self._scale, "zero": self._held_zero}.get(part, self._elements)
        return np.ascontiguousarray(take(of, (rows.start, rows.stop), (columns.start, columns.stop)))

    def packing(self, name):
        """Which axis of a map [out, in] shares int32s, and the place in these of each of 8 neighbours.

        None where `name.words` is no view of its nibbles: 8 bits, an order of inputs, or int32s that are not full.
        """
        axis, stored = self.layout.values_axis ^ self.layout.transposed, self._maps[name]
        full = self.shape(f"{name}.words")[axis] * 8 == stored.shape[axis]
        if self.scheme.bits != 4 or stored.order is not None or not full:
            return None
        return axis, self.layout.order or tuple(range(8))

    def _values(self, name, rows, columns):
        layout = self.layout
        return self._spread(f"{name}.{layout.values}", layout.values_axis, rows, columns)

    def _elements(self, name, rows, columns):
        """Integers in the order in which groups are neighbours; those of 8 bits around 0."""
        shape, _, _, order = self._maps[name]
        if order is None:
            values = self._values(name, rows, columns)
        else:
            values = self._values(name, rows, (0, shape[1]))[:, order[slice(*columns)]]
        return values if self.scheme.bits == 4 else (values ^ 128).view(np.int8)

    def _held_zero(self, name, rows, columns):
        zero = self._zero(name, rows, columns)
        return zero if self.scheme.bits == 4 else zero.astype(np.int16) - np.int16(128)

    def _zero(self, name, rows, columns):
        """Zeros uint8; those of GPTQ may be one more than the bits hold."""
        tensor = f"{name}.{self.layout.zeros}"
        if tensor not in self.source.names:
            return np.full((rows[1] - rows[0], columns[1] - columns[0]), 1 << (self.scheme.bits - 1), np.uint8)
        stored = self._spread(tensor, self.layout.zeros_axis, rows, columns)
        return stored.astype(np.uint16) + 1 if self._wide else stored + np.uint8(self.scheme.zero_offset)

    @property
    def _wide(self):
        return self.scheme.bits == 8 and self.scheme.zero_offset

    def _scale(self, name, rows, columns):
        index = (slice(*rows), slice(*columns))
        if self.layout.transposed:
            return self.source.read(f"{name}.{self.layout.scales}", index[::-1]).T
        return self.source.read(f"{name}.{self.layout.scales}", index)

    def _weight(self, name, rows, columns):
        """Values, in the type of the scales."""
        shape, group, groups, _ = self._maps[name]
        every = (0, shape[1] // group)
        of = (np.arange(shape[1]) // group if groups is None else groups)[slice(*columns)]
        scale, zero = (take(name, rows, every)[:, of] for take in (self._scale, self._zero))
        values = self._values(name, rows, columns).astype(np.float32)
        return ((values - zero) * scale.astype(np.float32)).astype(scale.dtype)

    def _spread(self, tensor, axis, rows, columns):
        """uint8 [rows, columns] of a tensor whose int32s hold several values along `axis`."""
        bits, layout = self.scheme.bits, self.layout
        each = 32 // bits
        spans = [columns, rows] if layout.transposed else [rows, columns]
        first, last = spans[axis]
        index = [slice(*span) for span in spans]
        index[axis] = slice(first // each, -(-last // each))
        words = self.source.read(tensor, tuple(index)).view(np.uint32)
        places = layout.order or range(each)
        values = np.stack([((words >> (bits * p)) & ((1 << bits) - 1)).astype(np.uint8) for p in places], axis + 1)
        shape = list(words.shape)
        shape[axis] *= each
        cut = [slice(None)] * 2
        cut[axis] = slice(first % each, first % each + last - first)
        values = values.reshape(shape)[tuple(cut)]
        return values.T if layout.transposed else values

    def close(self):
        self.source.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Stored(NamedTuple):
    """A packed map."""

    shape: tuple[int, int]  # [out, in]
    group: int
    groups: np.ndarray | None = None  # of each input, where groups are not neighbours
    order: np.ndarray | None = None  # of inputs in which they are
