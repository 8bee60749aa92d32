"""Puts a checkpoint's tensors onto the mesh, each device reading only its own slice.

A family's table (models/table.py) says which tensors become which leaf of Params.  Checkpoints store a linear map as
[out, in]; slices are read in that order, and turned to [in, out] on the device.  Axes that the mesh splits are padded
with zeros to a multiple of tp: heads (with their query groups), feed-forward columns and the vocabulary.  A map that
the checkpoint has in 4 bits (see checkpoint/quantized.py) is read as nibbles, scales and zeros, all three arranged like
a weight; the head and experts are held as values.  Knows no file format.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import ops
from jaxserve.checkpoint import CheckpointError
from jaxserve.mesh import sharding
from jaxserve.models import family
from jaxserve.models.attention import GQA
from jaxserve.models.decoder import Layer, Params
from jaxserve.models.layers import GatedMLP
from jaxserve.models.moe import MoE
from jaxserve.quant.dense import Dense, Tied
from jaxserve.quant.int4 import Int4, group_of

READERS = 4  # threads that read ahead of the device
AHEAD_BYTES = 1 << 30  # host memory that they may fill
INT4_PARTS = {"packed": "nibbles", "scale": "scale", "zero": "zero"}  # of an Int4, and what a checkpoint calls them
INT4_COLUMNS = 128  # feed-forward columns of a device are a multiple of this, so that no group of `down` is cut


def pad(n, multiple):
    """The smallest multiple that holds n."""
    return -(-n // multiple) * multiple


def padded(cfg, tp):
    """The model as it runs on `tp` devices: kv heads that tp does not divide are padded, with their query groups."""
    kv_heads = pad(cfg.kv_heads, tp)
    return replace(cfg, kv_heads=kv_heads, heads=kv_heads * (cfg.heads // cfg.kv_heads))


class Leaf:
    """One array of Params: how it is read and where it goes.

    int4: {source: checkpoint.quantized.Int4} of the checkpoint's maps that may stay packed.
    """

    def __init__(self, cfg, mesh, row, layer, part, int4):
        self.row, self.path, self.part = row, row.path.format(layer), part
        self.sources = [source.format(layer, "{}") for source in row.sources]
        self.expert_axis = int(row.arrange in ("experts", "experts_gate_up"))
        self.heads = (cfg.heads // cfg.kv_heads, cfg.head_dim)  # G, H
        self.experts = cfg.experts
        tp = mesh.shape["tp"]
        spec = row.spec if part != "bias" else row.spec[1:]
        columns = row.arrange == "gate_up" or row.path.endswith("ffn.down")
        multiple = tp * INT4_COLUMNS if int4 and tp > 1 and columns else tp
        axes = self._input_last(spec)
        shape = [pad(n, multiple) if axis == "tp" else n for n, axis in zip(self._stored(cfg, tp), axes)]
        self.group = self.stored_group = None
        if part in INT4_PARTS:
            self._choose_group(int4, shape, axes, tp)
        self.raw_shape = tuple(shape)  # as read: the input axis last
        self.raw_where = sharding(mesh, *axes)
        if part == "packed":
            self.shape, spec = ops.int4_shape(self._input_first(shape)), ops.int4_axes(row.spec)
        else:
            self.shape = self._input_first(self.raw_shape)
        self.where = sharding(mesh, *spec)

    def _choose_group(self, int4, shape, axes, tp):
        """Sets the group of an Int4, and of a scale's or zero's `shape` the last axis."""
        stored = [int4[source] for source in self.sources]
        self.stored_group = {source: found.group for source, found in zip(self.sources, stored)}
        self.scale_dtype = stored[0].dtype
        inputs = shape[-1] // (tp if axes[-1] else 1)
        self.group = group_of(math.gcd(*self.stored_group.values()), inputs)
        columns = shape[-2] // (tp if axes[-2] else 1)
        if reason := ops.int4_refuses(inputs, columns, self.group):
            raise ValueError(f"{self.sources[0]}: {reason}")
        if self.part != "packed":
            shape[-1] //= self.group

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
        if not self._turns():
            return tuple(axes)
        axes = list(axes)
        axes.insert(self.expert_axis, axes.pop())
        return tuple(axes)

    def read(self, checkpoint, index):
        """The slice `index` of the array as read, padding included."""
        index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.raw_shape))
        arrange, (groups, width) = self.row.arrange, self.heads
        fetch = partial(self._fetch, checkpoint)
        if arrange in ("qkv", "wqkv"):
            first, last = index[0].start, index[0].stop
            sizes = (groups, 1, 1) if arrange == "qkv" else (groups + 2,)
            parts = []
            for source, size in zip(self.sources, sizes):
                rows = fetch(source, (slice(first * size * width, last * size * width), *index[3:]))
                parts.append(rows.reshape(last - first, size, width, *rows.shape[1:]))
            return np.concatenate(parts, 1) if len(parts) > 1 else parts[0]
        if arrange == "gate_up":
            return np.stack([fetch(source, index[1:]) for source in self.sources])
        if arrange == "experts":
            return np.stack([fetch(self.sources[0].format(e), index[1:]) for e in range(self.experts)])
        if arrange == "experts_gate_up":
            both = [[fetch(source.format(e), index[2:]) for source in self.sources] for e in range(self.experts)]
            return np.stack([np.stack(pair) for pair in both])
        return fetch(self.sources[0], index)

    def _fetch(self, checkpoint, source, index):
        """Reads a slice that may reach past the stored tensor; what lies beyond is zero."""
        name = f"{source}.{INT4_PARTS.get(self.part, self.part)}"
        if self.part in ("scale", "zero") and (times := self.stored_group[source] // self.group) > 1:
            first, last = index[-1].start, index[-1].stop  # of the smaller groups that are held
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
            for name in [source.format(e) for e in range(self.experts)] if self.expert_axis else [source]:
                name = f"{name}.{'weight' if self.part in INT4_PARTS else self.part}"
                if name not in checkpoint.names:
                    raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
                if tuple(checkpoint.shape(name)) != tuple(shape):
                    found = f"{checkpoint.path}: tensor {name} has shape {list(checkpoint.shape(name))}"
                    raise CheckpointError(f"{found}; the config asks for {list(shape)}")

    def load(self, checkpoint):
        """The array on its devices, in the order of the file; devices that hold the same slice share one read."""
        seen = {}

        def slice_of(index):
            key = str(index)
            if key not in seen:
                seen[key] = self.read(checkpoint, index)
            return seen[key]

        return jax.make_array_from_callback(self.raw_shape, self.raw_where, slice_of)

    def dtype(self, dtype):
        """The type that this array has where the model computes in `dtype`."""
        if self.part == "scale" and jnp.dtype(dtype).itemsize == 2 == self.scale_dtype.itemsize:
            return self.scale_dtype  # float16 has more digits than bfloat16, and the kernels take both
        return jnp.dtype({"packed": np.int32, "zero": np.uint8}.get(self.part, dtype))

    def raw_itemsize(self, dtype):
        """Bytes of an element as read; an estimate for values."""
        return 1 if self.part == "packed" else self.dtype(dtype).itemsize

    def finish(self, raw, dtype):
        """From the order of the file to that of the engine, on the device; and whether there is no NaN in it."""
        if self.part == "packed":
            return _pack(self.group, self.where)(raw), True
        turn = self.expert_axis if self._turns() else None
        return _turn(turn, self.dtype(dtype), self.where)(raw)


@lru_cache
def _turn(axis, dtype, where):
    """A function that casts an array and moves its last axis to `axis`, and tells whether there is no NaN in it.

    Compiled once a shape.
    """

    def turn(raw):
        out = raw.astype(dtype)
        return (out if axis is None else jnp.moveaxis(out, -1, axis)), ~jnp.any(out != out)

    return jax.jit(turn, out_shardings=(where, None))


@lru_cache
def _pack(group, where):
    """A function that packs nibbles whose input axis is the last, compiled once a shape."""
    return jax.jit(lambda raw: ops.int4_pack(jnp.moveaxis(raw, -1, 0), group=group), out_shardings=where)


def leaves(cfg, mesh, names, int4=None):
    """{(path, part): Leaf} of all arrays of a model; parts are "weight" and "bias", or those of an Int4.

    names: what the checkpoint has, by its own names or by ours; int4: its maps that may stay packed.
    """
    int4 = int4 or {}
    out = {}
    for row in family(cfg.family).weights(cfg):
        layers = (0,) if "{}" not in row.path else range(cfg.layers) if row.layers is None else row.layers
        for layer in layers:
            leaf = Leaf(cfg, mesh, row, layer, "weight", int4)
            stays = row.path != "head" and all(source in int4 for source in leaf.sources)
            for part in INT4_PARTS if stays else ("weight",):
                out[leaf.path, part] = Leaf(cfg, mesh, row, layer, part, int4)
            first = leaf.sources[0]
            if (
                row.arrange is not None
                and not leaf.expert_axis
                and (row.bias or {f"{first}.bias", f"{leaf.path}.bias"} & names)
            ):
                out[leaf.path, "bias"] = Leaf(cfg, mesh, row, layer, "bias", int4)
    return out


def assemble(cfg, found, arrays):
    """Params from {(path, part): Leaf} and {(path, part): array}."""
    tree = {}
    for (path, part), array in arrays.items():
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
        node[part] = array
        if part == "packed":
            leaf = found[path, part]
            node |= {"group": leaf.group, "axes": tuple(leaf.row.spec)}

    def linear(node):
        return Int4(**node) if "packed" in node else Dense(**node)

    def layer(node):
        mixer, ffn = node["mixer"], {name: linear(part) for name, part in node["ffn"].items()}
        norms = {name: mixer[name]["weight"] for name in ("q_norm", "k_norm") if name in mixer}
        return Layer(
            norm1=node["norm1"]["weight"],
            mixer=GQA(qkv=linear(mixer["qkv"]), o=linear(mixer["o"]), **norms),
            norm2=node["norm2"]["weight"],
            ffn=MoE(**ffn) if "router" in ffn else GatedMLP(**ffn),
        )

    embed = tree["embed"]["weight"]
    head = linear(tree["head"]) if "head" in tree else Tied(embed)
    layers = tuple(layer(tree["layers"][str(i)]) for i in range(cfg.layers))
    return Params(embed=embed, layers=layers, norm=tree["norm"]["weight"], head=head)


def shapes(cfg, mesh, names, dtype, int4=None):
    """Params as ShapeDtypeStructs: what `load` will return, known before a weight is read.  int4: see `leaves`."""
    found = leaves(cfg, mesh, names, int4)
    return assemble(
        cfg, found, {k: jax.ShapeDtypeStruct(v.shape, v.dtype(dtype), sharding=v.where) for k, v in found.items()}
    )


def nbytes(params):
    """Bytes of a pytree of arrays or ShapeDtypeStructs on the fullest device; arrays that appear twice count once."""
    one = {id(x): x for x in jax.tree.leaves(params)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in one)


def check(checkpoint, cfg, mesh):
    """The leaves of a checkpoint.  CheckpointError names one that is missing, or not as `cfg` says."""
    found = leaves(cfg, mesh, checkpoint.names, getattr(checkpoint, "int4", None))
    for leaf in found.values():
        leaf.check(checkpoint)
    return found


def load(checkpoint, cfg, mesh, dtype, progress=None):
    """Params of `checkpoint` on `mesh`, computed in `dtype`.

    cfg: as the checkpoint's config says (not padded).  `progress(done, total)` counts bytes.  CheckpointError names
    the file and the tensor.
    """
    found = check(checkpoint, cfg, mesh)
    size = {key: math.prod(leaf.raw_shape) * leaf.raw_itemsize(dtype) for key, leaf in found.items()}
    arrays, done, total, waiting, ahead = {}, 0, sum(size.values()), deque(), 0

    def collect():
        nonlocal done, ahead
        key, future = waiting.popleft()
        arrays[key], sound = found[key].finish(future.result(), dtype)
        arrays[key].block_until_ready()  # so that the copy in file order can go
        if not sound:
            names = " or ".join(f"{source.format('*')}.{key[1]}" for source in found[key].sources)
            raise CheckpointError(f"{checkpoint.path}: tensor {names} has values that are no numbers; get it again")
        done, ahead = done + size[key], ahead - size[key]
        progress and progress(done, total)

    with ThreadPoolExecutor(READERS) as pool:
        for key, leaf in found.items():
            while waiting and ahead + size[key] > AHEAD_BYTES:
                collect()
            waiting.append((key, pool.submit(leaf.load, checkpoint)))
            ahead += size[key]
        while waiting:
            collect()
    return assemble(cfg, found, arrays)
