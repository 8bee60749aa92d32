"""Puts a checkpoint's tensors onto the mesh, each device reading only its own slice.

A family's table (models/table.py) says which tensors become which leaf of Params, leaf.py how one is read and placed.
A map that the checkpoint has in 4 or 8 bits (see checkpoint/quantized.py and eight_bit.py) is held so, or as values;
the head always as values.  Knows no file format.
"""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxserve import ops
from jaxserve.checkpoint import CheckpointError
from jaxserve.leaf import PARTS, Leaf, padded, parts_of
from jaxserve.models import family
from jaxserve.models.attention import GQA
from jaxserve.models.decoder import Layer, Params
from jaxserve.models.layers import GatedMLP
from jaxserve.models.moe import MoE
from jaxserve.quant.dense import Dense, Tied
from jaxserve.quant.fp8 import Fp8
from jaxserve.quant.int4 import Int4
from jaxserve.quant.int8 import Int8

__all__ = ["assemble", "check", "hold", "leaves", "load", "nbytes", "padded", "scratch", "shapes"]
READERS = 4  # threads that read ahead of the device
AHEAD_BYTES = 1 << 30  # host memory that they may fill
LEAST_GROUP = 32  # of inputs that share a scale, for the kernels of 8 bits


def hold(checkpoint, cfg, mesh, spread=False):
    """{path: Packed} of the maps of Params that are held as the checkpoint has them; the others are held as values.

    spread: as values wherever that makes no difference to what is computed, and elements in a type to compute in where
    it would: that takes memory, and no time to unpack.
    """
    out, packed, tp = {}, getattr(checkpoint, "packed", {}), mesh.shape["tp"]
    for row, layer in _rows(cfg):
        expert = row.arrange in ("experts", "experts_gate_up")
        names = [source.format(layer, e) for source in row.sources for e in range(cfg.experts if expert else 1)]
        if row.path == "head" or row.arrange is None or not all(packed.get(name) for name in names):
            continue
        found = [packed[name] for name in names]
        how = found[0]._replace(group=math.gcd(*(p.group for p in found)))
        if any(p._replace(group=how.group, dtype=how.dtype) != how for p in found):
            continue
        if how.kind != "int4" and how.group < min(LEAST_GROUP, row.shapes[0][1]):
            continue
        if how.order and not _one_order(checkpoint, names, split=tp > 1 and row.spec[int(expert)] == "tp"):
            continue
        if spread and not how.activations:
            continue
        out[row.path.format(layer)] = how._replace(spread=spread)
    return out


def _one_order(checkpoint, names, split):
    """Whether maps that share their inputs take them in the same order, and one device has them all."""
    first = checkpoint.read(f"{names[0]}.order")
    return not split and all(np.array_equal(first, checkpoint.read(f"{name}.order")) for name in names[1:])


def _rows(cfg):
    """Every row of the family's table, with each of its layers."""
    for row in family(cfg.family).weights(cfg):
        for layer in (0,) if "{}" not in row.path else range(cfg.layers) if row.layers is None else row.layers:
            yield row, layer


def leaves(cfg, mesh, names, held=None):
    """{(path, part): Leaf} of all arrays of a model; parts are "weight" and "bias", or those of a quantized map.

    names: what the checkpoint has, by its own names or by ours; held: of `hold`.
    """
    held, out = held or {}, {}
    for row, layer in _rows(cfg):
        path = row.path.format(layer)
        how = held.get(path)
        for part in parts_of(how):
            out[path, part] = leaf = Leaf(cfg, mesh, row, layer, part, how, bool(held))
        named = {f"{leaf.sources[0]}.bias", f"{path}.bias"}
        if row.arrange is not None and not leaf.experts and (row.bias or named & names):
            out[path, "bias"] = Leaf(cfg, mesh, row, layer, "bias", how, bool(held))
    return out


def _linear(node):
    """The node of a linear map, by its parts."""
    how = node.pop("how", None)
    if how is None or how.kind == "int4":
        return Dense(**node) if how is None else Int4(**node)
    return {"int8": Int8, "fp8": Fp8}[how.kind](
        weight=node.pop("bytes"), activations=how.kind if how.activations else None, **node
    )


