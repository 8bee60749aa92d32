"""The decoder that all families share: embedding, layers, final norm.

A family is a table of weights; what a family lacks is a None leaf, and what differs is another node in a layer.
"""

from functools import partial
from typing import Any

import jax
from flax import struct

from jaxserve.models import rope
from jaxserve.models.layers import rms_norm


@struct.dataclass
class Layer:
    norm1: jax.Array  # [D]
    mixer: Any  # attention
    norm2: jax.Array  # [D]
    ffn: Any


@struct.dataclass
class Params:
    embed: jax.Array  # [V, D]
    layers: tuple[Layer, ...]
    norm: jax.Array  # [D]
    head: Any  # D -> V


def forward(cfg, params, cache, token, spans):
    """Token ids [T] to the final hidden states [T, D], and the cache with this step's keys and values in it."""
    x = params.embed[token]
    cos, sin = rope.rotation(cfg, spans)  # [T, H/2]
    # Layers are unrolled: a scan over stacked weights makes XLA copy every layer's weights.
    for index, layer in enumerate(params.layers):
        x, cache = block(cfg, cfg.window_at(index), layer, index, x, cos, sin, cache, spans)
    return rms_norm(x, params.norm, cfg.eps), cache


def fuses(params, tokens):
    """Whether each product with a layer's map is a kernel of ours, which has what stands around it in it, too."""
    x = jax.ShapeDtypeStruct((tokens, params.embed.shape[1]), params.embed.dtype)
    return all(part.fuses(x) for layer in params.layers for part in (layer.mixer, layer.ffn))


@partial(jax.jit, static_argnames=("cfg", "window"))  # traced once for all layers alike; XLA puts it in their places
def block(cfg, window, layer, index, x, cos, sin, cache, spans):
    """One layer, the `index`-th: x [T, D] to the same shape, and the cache with its keys and values."""
    with jax.named_scope("mixer"):
        x, cache = layer.mixer(cfg, index, window, layer.norm1, x, cos, sin, cache, spans)
    with jax.named_scope("ffn"):
        return layer.ffn(cfg, layer.norm2, x), cache
