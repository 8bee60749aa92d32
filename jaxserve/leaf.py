"""One array of Params: which slices of a checkpoint's tensors it is made of, and where on the mesh it goes.

Checkpoints store a linear map as [out, in]; slices are read in that order, and turned to [in, out] on the device where
a format wants them so.  Axes that the mesh splits are padded with zeros to a multiple of tp: heads (with their query
groups), feed-forward columns and the vocabulary.  The parts of a quantized map are all arranged like its weight.
"""

import math
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import ops
from jaxserve.checkpoint import CheckpointError
from jaxserve.mesh import sharding
from jaxserve.quant.int4 import group_of

# Parts of a quantized map, and what a checkpoint calls them.
PARTS = {
    "packed": "nibbles",
    "bytes": "bytes",
    "scale": "scale",
    "zero": "zero",
    "known": "input_scale",
    "order": "order",
}
COLUMNS = 128  # feed-forward columns of a device are a multiple of this, so that no group of `down` is cut
EXPERT_COLUMNS = 64  # those of an expert, which are few: a padded one costs more than smaller groups


def pad(n, multiple):
    """The smallest multiple that holds n."""
    return -(-n // multiple) * multiple


def padded(cfg, tp):
    """The model as it runs on `tp` devices: kv heads that tp does not divide are padded, with their query groups."""
    kv_heads = pad(cfg.kv_heads, tp)
    return replace(cfg, kv_heads=kv_heads, heads=kv_heads * (cfg.heads // cfg.kv_heads))


def parts_of(how):
    """The parts of a map that stays as `how`, a checkpoint.schemes.Packed, says; None: it is held as values."""
    if how is None:
        return ("weight",)
    parts = ["packed" if how.kind == "int4" else "bytes", "scale"]
    parts += ["zero"] * how.zero + ["known"] * (how.activations == "static") + ["order"] * how.order
    return tuple(parts)


class Leaf:
    """One array of Params: how it is read and where it goes.

    how: a Packed for the parts of a map that stays as the checkpoint has it; quantized: some map of the model does.
    """

    def __init__(self, cfg, mesh, row, layer, part, how=None, quantized=False):
        self.row, self.path, self.part, self.how = row, row.path.format(layer), part, how
        self.sources = [source.format(layer, "{}") for source in row.sources]
        self.experts = cfg.experts if row.arrange in ("experts", "experts_gate_up") else 0
        self.expert_axis = int(self.experts > 0)
        self.heads = (cfg.heads // cfg.kv_heads, cfg.head_dim)  # G, H
        tp = mesh.shape["tp"]
        spec = row.spec if part != "bias" else row.spec[1:]
        columns = row.arrange in ("gate_up", "experts_gate_up") or row.path.endswith("ffn.down")
        least = EXPERT_COLUMNS if self.experts else COLUMNS
        multiple = tp * least if quantized and tp > 1 and columns else tp
        axes = self._input_last(spec)
        shape = [pad(n, multiple) if axis == "tp" else n for n, axis in zip(self._stored(cfg, tp), axes)]
        if how is not None and part != "bias":
            self.axes = self._input_first(axes)  # of the map [D, *out]
            self._choose_group(shape, axes, tp)
            if part in ("order", "known"):
                shape, axes = (shape[-1:], (None,)) if part == "order" else ([], ())
            elif part in ("scale", "zero"):
                shape[-1] //= self.group
        self.raw_shape = tuple(shape)  # as read: the input axis last
        self.raw_where = sharding(mesh, *axes)
        self.packing = None  # of nibbles that are read as the int32s that they share, see `_find_packing`
        if part == "packed":
            self.shape, spec = ops.int4_shape(self._input_first(shape)), ops.int4_axes(self.axes)
        elif part in ("bytes", "order", "known"):
            self.shape, spec = self.raw_shape, axes
        else:
            self.shape, spec = self._input_first(self.raw_shape), self._input_first(axes)
        self.where = sharding(mesh, *spec)

    def _choose_group(self, shape, axes, tp):
        """The group that is held: no device has a part of one."""
        inputs = shape[-1] // (tp if axes[-1] else 1)
        if self.how.kind != "int4":
            whole = self.how.group >= self.row.shapes[0][1]
            self.group = inputs if whole else math.gcd(self.how.group, inputs)
            return
        self.group = group_of(self.how.group, inputs)
        if reason := ops.int4_refuses(inputs, shape[-2] // (tp if axes[-2] else 1), self.group):
            raise ValueError(f"{self.sources[0]}: {reason}")

    def _stored(self, cfg, tp):
        """The shape as read, before padding to a multiple of tp."""
        shapes, arrange = self.row.shapes, self.row.arrange
        out, tail = shapes[0][0], shapes[0][1:] if self.part != "bias" else ()
        groups, width = self.heads
        if arrange in ("qkv", "wqkv"):
            return (pad(cfg.kv_heads, tp), groups + 2, width, *tail)
        if arrange == "gate_up":
            return (2, out, *tail)
        if arrange == "experts_gate_up":
            return (self.experts, 2, out, *tail)
        if arrange == "experts":
            return (self.experts, out, *tail)
        if self.path.endswith("mixer.o") and tail:  # its inputs are the heads, padded ones included
            tail = (padded(cfg, tp).heads * width,)
        return (out, *tail)

    def _turns(self):
        return self.part != "bias" and self.row.arrange is not None

    def _input_last(self, axes):
        if not self._turns():
            return tuple(axes)
        axes = list(axes)
        axes.append(axes.pop(self.expert_axis))
        return tuple(axes)

    def _input_first(self, axes):
        """With the inputs in front; behind the experts where the map is held as values."""
        if not self._turns():
            return tuple(axes)
        axes = list(axes)
        axes.insert(0 if self.how else self.expert_axis, axes.pop())
        return tuple(axes)

    def read(self, checkpoint, index):
        """The slice `index` of the array as read, padding included."""
        shape = self._shape_read()
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape))
        arrange, (groups, width) = self.row.arrange, self.heads
        width = width if self.packing is None or self.packing[0] == -1 else width // 8
        fetch = partial(self._fetch, checkpoint)
        names = self._names()
        if self.part == "known":  # one for all
            found = np.max([checkpoint.read(f"{name}.{PARTS[self.part]}") for name in names])
            if found <= 0:
                what = f"tensor {names[0]}.{PARTS[self.part]} is {found}, and activations are divided by it"
                raise CheckpointError(f"{checkpoint.path}: {what}; get it again")
            return np.asarray(found)
        if self.part == "order":
            return fetch(names[0], index)
        if arrange in ("qkv", "wqkv"):
            first, last = index[0].start, index[0].stop
            sizes = (groups, 1, 1) if arrange == "qkv" else (groups + 2,)
            parts = []
            for source, size in zip(self.sources, sizes):
                rows = fetch(source, (slice(first * size * width, last * size * width), *index[3:]))
                parts.append(rows.reshape(last - first, size, width, *rows.shape[1:]))
            return np.concatenate(_alike(parts), 1) if len(parts) > 1 else parts[0]
        if arrange == "gate_up":
            return np.stack(_alike([fetch(source, index[1:]) for source in self.sources]))
        if arrange == "experts":
            return np.stack(_alike([fetch(name, index[1:]) for name in names]))
        if arrange == "experts_gate_up":
            both = [[fetch(source.format(e), index[2:]) for source in self.sources] for e in range(self.experts)]
            return np.stack(_alike([np.stack(_alike(pair)) for pair in both]))
        return fetch(self.sources[0], index)

    def _fetch(self, checkpoint, source, index):
        """Reads a slice that may reach past the stored tensor; what lies beyond is zero."""
        name = f"{source}.{PARTS.get(self.part, self.part) if self.packing is None else 'words'}"
        if self.part in ("scale", "zero"):
            stored, first, last = checkpoint.packed[source].group, index[-1].start, index[-1].stop
            if stored >= self.row.shapes[0][1] and self.how.kind != "int4":  # one for all inputs
                data = self._fetch_stored(checkpoint, name, (*index[:-1], slice(0, 1)))
                return np.repeat(data, last - first, -1)
            if (times := stored // self.group) > 1:  # groups that are held are smaller
                whole = slice(first // times, -(-last // times))
                data = np.repeat(self._fetch_stored(checkpoint, name, (*index[:-1], whole)), times, -1)
                return data[..., first % times : first % times + last - first]
        return self._fetch_stored(checkpoint, name, index)

    def _fetch_stored(self, checkpoint, name, index):
        stored = checkpoint.shape(name)
        have = tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(index, stored))
        data = checkpoint.read(name, have)
        missing = [(0, (s.stop - s.start) - n) for s, n in zip(index, data.shape)]
        return np.pad(data, missing) if any(after for _, after in missing) else data

    def check(self, checkpoint):
        """CheckpointError when a tensor is missing or has another shape than the config says."""
        for i, source in enumerate(self.sources):
            shape = self.row.shapes[i][: None if self.part != "bias" else 1]
            for name in [source.format(e) for e in range(self.experts or 1)]:
                name = f"{name}.{'weight' if self.part in PARTS else self.part}"
                if name not in checkpoint.names:
                    raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
                if tuple(checkpoint.shape(name)) != tuple(shape):
                    found = f"{checkpoint.path}: tensor {name} has shape {list(checkpoint.shape(name))}"
                    raise CheckpointError(f"{found}; the config asks for {list(shape)}")
                if (kind := checkpoint.dtype(name)).kind in "biu":
                    found = f"{checkpoint.path}: tensor {name} is {kind}"
                    raise CheckpointError(f"{found}, and nothing says how integers become weights; get it again")

    def _names(self):
        return [source.format(e) for source in self.sources for e in range(self.experts or 1)]

    def raw(self, checkpoint):
        """What `load` returns, as a ShapeDtypeStruct."""
        part = "words" if self._find_packing(checkpoint) else PARTS.get(self.part, self.part)
        kind = jnp.result_type(*(checkpoint.dtype(f"{name}.{part}") for name in self._names()))
        return jax.ShapeDtypeStruct(self._shape_read(), kind, sharding=self.raw_where)

    def _find_packing(self, checkpoint):
        """Nibbles are read as they are stored, an eighth of the elements, if every device gets whole int32s; it takes
        them apart then."""
        self.packing = None
        if self.part == "packed" and hasattr(checkpoint, "packing"):
            found = {checkpoint.packing(name) for name in self._names()}
            if len(found) == 1 and (one := found.pop()) is not None:
                axis = one[0] - 2  # from the end
                self.packing = (axis, one[1]) if self.raw_where.shard_shape(self.raw_shape)[axis] % 8 == 0 else None
        return self.packing

    def _shape_read(self):
        shape = list(self.raw_shape)
        if self.packing is not None:
            shape[self.packing[0]] //= 8
        return tuple(shape)

    def load(self, checkpoint):
        """The array on its devices, in the order of the file; devices that hold the same slice share one read."""
        self._find_packing(checkpoint)
        shape, seen = self._shape_read(), {}

        def slice_of(index):
            key = str(index)
            if key not in seen:
                seen[key] = self.read(checkpoint, index)
            return seen[key]

        return jax.make_array_from_callback(shape, self.raw_where, slice_of)

    def dtype(self, dtype):
        """The type that this array has where the model computes in `dtype`."""
        if self.part == "scale":
            if self.how.kind != "int4":
                return jnp.dtype(jnp.float32)
            stored = jnp.dtype(self.how.dtype)
            if jnp.dtype(dtype).itemsize == 2 == stored.itemsize:
                return stored  # float16 has more digits than bfloat16, and the kernels take both
        if self.part == "zero" and self.how.kind != "int4":
            return jnp.dtype(np.int16)
        if self.part == "bytes" and not self.how.spread:
            return jnp.dtype({"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[self.how.kind])
        own = {"packed": np.int32, "zero": np.uint8, "order": np.int32, "known": np.float32}
        return jnp.dtype(own.get(self.part, dtype))

    def raw_itemsize(self, dtype):
        """Bytes of an element as read; an estimate for values."""
        return 1 if self.part in ("packed", "bytes") else self.dtype(dtype).itemsize

    def finish(self, raw, dtype, programs=None):
        """From the order of the file to that of the engine, on the device; and whether all of it is finite.

        programs: `finishing` by its keys, compiled; what is not there compiles itself.
        """
        key, function = self.finishing(raw, dtype)
        return (programs or {}).get(key, function)(raw)

    def finishing(self, raw, dtype):
        """(key, jitted function) of what `finish` does with such an array, or a ShapeDtypeStruct of one."""
        if self.part == "packed":
            how = "pack", self.group, self.packing, self.where
            function = _pack(*how[1:])
        else:
            turned = self._turns() and self.part in ("weight", "scale", "zero")
            to = 0 if self.how else self.expert_axis
            how = "turn", to if turned else None, self.dtype(dtype), self.where
            function = _turn(*how[1:])
        return (*map(str, how), raw.shape, str(raw.dtype)), function


def _alike(arrays):
    """The arrays in one type: NumPy knows none that holds both float16 and bfloat16."""
    kind = jnp.result_type(*(array.dtype for array in arrays))
    return [array.astype(kind, copy=False) for array in arrays]


@lru_cache
def _turn(axis, dtype, where):
    """A function that casts an array and moves its last axis to `axis`, and tells whether all of it is finite.

    Compiled once a shape.
    """

    def turn(raw):
        out = raw.astype(dtype)
        sound = jnp.isfinite(out).all() if jnp.issubdtype(dtype, jnp.floating) else jnp.bool_(True)
        return (out if axis is None else jnp.moveaxis(out, -1, axis)), sound

    return jax.jit(turn, out_shardings=(where, None))


@lru_cache
def _pack(group, packing, where):
    """A function that packs nibbles whose input axis is the last, compiled once a shape.

    packing: (axis, places) where eight neighbours along an axis share an int32, each in its place there.
    """

    def pack(raw):
        if packing is not None:
            axis, places = packing
            shape, behind = list(raw.shape), raw.ndim + axis + 1
            shape[axis] *= 8
            words = jnp.expand_dims(jax.lax.bitcast_convert_type(raw, jnp.uint32), behind)
            shifts = jnp.asarray(places, jnp.uint32).reshape([8 if i == behind else 1 for i in range(words.ndim)]) * 4
            raw = (words >> shifts & 15).astype(jnp.uint8).reshape(shape)
        return ops.int4_pack(jnp.moveaxis(raw, -1, 0), group=group), jnp.bool_(True)

    return jax.jit(pack, out_shardings=(where, None))
