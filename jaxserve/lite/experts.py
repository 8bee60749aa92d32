"""The experts of a layer in 4 bits, for `awq`.

Gate and up of all experts, and the router, have the same inputs, and so the same scales, which go into the norm before
them; down has inputs of its own in every expert, and their scales go into that expert's up.  Integers are the nearest,
in clipped ranges: an expert sees too few of the tokens for what `awq` does with other maps.

E experts, D width, F expert width, X experts a token.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import mesh as meshes
from jaxserve.lite import awq_layout as layout
from jaxserve.lite import rounding
from jaxserve.lite.calibrate import at
from jaxserve.lite.scales import search

FEW = 16  # tokens that an expert is taken to have seen beside its own, with the mean of all: some see none


class Seen(NamedTuple):
    """Of the inputs of gate and up x, and of down y: means over all tokens, and over those of each expert."""

    moments: jax.Array  # float32[D, D]: x x^T
    gate_up: jax.Array  # float32[E, D]: x^2
    down: jax.Array  # float32[E, F]: y^2


def quantized(block, layer, group: int, symmetric: bool, searched: tuple) -> tuple:
    """(The layer as scales have left it, the experts' and the router's tensors, {map: errors}).

    layer: the block's, its attention rounded; searched: the maps whose inputs get scales.
    """
    seen = look(block, layer)
    if "ffn.gate_up" in searched:
        flat = jnp.moveaxis(layer.ffn.gate_up.weight, 0, 1)  # [D, E, 2, F]: outputs of one map
        layer, seen = scaled_together(layer, seen, search(flat, seen.moments, group, symmetric))
    if "ffn.down" in searched:
        pairs = zip(layer.ffn.down.weight, seen.down)
        scales = [search(weight, jnp.diag(power), group, symmetric) for weight, power in pairs]
        layer, seen = scaled_apart(layer, seen, jnp.stack(scales))
    (router,) = block.tensors("ffn.router", layer.ffn.router.weight).items()
    tensors, errors = {f"{router[0]}.weight": router[1]}, {}
    for path, powers in (("ffn.gate_up", seen.gate_up), ("ffn.down", seen.down)):
        made, errors[path] = _rounded(block, layer, path, powers, group, symmetric)
        tensors |= made
    return layer, tensors, errors


def look(block, layer) -> Seen:
    """What comes into the experts of `layer`, a Block's."""
    sums: tuple = ()
    for taken in block.inputs("ffn.gate_up", layer=layer):
        with meshes.on(block.mesh):
            new = _sums(block.cfg, layer.ffn, taken["ffn.gate_up"])
        sums = jax.tree.map(jnp.add, sums, new) if sums else new
    moments, gate_up, down, tokens = sums

    def mean(squares):
        return (squares + FEW * squares.sum(0, keepdims=True) / tokens.sum()) / (tokens[:, None] + FEW)

    return Seen(moments / (tokens.sum() / block.cfg.experts_per_token), mean(gate_up), mean(down))


@partial(jax.jit, static_argnames="cfg")
def _sums(cfg, ffn, x):
    """Sums of Seen's parts, and the tokens of each expert, int32[E]."""
    _, order, tokens = ffn.route(cfg, x)
    rows = x[order // cfg.experts_per_token]
    expert = jnp.repeat(jnp.arange(cfg.experts), tokens, total_repeat_length=len(rows))
    squares = [jnp.square(part) for part in (rows, ffn.inner(rows, tokens))]
    return x.T @ x, *(jax.ops.segment_sum(part, expert, cfg.experts) for part in squares), tokens


def scaled_together(layer, seen: Seen, scale):
    """The same layer with the inputs of all experts, and of the router, divided by `scale` [D]; and what it sees."""
    ffn = layer.ffn
    router = ffn.router.replace(weight=ffn.router.weight * scale[:, None])
    gate_up = ffn.gate_up.replace(weight=ffn.gate_up.weight * scale[None, :, None, None])
    layer = layer.replace(norm2=layer.norm2 / scale, ffn=ffn.replace(router=router, gate_up=gate_up))
    moments = seen.moments / (scale[:, None] * scale[None])
    return layer, seen._replace(moments=moments, gate_up=seen.gate_up / scale[None] ** 2)


def scaled_apart(layer, seen: Seen, scales):
    """The same layer with the inputs of each expert's down divided by its `scales` [E, F]; and what it sees."""
    ffn = layer.ffn
    down = ffn.down.replace(weight=ffn.down.weight * scales[..., None])
    gate_up = ffn.gate_up.replace(weight=ffn.gate_up.weight.at[:, :, 1].divide(scales[:, None]))
    return layer.replace(ffn=ffn.replace(gate_up=gate_up, down=down)), seen._replace(down=seen.down / scales**2)


def _rounded(block, layer, path, powers, group, symmetric):
    """(The tensors of a map of all experts, {way: the error of the outputs as a share of their mean square}).

    powers [E, inputs]: mean squares of each expert's inputs, which are taken to be independent.
    """
    row = block.rows[path]
    tensors: dict = {}
    lost, whole = {"found": 0.0, "nearest": 0.0}, 0.0
    for expert, (weight, power) in enumerate(zip(at(layer, path).weight, powers)):
        flat = weight.reshape(len(weight), -1)
        ways = {
            "found": rounding.clipped(flat, power, group, symmetric),
            "nearest": rounding.round_to_nearest(flat, group, symmetric),
        }
        for way, found in ways.items():
            lost[way] += float(jnp.sum(power[:, None] * jnp.square(flat - found.values())))
        whole += float(jnp.sum(power[:, None] * jnp.square(flat)))
        sources = [np.split(np.asarray(array), len(row.sources), 1) for array in ways["found"]]  # gate first, then up
        for number, source in enumerate(row.sources):
            part = rounding.Rounded(*(parts[number] for parts in sources))  # type: ignore[arg-type]
            tensors |= layout.words(source.format(block.index, expert), part)
    return tensors, {way: error / max(whole, 1e-30) for way, error in lost.items()}
