"""Folders whose linear maps are packed integers: AWQ, GPTQ and compressed-tensors, as one kind of Checkpoint.

A packed map X is seen in two ways, always [out, in]: `X.weight`, its values, and, where 4 bits with a scale and a zero
for every group of neighbouring inputs say all (then `int4` has X), `X.nibbles` uint8 of 0 to 15, `X.scale`
[out, in/group] and `X.zero` uint8 [out, in/group].  A value is (nibble - zero) * scale.
"""

import logging
from typing import NamedTuple

import numpy as np

from jaxserve.checkpoint import CheckpointError, read_json

log = logging.getLogger("jaxserve")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 each of its 8 columns is: stored are 0, 2, 4, 6, 1, 3, 5, 7
OLD_FILES = {"quant_config.json": "awq", "quantize_config.json": "gptq"}  # before config.json had an entry for it
UNSUPPORTED = "which jaxserve does not read; take an AWQ, a GPTQ or the unquantized version of the model"


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


class Scheme(NamedTuple):
    """What quantization_config says."""

    method: str
    bits: int
    group: int  # inputs that share a scale; -1: all
    symmetric: bool
    zero_offset: int  # what is added to a stored zero


class Int4(NamedTuple):
    """A map that may stay packed."""

    group: int
    dtype: np.dtype  # of its scales


def unpacked(source):
    """`source`, or a view of it that hides how its maps are packed.  CheckpointError for formats that are not read."""
    found = source.config.get("quantization_config") or source.config.get("compression_config")
    if not found:
        for name, method in OLD_FILES.items():
            if (source.path / name).exists() and any(tensor.endswith(".qweight") for tensor in source.names):
                found = {"quant_method": method} | read_json(source.path / name)
    return QuantizedFolder(source, scheme(source.path, found)) if found else source


def scheme(path, found):
    """A Scheme from quantization_config; CheckpointError, with what was found, where it is not one that is read."""
    method = str(found.get("quant_method", "") if isinstance(found, dict) else found)
    if method not in LAYOUTS:
        raise CheckpointError(f"{path}: its weights are quantized ({method or 'an unnamed method'}), {UNSUPPORTED}")
    if method == "compressed-tensors":
        out = _compressed(path, found)
    else:
        bits, group = (found.get(a, found.get(b)) for a, b in (("bits", "w_bit"), ("group_size", "q_group_size")))
        version = str(found.get("version") or "gemm").lower()
        if method == "awq" and version != "gemm":
            raise CheckpointError(f"{path}: AWQ weights in the layout {version!r}, {UNSUPPORTED}")
        offset = int(method == "gptq" and found.get("checkpoint_format") != "gptq_v2")
        out = Scheme(method, bits, 128 if group is None else group, bool(found.get("sym")), offset)
    if out.bits not in ((4,) if method == "awq" else (4, 8)):
        raise CheckpointError(f"{path}: {method} weights of {out.bits} bits, {UNSUPPORTED}")
    if type(out.group) is not int or (out.group < 1 and out.group != -1):
        raise CheckpointError(f"{path}: {method} weights in groups of {out.group!r}")
    return out


def _compressed(path, found):
    groups = [g for g in (found.get("config_groups") or {}).values() if isinstance(g, dict)]
    weights = [g.get("weights") for g in groups if isinstance(g.get("weights"), dict)]
    kind = found.get("format")
    if kind != "pack-quantized" or len(weights) != 1 or len(groups) != 1 or groups[0].get("input_activations"):
        raise CheckpointError(
            f"{path}: compressed-tensors of format {kind!r} with {len(groups)} groups of layers, {UNSUPPORTED}"
        )
    w = weights[0]
    strategy = w.get("strategy") or ("group" if w.get("group_size") else "channel")
    if w.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise CheckpointError(f"{path}: compressed-tensors of type {w.get('type')!r} by {strategy}, {UNSUPPORTED}")
    group = w.get("group_size") if strategy == "group" else -1
    return Scheme("compressed-tensors", w.get("num_bits"), group, bool(w.get("symmetric", True)), 0)


