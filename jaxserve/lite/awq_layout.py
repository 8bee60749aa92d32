"""A quantized layer as the tensors of an AWQ folder (AutoAWQ, gemm), and back.

A map [in, out] is X.qweight int32[in, out/8], X.qzeros int32[in/group, out/8] and X.scales float16[in/group, out]; a
value is (q - zero) * scale.  Of the 8 neighbouring outputs that share a word, from its lowest bits the nibbles are
outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.lite import calibrate
from jaxserve.lite.calibrate import at, placed, split
from jaxserve.lite.rounding import Rounded

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(block, path, found: Rounded, shape) -> dict[str, jax.Array]:
    """The stored tensors of a map with the weight's shape [in, *out]; they stay on the device."""
    row = block.rows[path]
    parts = packing(*packing_of(block, path, found, shape))
    named = zip(row.sources, parts, strict=True)
    return {f"{source.format(block.index)}.{part}": array for source, has in named for part, array in has.items()}


def packing_of(block, path, found, shape) -> tuple:
    """Arguments of `packing`."""
    row = block.rows[path]
    return block.cfg, row.arrange, tuple(shape), found


@partial(jax.jit, static_argnames=("cfg", "arrange", "shape"))
def packing(cfg, arrange, shape, found):
    """The parts of each of a map's sources."""
    row = SimpleNamespace(arrange=arrange)
    arrays = (split(cfg, row, array.reshape(-1, *shape[1:])) for array in found)
    return [_words(Rounded(*(part.T for part in parts))) for parts in zip(*arrays)]


def words(name: str, found: Rounded) -> dict[str, np.ndarray]:
    """qweight int32[in, out/8], qzeros int32[in/group, out/8], scales float16[in/group, out] of one map [in, out]."""
    return {f"{name}.{part}": np.asarray(array) for part, array in _words(found).items()}


@jax.jit
def _words(found):
    return {"qweight": _pack(found.q), "qzeros": _pack(found.zero), "scales": found.scale.astype(jnp.float16)}


def pack(values) -> np.ndarray:
    """int32[rows, columns/8] of integers 0 to 15 [rows, columns], in AutoAWQ's order."""
    return np.asarray(_pack(jnp.asarray(values)))


@jax.jit
def _pack(values):
    apart = values.astype(jnp.uint32).reshape(len(values), -1, 8)
    out = sum(apart[..., column] << jnp.uint32(4 * place) for place, column in enumerate(ORDER))
    return jax.lax.bitcast_convert_type(out, jnp.int32)


def unpack(stored: np.ndarray) -> np.ndarray:
    """The inverse of `pack`, uint8."""
    apart = np.empty((*stored.shape, 8), np.uint8)
    for place, column in enumerate(ORDER):
        apart[..., column] = (stored.view(np.uint32) >> np.uint32(4 * place)) & 15
    return apart.reshape(len(stored), -1)


def norms(block, layer) -> dict[str, np.ndarray]:
    """The layer's norms, which scales may have changed."""
    return {f"{block.rows[name].sources[0].format(block.index)}.weight": np.asarray(getattr(layer, name))
            for name in ("norm1", "norm2")}  # fmt: skip


def biases(block, path, layer) -> dict[str, np.ndarray]:
    """The biases of a map, which scales may have changed."""
    bias = at(layer, path).bias
    if bias is None:
        return {}
    return {f"{name}.bias": part[:, 0] for name, part in block.tensors(path, np.asarray(bias)[None]).items()}


def restored(block, tensors):
    """The layer that was written as `tensors`."""
    layer = block.layer.replace(
        **{name: jnp.asarray(tensors[f"{block.rows[name].sources[0].format(block.index)}.weight"])
           for name in ("norm1", "norm2")}
    )  # fmt: skip
    if "ffn.router" in block.rows:
        (source,) = block.rows["ffn.router"].sources
        layer = placed(layer, "ffn.router", jnp.asarray(tensors[f"{source.format(block.index)}.weight"].T))
    for path in calibrate.MAPS:
        if path not in block.rows:
            continue
        node, row = at(layer, path), block.rows[path]
        if row.arrange in calibrate.EXPERT_ARRANGES:
            layer = placed(layer, path, _restored_experts(block, row, tensors))
            continue
        names = [source.format(block.index) for source in row.sources]
        layer = placed(layer, path, jnp.asarray(calibrate.join(block.cfg, row, [values(tensors, n).T for n in names])))
        if node.bias is not None:
            parts = [tensors[f"{name}.bias"][:, None] for name in names]
            part, name = path.split(".")
            whole = at(layer, path).replace(bias=jnp.asarray(calibrate.join(block.cfg, row, parts))[0])
            layer = layer.replace(**{part: getattr(layer, part).replace(**{name: whole})})
    return layer


def _restored_experts(block, row, tensors):
    experts = []
    for expert in range(block.cfg.experts):
        parts = [values(tensors, source.format(block.index, expert)) for source in row.sources]
        experts.append(np.stack(parts, 1) if row.arrange == "experts_gate_up" else parts[0])
    return jnp.asarray(np.stack(experts))


def values(tensors, name: str) -> np.ndarray:
    """float32[in, out] of a stored map."""
    q, scale = unpack(tensors[f"{name}.qweight"]), tensors[f"{name}.scales"].astype(np.float32)
    group = len(q) // len(scale)
    zero = unpack(tensors[f"{name}.qzeros"]).astype(np.float32)
    return (q - np.repeat(zero, group, 0)) * np.repeat(scale, group, 0)
