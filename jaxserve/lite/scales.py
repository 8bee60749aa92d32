"""Scales of a map's inputs: which make its rounding cost least, and what takes them up before it (see `awq`)."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxserve.lite import rounding
from jaxserve.lite.calibrate import OPTIONS, at, placed

POWERS = tuple((a / 20, b) for a in range(2, 15, 2) for b in (0.0, a / 20))  # (a, b) that are tried beside (0, 0)
OUTPUTS = 1024  # of a map that a scale is judged by
WORTH = 0.99  # a scale has to make the error smaller than this share


@partial(jax.jit, static_argnames=("group", "symmetric", "tie"), compiler_options=OPTIONS)
def search(weight, moments, group: int, symmetric: bool = False, tie: tuple | None = None):
    """Scales float32[inputs] by which inputs are divided and weights multiplied; ones where none is worth it.

    weight [inputs, *outputs]; tie: (K, G, H) where the inputs of G queries share a scale.
    """
    flat = weight.reshape(len(weight), -1)

    def shared(x):
        return x if tie is None else jnp.broadcast_to(x.reshape(tie).mean(1, keepdims=True), tie).reshape(-1)

    power, size = shared(jnp.diag(moments)), shared(jnp.abs(flat).mean(1))
    act = jnp.sqrt(jnp.maximum(power, 1e-12 * jnp.maximum(power.max(), 1e-30)))
    size = jnp.maximum(size, 1e-4 * jnp.maximum(size.max(), 1e-30))
    judged = flat[:, :: max(1, flat.shape[1] // OUTPUTS)]

    def tried(powers):
        scale = act ** powers[0] / size ** powers[1]
        scale = jnp.clip(scale / jnp.sqrt(scale.max() * scale.min()), 1 / 64, 64)
        return scale, _judged(judged, moments, scale, group, symmetric)

    scales, lost = jax.lax.map(tried, jnp.array(((0.0, 0.0), *POWERS), jnp.float32))
    return scales[jnp.argmin(lost.at[0].multiply(WORTH))]


def _judged(weight, moments, scale, group, symmetric):
    """The error of a map whose inputs are scaled, with clipped ranges and nothing else."""
    found = rounding.clipped(weight * scale[:, None], jnp.diag(moments) / scale**2, group, symmetric)
    return rounding.error(weight, found.values() / scale[:, None], moments)[0]


def fold(layer, path, scale):
    """The same layer with the inputs of `path` divided by `scale` [inputs], its weight multiplied."""
    weight = at(layer, path).weight
    layer = placed(layer, path, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if path == "mixer.qkv":
        return layer.replace(norm1=layer.norm1 / scale)
    if path == "ffn.gate_up":
        return layer.replace(norm2=layer.norm2 / scale)
    before, which = {"mixer.o": ("mixer.qkv", -1), "ffn.down": ("ffn.gate_up", 1)}[
        path
    ]  # v of [K, G+2, H], up of [2, F]
    node = at(layer, before)
    if path == "mixer.o":
        _, heads, rows, width = node.weight.shape
        scale = scale.reshape(heads, rows - 2, width)[:, 0]  # the same for all queries of a head
    share = jnp.ones(node.weight.shape[1:]).at[..., which, :].set(1 / scale)
    new = {"weight": node.weight * share[None]}
    if node.bias is not None:
        new["bias"] = node.bias * share
    part, name = before.split(".")
    return layer.replace(**{part: getattr(layer, part).replace(**{name: node.replace(**new)})})
