"""What comes into the maps of a layer, while it is rounded map by map: what `awq` chooses integers by.

Everything is computed once: what one map's inputs need of those of the map before is kept.  N windows, B at a time, T
tokens of a window, D width.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve import mesh as meshes
from jaxserve.lite import calibrate


class Seen(NamedTuple):
    """Means over the inputs x of a map, [in] each, and y, what they would be had nothing been rounded before."""

    moments: jax.Array  # float32[in, in]: x x^T
    apart: jax.Array  # float32[in, in]: x (y - x)^T
    owed: jax.Array | None  # float32[in, D]: x r^T, where the outputs are added to hidden states that are off by r

    def scaled(self, scale):
        """The same for x / scale."""
        owed = None if self.owed is None else self.owed / scale[:, None]
        pairs = scale[:, None] * scale[None]
        return Seen(self.moments / pairs, self.apart / pairs, owed)


class Middle:
    """What comes into the maps of a layer, rounded so far (`layer`) and not (`plain`), computed once in order."""

    def __init__(self, block):
        self.block, self.cfg, self.window = block, block.cfg, block.cfg.window_at(block.index)
        self.outer = list(zip(block.hidden, block.exact))  # what comes into the layer: (rounded before it, not)
        self.inner: list = [None] * len(self.outer)  # later what comes into o, then the hidden states in the middle
        self.last: list = []  # what comes into down, where there is room for it
        self.largest: list = []  # of the hidden states that are not rounded

    def seen(self, path, layer, plain) -> Seen:
        """Seen of a map; ask for the maps in order."""
        total, count, pairs, whole = None, 0, [], meshes.sharding(self.block.mesh)
        layer, plain = map(self.block.factors, (layer, plain))
        for outer, inner in zip(self.outer, self.inner):
            count += math.prod(outer[0].shape[:2])
            if total is None:
                shapes = looked.eval_shape(self.cfg, self.window, path, layer, plain, outer, inner, None)
                total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=whole), shapes[0])
            total, new = looked(self.cfg, self.window, path, layer, plain, outer, inner, total)
            if path == "mixer.qkv":
                self.largest.append(new)
            elif path != "ffn.down" or self.block.roomy:
                pairs.append(tuple(map(self.block.keep, new)))
        if path == "ffn.down":
            self.last = pairs
        elif path != "mixer.qkv":
            self.inner = pairs
        return means(total, count)

    def outputs(self, layer, plain) -> tuple[list, list]:
        """The layer's outputs, and those of the unrounded one; everything has been seen."""
        both: tuple[list, list] = [], []
        layer, plain = map(self.block.factors, (layer, plain))
        for number, pair in enumerate(self.inner):
            taken = self.last[number] if self.last else (None, None)
            for out, of, middle, x in zip(both, (layer, plain), pair, taken):
                out.append(self.block.keep(closed(self.cfg, of, middle, x)))
        return both


@partial(
    jax.jit,
    static_argnames=("cfg", "window", "path"),
    donate_argnames="total",
    compiler_options=calibrate.OPTIONS,
)
def looked(cfg, window, path, layer, plain, outer, inner, total):
    """(the sums of a Seen with one more batch, what is needed later: the pair that came in, or the next hidden states)

    Of qkv the latter is the size of the largest hidden state.
    """
    owed, both = None, (layer, plain)
    later: Any
    if path == "mixer.qkv":
        x, y = (calibrate.normed(cfg, of, z) for of, z in zip(both, outer))
        later = jnp.abs(outer[1]).max()
    elif path == "mixer.o":
        later = x, y = tuple(calibrate.attended(cfg, window, of, z) for of, z in zip(both, outer))
        owed = outer[1] - outer[0]
    elif path == "ffn.gate_up":
        later = tuple(calibrate.mixed(of, z, taken) for of, z, taken in zip(both, outer, inner))
        x, y = (calibrate.ready(cfg, of, z) for of, z in zip(both, later))
    else:
        later = x, y = tuple(calibrate.inner(cfg, of, z) for of, z in zip(both, inner))
        owed = inner[1] - inner[0]
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    kind = layer.mixer.qkv.weight.dtype

    def beside(other):
        return jnp.matmul(x.astype(kind).T, other.astype(kind), preferred_element_type=x.dtype)

    new = Seen(beside(x), beside(y - x), None if owed is None else beside(owed.reshape(len(x), -1)))
    return (new if total is None else jax.tree.map(jnp.add, total, new)), later


@partial(jax.jit, static_argnames="count", donate_argnames="total")
def means(total, count):
    """The Seen of sums over so many tokens."""
    return jax.tree.map(lambda part: part / count, total)


@partial(jax.jit, static_argnames="cfg", compiler_options=calibrate.OPTIONS)
def closed(cfg, layer, middle, taken):
    """A layer's output, of the hidden states in its middle and, where it is known, what comes into down."""
    return calibrate.fed(cfg, layer, middle) if taken is None else middle + calibrate.product(layer.ffn.down, taken)