def assemble(cfg, found, arrays):
    """Params from {(path, part): Leaf} and {(path, part): array}."""
    tree: dict = {}
    for (path, part), array in arrays.items():
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})
        node[part] = array
        if part == "weight":
            node["axes"] = tuple(found[path, part].where.spec)
        if part in ("packed", "bytes"):
            leaf = found[path, part]
            node |= {"how": leaf.how, "group": leaf.group, "axes": leaf.axes}

    def layer(node):
        mixer, ffn = node["mixer"], {name: _linear(part) for name, part in node["ffn"].items()}
        norms = {name: mixer[name]["weight"] for name in ("q_norm", "k_norm") if name in mixer}
        return Layer(
            norm1=node["norm1"]["weight"],
            mixer=GQA(qkv=_linear(mixer["qkv"]), o=_linear(mixer["o"]), **norms),
            norm2=node["norm2"]["weight"],
            ffn=MoE(**ffn) if "router" in ffn else GatedMLP(**ffn),
        )

    embed = tree["embed"]["weight"]
    head = _linear(tree["head"]) if "head" in tree else Tied(embed)
    layers = tuple(layer(tree["layers"][str(i)]) for i in range(cfg.layers))
    return Params(embed=embed, layers=layers, norm=tree["norm"]["weight"], head=head)


def shapes(cfg, mesh, names, dtype, held=None):
    """Params as ShapeDtypeStructs: what `load` will return, known before a weight is read.  held: of `hold`."""
    found = leaves(cfg, mesh, names, held)
    return assemble(
        cfg, found, {k: jax.ShapeDtypeStruct(v.shape, v.dtype(dtype), sharding=v.where) for k, v in found.items()}
    )


def nbytes(params):
    """Bytes of a pytree of arrays or ShapeDtypeStructs on the fullest device; arrays that appear twice count once."""
    one = {id(x): x for x in jax.tree.leaves(params)}.values()
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in one)


def scratch(params):
    """Bytes that the values of a map take on a device, where a product with it writes them out."""
    maps = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int4))
    return max((ops.int4_scratch(nbytes(x.packed)) for x in maps if isinstance(x, Int4)), default=0)


def check(checkpoint, cfg, mesh, held=None):
    """The leaves of a checkpoint.  CheckpointError names one that is missing, or not as `cfg` says."""
    found = leaves(cfg, mesh, checkpoint.names, hold(checkpoint, cfg, mesh) if held is None else held)
    for leaf in found.values():
        leaf.check(checkpoint)
    return found


def load(checkpoint, cfg, mesh, dtype, progress=None, held=None, compiled=None):
    """Params of `checkpoint` on `mesh`, computed in `dtype`.

    cfg: as the checkpoint's config says (not padded).  `progress(done, total)` counts bytes.  held: of `hold`, as it
    says unless given.  compiled: {key: executable} of {key: (jitted function, arguments, None)}, for who keeps them.
    CheckpointError names the file and the tensor.
    """
    found = check(checkpoint, cfg, mesh, held)
    size = {key: math.prod(leaf.raw_shape) * leaf.raw_itemsize(dtype) for key, leaf in found.items()}
    arrays: dict = {}
    waiting: deque = deque()
    done, total, ahead = 0, sum(size.values()), 0

    def make():
        jobs = {}
        for leaf in found.values():
            key, function = leaf.finishing(raw := leaf.raw(checkpoint), dtype)
            jobs[key] = function, (raw,), None
        return compiled(jobs)

    def collect():
        nonlocal done, ahead
        key, future = waiting.popleft()
        arrays[key], sound = found[key].finish(future.result(), dtype, programs and programs.result())
        arrays[key].block_until_ready()  # so that the copy in file order can go
        if not sound:
            part = PARTS.get(key[1], key[1])
            names = " or ".join(f"{source.format('*')}.{part}" for source in found[key].sources)
            raise CheckpointError(
                f"{checkpoint.path}: tensor {names} has values that are no numbers, or too large for "
                f"{arrays[key].dtype}; get it again, or try another --dtype"
            )
        done, ahead = done + size[key], ahead - size[key]
        progress and progress(done, total)

    with ThreadPoolExecutor(READERS + 1) as pool:
        programs = pool.submit(make) if compiled else None
        for key, leaf in found.items():
            while waiting and ahead + size[key] > AHEAD_BYTES:
                collect()
            waiting.append((key, pool.submit(leaf.load, checkpoint)))
            ahead += size[key]
        while waiting:
            collect()
    return assemble(cfg, found, arrays)
