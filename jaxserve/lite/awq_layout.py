"""A quantized layer as the tensors of an AWQ folder (AutoAWQ, gemm), and back.

A map [in, out] is X.qweight int32[in, out/8], X.qzeros int32[in/group, out/8] and X.scales float16[in/group, out]; a
value is (q - zero) * scale.  Of the 8 neighbouring outputs that share a word, from its lowest bits the nibbles are
outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

import jax.numpy as jnp
import numpy as np

from jaxserve.lite import calibrate
from jaxserve.lite.calibrate import at, placed
from jaxserve.lite.rounding import Rounded

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(block, path, found: Rounded, shape) -> dict[str, np.ndarray]:
    """The stored tensors of a map with the weight's shape [in, *out]."""
    parts = [block.tensors(path, np.asarray(array).reshape(-1, *shape[1:])) for array in found]
    tensors: dict = {}
    for name in parts[0]:
        tensors |= words(name, Rounded(*(part[name].T for part in parts)))
    return tensors


def words(name: str, found: Rounded) -> dict[str, np.ndarray]:
    """qweight int32[in, out/8], qzeros int32[in/group, out/8], scales float16[in/group, out] of one map [in, out]."""
    return {
        f"{name}.qweight": pack(found.q),
        f"{name}.qzeros": pack(found.zero),
        f"{name}.scales": np.asarray(found.scale, np.float16),
    }


def pack(values) -> np.ndarray:
    """int32[rows, columns/8] of integers 0 to 15 [rows, columns], in AutoAWQ's order."""
    apart = np.asarray(values).astype(np.uint32).reshape(len(values), -1, 8)
    out = np.zeros(apart.shape[:2], np.uint32)
    for place, column in enumerate(ORDER):
        out |= apart[..., column] << np.uint32(4 * place)
    return out.view(np.int32)


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
