"""Puts a checkpoint's tensors onto the mesh, each device reading only its own slice.

A family's table (models/table.py) says which tensors become which leaf of Params.  Checkpoints store a linear map as
[out, in]; slices are read in that order, and turned to [in, out] on the device.  Axes that the mesh splits are padded
with zeros to a multiple of tp: heads (with their query groups), feed-forward columns and the vocabulary.  Knows no file
format.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.mesh import sharding
from jaxserve.models import family
from jaxserve.models.attention import GQA
from jaxserve.models.decoder import Layer, Params
from jaxserve.models.layers import GatedMLP
from jaxserve.models.moe import MoE
from jaxserve.quant.dense import Dense, Tied

READERS = 4  # threads that read ahead of the device
AHEAD_BYTES = 1 << 30  # host memory that they may fill


def pad(n, multiple):
    """The smallest multiple that holds n."""
    return -(-n // multiple) * multiple


def padded(cfg, tp):
    """The model as it runs on `tp` devices: kv heads that tp does not divide are padded, with their query groups."""
    kv_heads = pad(cfg.kv_heads, tp)
    return replace(cfg, kv_heads=kv_heads, heads=kv_heads * (cfg.heads // cfg.kv_heads))


class Leaf:
    """One array of Params: how it is read and where it goes."""

    def __init__(self, cfg, mesh, row, layer, part):
        self.row, self.path, self.part = row, row.path.format(layer), part
        self.sources = [source.format(layer, "{}") for source in row.sources]
        self.expert_axis = int(row.arrange in ("experts", "experts_gate_up"))
        self.heads = (cfg.heads // cfg.kv_heads, cfg.head_dim)  # G, H
        self.experts = cfg.experts
        tp = mesh.shape["tp"]
        spec = row.spec if part == "weight" else row.spec[1:]
        shape = [pad(n, tp) if axis == "tp" else n for n, axis in zip(self._stored(cfg, tp), self._input_last(spec))]
        self.raw_shape = tuple(shape)  # as read: the input axis last
        self.raw_where = sharding(mesh, *self._input_last(spec))
        self.shape = self._input_first(self.raw_shape)
        self.where = sharding(mesh, *spec)

    def _stored(self, cfg, tp):
        """The shape as read, before padding to a multiple of tp."""
        shapes, arrange = self.row.shapes, self.row.arrange
        out, tail = shapes[0][0], shapes[0][1:] if self.part == "weight" else ()
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
        return self.part == "weight" and self.row.arrange is not None

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
        name = f"{source}.{self.part}"
        stored = checkpoint.shape(name)
        have = tuple(slice(min(s.start, n), min(s.stop, n)) for s, n in zip(index, stored))
        data = checkpoint.read(name, have)
        missing = [(0, (s.stop - s.start) - n) for s, n in zip(index, data.shape)]
        return np.pad(data, missing) if any(after for _, after in missing) else data

    def check(self, checkpoint):
        """ValueError when a tensor is missing or has another shape than the config says."""
        for i, source in enumerate(self.sources):
            shape = self.row.shapes[i][: None if self.part == "weight" else 1]
            for name in [source.format(e) for e in range(self.experts)] if self.expert_axis else [source]:
                name = f"{name}.{self.part}"
                if name not in checkpoint.names:
                    raise ValueError(f"{checkpoint.path}: tensor {name} is missing")
                if tuple(checkpoint.shape(name)) != tuple(shape):
                    found = f"{checkpoint.path}: tensor {name} has shape {list(checkpoint.shape(name))}"
                    raise ValueError(f"{found}; the config asks for {list(shape)}")

    def load(self, checkpoint):
        """The array on its devices, in the order of the file; devices that hold the same slice share one read."""
        seen = {}

        def slice_of(index):
            key = str(index)
            if key not in seen:
                seen[key] = self.read(checkpoint, index)
            return seen[key]

        return jax.make_array_from_callback(self.raw_shape, self.raw_where, slice_of)

    def finish(self, raw, dtype):
        """From the order of the file to that of the engine, on the device."""
        turn = self.expert_axis if self._turns() else None
        return _turn(turn, jnp.dtype(dtype), self.where)(raw)


@lru_cache
def _turn(axis, dtype, where):
    """A function that casts an array and moves its last axis to `axis`, compiled once a shape."""

    def turn(raw):
        out = raw.astype(dtype)
        return out if axis is None else jnp.moveaxis(out, -1, axis)

    return jax.jit(turn, out_shardings=where)


def leaves(cfg, mesh, names):
    """{(path, "weight" | "bias"): Leaf} of all arrays of a model.

    names: what the checkpoint has, by its own names or by ours.
    """
    out = {}
    for row in family(cfg.family).weights(cfg):
        layers = (0,) if "{}" not in row.path else range(cfg.layers) if row.layers is None else row.layers
        for layer in layers:
            leaf = Leaf(cfg, mesh, row, layer, "weight")
            out[leaf.path, "weight"] = leaf
            first = leaf.sources[0]
            if (
                row.arrange is not None
                and not leaf.expert_axis
                and (row.bias or {f"{first}.bias", f"{leaf.path}.bias"} & names)
            ):
                out[leaf.path, "bias"] = Leaf(cfg, mesh, row, layer, "bias")
    return out


def assemble(cfg, arrays):
    """Params from {(path, part): array}."""
    tree = {}
    for (path, part), array in arrays.items():
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
        node[part] = array

    def linear(node):
        return Dense(**node)

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


def shapes(cfg, mesh, names, dtype):
    """Params as ShapeDtypeStructs: what `load` will return, known before a weight is read."""
    found = leaves(cfg, mesh, names)
    return assemble(
        cfg, {k: jax.ShapeDtypeStruct(v.shape, jnp.dtype(dtype), sharding=v.where) for k, v in found.items()}
    )


def nbytes(params):
    """Bytes of a pytree of arrays or ShapeDtypeStructs on the fullest device; arrays that appear twice count once."""
    one = {id(x): x for x in jax.tree.leaves(params)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in one)


def load(checkpoint, cfg, mesh, dtype, progress=None):
    """Params of `checkpoint` on `mesh`, computed in `dtype`.

    cfg: as the checkpoint's config says (not padded).  `progress(done, total)` counts bytes.  ValueError names the file
    and the tensor.
    """
    found = leaves(cfg, mesh, checkpoint.names)
    for leaf in found.values():
        leaf.check(checkpoint)
    size = {key: math.prod(leaf.raw_shape) * jnp.dtype(dtype).itemsize for key, leaf in found.items()}
    arrays, done, total, waiting, ahead = {}, 0, sum(size.values()), deque(), 0

    def collect():
        nonlocal done, ahead
        key, future = waiting.popleft()
        arrays[key] = found[key].finish(future.result(), dtype)
        arrays[key].block_until_ready()  # so that the copy in file order can go
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
    return assemble(cfg, arrays)
