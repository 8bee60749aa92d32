"""Folders whose linear maps are tensors of int8 or fp8 with scales beside them, as one kind of Checkpoint.

A map X is seen in two ways, always [out, in]: `X.weight`, its values, and, where its scales suit (then `packed` has X),
`X.bytes` int8 or float8_e4m3fn, `X.scale` [out, in/group], `X.zero` int16 of the same shape where there are zeros, and
`X.input_scale` [] where the scale of activations is known beforehand.  A value is (byte - zero) * scale.
"""

import logging
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.schemes import Packed

log = logging.getLogger("jaxserve")
ELEMENTS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
SCALES = ("weight_scale_inv", "weight_scale", "scale")  # each multiplies, whatever its name says
INPUT_SCALES = ("input_scale", "activation_scale")
ZERO = "weight_zero_point"


class Stored(NamedTuple):
    """A map."""

    shape: tuple[int, int]  # [out, in]
    group: int
    rows: int  # outputs that share a scale
    scale: str  # name of the tensor
    inputs: str | None  # name of the tensor with the scale of activations


class EightBitFolder:
    """A Checkpoint (see the package's docstring) of another one whose maps have elements of 8 bits."""

    def __init__(self, source, scheme):
        self.source, self.scheme, self.path, self.config = source, scheme, source.path, source.config
        self.method, self.element = scheme.method, ELEMENTS[scheme.kind]
        self.generation_config, self.tokenizer_data = source.generation_config, source.tokenizer_data
        self._maps, self.packed, odd = {}, {}, []
        for tensor in sorted(source.names):
            name = tensor.removesuffix(".weight")
            if name == tensor or source.dtype(tensor) != self.element or len(source.shape(tensor)) != 2:
                continue
            self._maps[name] = stored = self._inspect(name)
            if stored.shape[1] % stored.group:
                odd.append(name)
                continue
            zero = f"{name}.{ZERO}" in source.names and not scheme.symmetric
            self.packed[name] = Packed(
                scheme.kind, stored.group, str(self._scale_dtype(stored)), zero, False, scheme.activations
            )
        if not self._maps:
            kind = self.element.name
            raise CheckpointError(f"{self.path}: {self.method} weights are announced, and no tensor *.weight is {kind}")
        if odd:
            log.warning("%s: %d of its maps have blocks that do not divide the inputs; they are held as values",
                        self.path, len(odd))  # fmt: skip
        beside = {f"{name}.{part}" for name in self._maps for part in (*SCALES, *INPUT_SCALES, ZERO)}
        self.names = source.names - beside

    def _inspect(self, name):
        """A map as Stored, its scales checked."""
        source, scheme = self.source, self.scheme
        out, inputs = shape = tuple(source.shape(f"{name}.weight"))
        if 0 in shape:
            raise CheckpointError(f"{self.path}: tensor {name}.weight is empty, {list(shape)}; get it again")
        scale = next((f"{name}.{part}" for part in SCALES if f"{name}.{part}" in source.names), None)
        if scale is None:
            raise CheckpointError(f"{self.path}: tensor {name}.weight_scale is missing")
        found = tuple(source.shape(scale))
        group, rows = inputs if scheme.group == -1 else min(scheme.group, inputs), scheme.rows
        if np.prod(found, dtype=int) == 1:
            group, rows = inputs, out
        elif scheme.group == -1:
            group, rows = inputs, 1
        want = (-(-out // rows), -(-inputs // group))
        if np.prod(found, dtype=int) != np.prod(want) or (len(found) == 2 and found != want):
            raise CheckpointError(f"{self.path}: tensor {scale} has shape {list(found)}; {list(want)} was expected")
        if source.dtype(scale).kind in "biu":
            raise CheckpointError(f"{self.path}: tensor {scale} is {source.dtype(scale)}, which no scale is")
        zero = f"{name}.{ZERO}"
        if zero in source.names and not scheme.symmetric and np.prod(source.shape(zero), dtype=int) != np.prod(want):
            raise CheckpointError(
                f"{self.path}: tensor {zero} has shape {list(source.shape(zero))}; {list(want)} was expected"
            )
        known = next((f"{name}.{part}" for part in INPUT_SCALES if f"{name}.{part}" in source.names), None)
        if scheme.activations == "static" and known is None:
            raise CheckpointError(f"{self.path}: tensor {name}.input_scale is missing")
        if known and np.prod(source.shape(known), dtype=int) != 1:
            many = list(source.shape(known))
            raise CheckpointError(f"{self.path}: tensor {known} has shape {many}; one number was expected")
        return Stored(shape, group, rows, scale, known)

    def _scale_dtype(self, stored):
        found = self.source.dtype(stored.scale)
        return found if found.itemsize > 1 else np.dtype(np.float32)  # powers of two, in one byte

    def shape(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.shape(name)
        (out, inputs), group = self._maps[of][:2]
        if part == "input_scale":
            return ()
        return (out, inputs) if part in ("weight", "bytes") else (out, -(-inputs // group))

    def dtype(self, name):
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.dtype(name)
        own = {"bytes": self.element, "zero": np.dtype(np.int16), "input_scale": np.dtype(np.float32)}
        return own[part] if part in own else self._scale_dtype(self._maps[of])

    def read(self, name, index=None):
        """A tensor, or the slice `index` of it, as a new array."""
        of, _, part = name.rpartition(".")
        if of not in self._maps or part == "bias":
            return self.source.read(name, index)
        stored = self._maps[of]
        if part == "input_scale":
            return self.source.read(stored.inputs).astype(np.float32).reshape(())
        rows, columns = (slice(*s.indices(n)) for s, n in zip(index or (slice(None),) * 2, self.shape(name)))
        if part == "bytes":
            return self.source.read(f"{of}.weight", (rows, columns))
        if part in ("scale", "zero"):
            tensor = stored.scale if part == "scale" else f"{of}.{ZERO}"
            return np.ascontiguousarray(self._beside(tensor, stored, rows, columns).astype(self.dtype(name)))
        return self._weight(of, stored, rows, columns)

    def _beside(self, tensor, stored, rows, columns):
        """Scales or zeros of some outputs and groups."""
        (out, inputs), group, each = stored[:3]
        whole = self.source.read(tensor).reshape(-(-out // each), -(-inputs // group))
        return whole[np.arange(rows.start, rows.stop) // each][:, columns]

    def _weight(self, name, stored, rows, columns):
        """Values, in the type of the scales."""
        of = np.arange(columns.start, columns.stop) // stored.group
        every, values = slice(None), self.source.read(f"{name}.weight", (rows, columns)).astype(np.float32)
        if self.packed.get(name, Packed("", 0, "")).zero:
            values -= self._beside(f"{name}.{ZERO}", stored, rows, every)[:, of]
        scale = self._beside(stored.scale, stored, rows, every)[:, of]
        return (values * scale.astype(np.float32)).astype(self._scale_dtype(stored))

    def close(self):
        self.source.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