class QuantizedFolder:
    """A Checkpoint (see the package's docstring) of another one whose maps are packed."""

    def __init__(self, source, scheme):
        self.source, self.scheme, self.layout = source, scheme, LAYOUTS[scheme.method]
        self.path, self.config, self.method = source.path, source.config, scheme.method
        self.generation_config, self.tokenizer_data = source.generation_config, source.tokenizer_data
        end = f".{self.layout.values}"
        self._maps = {name.removesuffix(end): None for name in sorted(source.names) if name.endswith(end)}
        if not self._maps:
            raise CheckpointError(f"{self.path}: {self.method} weights are announced, and no tensor is called *{end}")
        self.int4, irregular = {}, 0
        for name in self._maps:
            groups = self._inspect(name)
            irregular += groups is not None
            if scheme.bits == 4 and groups is None:
                stored = self._maps[name]
                self.int4[name] = Int4(stored.group, source.dtype(f"{name}.{self.layout.scales}"))
        if len(self.int4) < len(self._maps):
            why = f"{scheme.bits} bits" if scheme.bits != 4 else "groups that are not neighbours (desc_act, actorder)"
            count = irregular if scheme.bits == 4 else len(self._maps)
            log.warning("%s: %d of its maps have %s; they are held unpacked", self.path, count, why)
        parts = {f"{name}.{part}" for name in self._maps for part in (*self.layout[:4], "weight_shape")}
        self.names = (source.names - parts) | {f"{name}.weight" for name in self._maps}

    def _inspect(self, name):
        """Checks a map's tensors and notes its shape; the group of each input, where they are not neighbours."""
        source, layout, scheme = self.source, self.layout, self.scheme
        values, scales, _, inputs = (f"{name}.{part}" for part in layout[:4])
        stored = list(source.shape(values))
        if len(stored) != 2 or source.dtype(values) != np.int32:
            raise CheckpointError(f"{self.path}: tensor {values} is {source.dtype(values)} {stored}, not int32 [., .]")
        stored[layout.values_axis] *= 32 // scheme.bits
        shape = tuple(stored[::-1] if layout.transposed else stored)
        if f"{name}.weight_shape" in source.names:
            shape = tuple(int(n) for n in source.read(f"{name}.weight_shape"))
        group = shape[1] if scheme.group == -1 else scheme.group
        if shape[1] % group:
            fits = next(n for n in range(group, 0, -1) if shape[1] % n == 0)
            raise CheckpointError(
                f"{self.path}: tensor {values} has {shape[1]} inputs, which groups of {group} do not divide; "
                f"the largest that do are groups of {fits}"
            )
        want = (shape[0], shape[1] // group)
        found = source.shape(scales)
        if tuple(found[::-1] if layout.transposed else found) != want:
            raise CheckpointError(f"{self.path}: tensor {scales} has shape {list(found)}; {list(want)} were expected")
        self._maps[name] = Stored(shape, group)
        if inputs not in source.names:
            return None
        groups = source.read(inputs)
        if (groups == np.arange(shape[1]) // group).all():
            return None
        self._maps[name] = Stored(shape, group, groups)
        return groups

    def shape(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.shape(name)
        shape, group, _ = self._maps[of]
        return shape if part in ("weight", "nibbles") else (shape[0], shape[1] // group)

    def dtype(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.dtype(name)
        scales = self.source.dtype(f"{of}.{self.layout.scales}")
        return scales if part in ("weight", "scale") else np.dtype(np.uint8)

    def read(self, name, index=None):
        """A tensor, or the slice `index` of it, as a new array."""
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.read(name, index)
        rows, columns = (range(*s.indices(n)) for s, n in zip(index or (slice(None),) * 2, self.shape(name)))
        take = {"weight": self._weight, "nibbles": self._values, "scale": self._scale, "zero": self._zero}[part]
        return np.ascontiguousarray(take(of, (rows.start, rows.stop), (columns.start, columns.stop)))

    def _values(self, name, rows, columns):
        layout = self.layout
        return self._spread(f"{name}.{layout.values}", layout.values_axis, rows, columns)

    def _zero(self, name, rows, columns):
        """Zeros uint8; those of GPTQ may be one more than the bits hold."""
        tensor = f"{name}.{self.layout.zeros}"
        if tensor not in self.source.names:
            if not self.scheme.symmetric:
                raise CheckpointError(f"{self.path}: tensor {tensor} is missing")
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
        shape, group, groups = self._maps[name]
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
