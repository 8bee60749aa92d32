"""`jaxserve lite auto_gptq`: a model's layers through GPTQ, and into a folder of GPTQ's layout.

The rounding itself is in `jaxserve.lite.gptq`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.lite import calibrate, gptq
from jaxserve.lite.awq import choose_group
from jaxserve.lite.folder import Folder

WORD = 32  # bits of an element of the stored tensors


class Settings(NamedTuple):
    """What a GPTQ folder is made with."""

    group: int
    bits: int = 4
    symmetric: bool = True
    act_order: bool = True  # inputs from the largest down; does not show in the result
    desc_act: bool = False  # groups of inputs of like size, which then are no neighbours
    damping: float | None = None  # None: as `damping_of` has it

    def in_config(self) -> dict:
        """quantization_config of config.json, as AutoGPTQ and its successors have it."""
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "sym": self.symmetric,
            "desc_act": self.desc_act,
            "static_groups": self.act_order and not self.desc_act,
            "true_sequential": True,
            "lm_head": False,
        } | ({} if self.damping is None else {"damp_percent": self.damping})


def quantize(model, windows, folder: Folder, settings: Settings, *, batch: int = 1, progress: Callable | None = None):
    """Writes all layers of a model into `folder`, rounded with GPTQ; the caller finishes it.

    model: of `engine.loading.open_model`; windows: int32[N, T] token ids to calibrate with, `batch` at a time.
    progress(done, total) counts layers.  A layer's maps are done in order, each with the inputs that the rounded ones
    before it make.  Layers that `folder` has already are read from it.  ValueError names the layer and the map that
    cannot be rounded.
    """
    for block in calibrate.layers(model, windows, progress, batch):
        layer = block.layer
        tensors: dict = {}
        losses: dict = {}
        if folder.done(block.index):
            held = folder.read(block.index)
            for path in maps(block):
                layer = calibrate.placed(layer, path, restored(block, path, held, settings))
            block.follow(layer)
            continue
        for path in maps(block):
            weight = calibrate.at(layer, path).weight
            try:
                between = gptq.hessian(taken[path] for taken in block.inputs(path, layer=layer))
                q, scale, zero, groups = rounded(weight, between, settings, windows.size)
            except ValueError as error:
                raise ValueError(f"layer {block.index}, {path}: {error}") from None
            value = spread(q, scale, zero, groups)
            losses[path] = float(gptq.loss(weight, value, between))
            layer = calibrate.placed(layer, path, value)
            tensors |= packed(block, path, q, scale, zero, groups, settings.bits)
        folder.write(block.index, tensors, {"errors": losses})
        block.follow(layer)


def group_of(cfg, asked: int | None = None) -> int:
    """The inputs that share a scale, as `awq.choose_group`; ValueError for a mixture of experts, too."""
    calibrate.must_be_dense(cfg)
    return choose_group(cfg, asked)


def maps(block) -> list[str]:
    """The paths of a layer's linear maps that are rounded, in the order in which they are computed."""
    return [path for path in calibrate.MAPS if path in block.rows]


def damping_of(inputs: int, tokens: int) -> float:
    """A share of the Hessian's mean diagonal as large as what so few tokens leave open, and at least GPTQ's usual."""
    return max(gptq.DAMPING, min(0.5, math.sqrt(inputs / tokens)))


def rounded(weight, between, settings: Settings, tokens: int):
    """(q, scale, zero, group of each input) of a weight [inputs, *outputs], as GPTQ's files can hold it."""
    damping = damping_of(len(weight), tokens) if settings.damping is None else settings.damping
    # A zero is stored less one: 0 would become 2^bits - 1, which readers take for 2^bits.
    ways = {"bits": settings.bits, "symmetric": settings.symmetric, "damping": damping, "least_zero": 1}
    groups = np.arange(weight.shape[0]) // settings.group
    if not settings.desc_act:
        return *gptq.solve(weight, between, settings.group, act_order=settings.act_order, **ways), groups
    order = np.argsort(-np.diagonal(np.asarray(between)), kind="stable")
    q, scale, zero = gptq.solve(weight[order], between[order][:, order], settings.group, **ways)
    back = np.argsort(order)
    return q[back], scale, zero, groups[back]


def spread(q, scale, zero, groups):
    """float32[inputs, *outputs] of what `rounded` returns."""
    return (jnp.asarray(q, jnp.float32) - jnp.asarray(zero, jnp.float32)[groups]) * jnp.asarray(scale)[groups]


def packed(block, path, q, scale, zero, groups, bits) -> dict[str, np.ndarray]:
    """The stored tensors of a map: qweight int32 [in * bits / 32, out], qzeros, scales [groups, out], g_idx [in]."""
    parts = [block.tensors(path, np.asarray(array)) for array in (q, scale, zero)]
    tensors = {}
    for name in parts[0]:
        values, scales, zeros = (np.ascontiguousarray(part[name].T) for part in parts)
        tensors[f"{name}.qweight"] = words(values, 0, bits)
        tensors[f"{name}.qzeros"] = words(zeros - 1, 1, bits)
        tensors[f"{name}.scales"] = scales.astype(np.float16)
        tensors[f"{name}.g_idx"] = groups.astype(np.int32)
    return tensors


def restored(block, path, tensors, settings: Settings):
    """The weight [inputs, *outputs] that `packed` made these tensors of."""
    found = []
    for name in block.tensors(path, np.zeros((1, *calibrate.at(block.layer, path).weight.shape[1:]), np.uint8)):
        q, zeros = unworded(tensors[f"{name}.qweight"], 0, settings.bits), tensors[f"{name}.qzeros"]
        zero = unworded(zeros, 1, settings.bits) + 1.0
        of = tensors[f"{name}.g_idx"]
        found.append(((q - zero[of]) * tensors[f"{name}.scales"].astype(np.float32)[of]).astype(np.float32).T)
    return jnp.asarray(calibrate.join(block.cfg, block.rows[path], found))


def words(values: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """int32: uint8 values below 2^bits, those of a word neighbours along `axis`, the first in its lowest bits."""
    each = WORD // bits
    shape = [*values.shape[:axis], values.shape[axis] // each, each, *values.shape[axis + 1 :]]
    apart = np.moveaxis(values.reshape(shape).astype(np.uint32), axis + 1, 0)
    out = np.zeros(apart.shape[1:], np.uint32)
    for place in range(each):
        out |= apart[place] << np.uint32(bits * place)
    return out.view(np.int32)


def unworded(stored: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """The inverse of `words`, uint8."""
    each = WORD // bits
    apart = [((stored.view(np.uint32) >> np.uint32(bits * p)) & (2**bits - 1)).astype(np.uint8) for p in range(each)]
    shape = [*stored.shape[:axis], stored.shape[axis] * each, *stored.shape[axis + 1 :]]
    return np.stack(apart, axis + 1).reshape(shape)
