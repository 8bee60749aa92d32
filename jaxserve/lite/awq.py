"""`jaxserve lite auto_awq`: a model's layers in 4 bits, in a folder of AutoAWQ's layout.

Layer by layer, and in a layer map by map, each with the inputs that the rounded ones before it make:
1. Inputs that matter are made larger before they are rounded, and what comes before them smaller (Lin et al., 2023:
   AWQ): scales act^a / weight^b of every input, a and b by the error of the map's outputs.  They go into the norm
   before qkv and before gate and up, into v before o, and into up before down, so that the model stays the same.
2. Each group's range, and every integer, is chosen as `rounding` says.
A mixture's experts have scales too, and the rest of it is simpler: `experts`.
The result has no more in it than any AWQ folder: integers, scales, zeros and norms.

Measured (2026-11-21): SmolLM2-135M-Instruct in groups of 64, perplexity on 64 windows of the second half of 1000
ShareGPT chats; rounded to nearest it has 27.0 % more.  On 2 CPU cores, with 32 windows of 512 tokens that the model
wrote, 8.6 % more (10.63, not 9.78) after 11 minutes; with 16 windows 8.3, 9.1 and 9.7 % in three runs whose last bits
differed, which one integer after the other makes more of.  The same program makes the same bytes again there.  On an
H200, with 128 windows of 2048, 7.5 % (10.51) after 54 s, of which the layers took 18.  An 8B's shapes took 148 s there
with nothing compiled yet: text 39 s, layers 85, saving 10, report 14.

D width, K kv heads, G queries a kv head, H head dim, F ffn.
"""

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import mesh as meshes
from jaxserve.lite import awq_layout as layout
from jaxserve.lite import calibrate, experts, middles, rounding
from jaxserve.lite.calibrate import at, placed
from jaxserve.lite.scales import fold, search
from jaxserve.models import family
from jaxserve.models.decoder import Layer
from jaxserve.models.layers import GatedMLP
from jaxserve.progress import Clock

log = logging.getLogger("jaxserve")
GROUPS = (128, 64, 32, 16, 8)
VERSION = 2  # of what is done to the layers: a run that another one began is not gone on with
SEARCHES = {"none": (), "norms": ("mixer.qkv", "ffn.gate_up"), "all": calibrate.MAPS}


class Settings(NamedTuple):
    """What an AWQ folder is made with."""

    group: int
    symmetric: bool = False
    search: str = "norms"  # one of SEARCHES
    rounds: int = rounding.ROUNDS

    def in_config(self, skipped: list[str]) -> dict:
        """quantization_config of config.json, as AutoAWQ has it; skipped: maps that stay as they are."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,  # symmetric ones have it, too: it is 8
            "modules_to_not_convert": skipped or None,
        }


def choose_group(cfg, asked: int | None = None) -> int:
    """The inputs that share a scale: as asked for, or the largest of GROUPS that divides the inputs of all maps.

    ValueError where what was asked for does not divide them, with the largest that does, or where none fits.
    """
    rows = quantized_rows(cfg)
    inputs = sorted({shape[1] for row in rows for shape in row.shapes})
    outputs = sorted({shape[0] for row in rows for shape in row.shapes})
    if odd := [count for count in outputs if count % 8]:
        raise ValueError(f"the model has maps with {odd[0]} outputs; 8 of them share a word, so 8 has to divide them")
    common = math.gcd(*inputs)
    fits = next((group for group in GROUPS if common % group == 0), None)
    if fits is None:
        raise ValueError(
            f"the model's maps have {', '.join(map(str, inputs))} inputs, which no group of 8 or more fits"
        )
    if asked is not None and asked % 8:
        raise ValueError(f"a group has a multiple of 8 inputs, not {asked}; --w-group-size {fits} is the largest here")
    if asked is not None and common % asked:
        raise ValueError(
            f"groups of {asked} do not divide the maps' inputs ({', '.join(map(str, inputs))}); "
            f"--w-group-size {fits} is the largest that does"
        )
    return asked or fits


def quantized_rows(cfg) -> list:
    """Rows of the family's table whose maps are quantized: all in the layers but routers."""
    rows = family(cfg.family).weights(cfg)
    return [row for row in rows if "{}" in row.path and row.arrange is not None and not row.path.endswith("router")]


def skipped(cfg) -> list[str]:
    """Names of maps in the layers that are not quantized."""
    routers = [row for row in family(cfg.family).weights(cfg) if row.path.endswith("router")]
    layers = range(cfg.layers)
    return [source.format(i) for row in routers for i in row.layers or layers for source in row.sources]


def quantize(model, windows, folder, settings: Settings, *, batch: int = 1, progress=None, watch=None, clock=None):
    """Writes all layers of a model into `folder`; the caller finishes it.

    model: of `engine.loading.open_model`; windows: int32[N, T] token ids to calibrate with, `batch` at a time; folder:
    a `folder.Folder`, whose finished layers are not done again.  progress(done, total) counts layers; clock: a
    `progress.Clock` that is told what takes how long; watch(block, layer, about) is told what became of each layer.
    ValueError names the layer and the map that fails.
    """
    clock = clock or Clock()
    with ThreadPoolExecutor(1) as writer:  # writes a layer while the next one is computed
        writing = None
        for block in _timed(calibrate.layers(model, windows, progress, batch, both=True), clock, "outputs"):
            if block.quick and block.index == 0:
                with clock.stage("compiling"):
                    compile_ahead(block, settings, windows.size)
            if folder.done(block.index):
                with clock.stage("reading"):
                    block.follow(layer := layout.restored(block, folder.read(block.index)))
            else:
                made = quantized(block, settings, windows.size, clock)
                if writing is not None:
                    with clock.stage("writing"):
                        writing.result()
                writing = writer.submit(folder.write, block.index, made.tensors, made.about)
                if watch is not None or made.layer is None:
                    writing.result()
                with clock.stage("reading"):
                    layer = made.layer or layout.restored(block, folder.read(block.index))
                block.follow(layer, made.outputs)
            if watch is not None:
                watch(block, layer, folder.about(block.index))
        with clock.stage("writing"):
            if writing is not None:
                writing.result()


def _timed(blocks, clock, stage):
    """The blocks; what making them takes belongs to a stage."""
    while True:
        with clock.stage(stage):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def compile_ahead(block, settings: Settings, tokens: int) -> None:
    """Compiles what dense layers take, all at once: done one by one, when it is first called, that takes a minute.

    What is not foreseen here compiles itself when it is called.
    """
    layer, middle = block.layer, middles.Middle(block)
    if not isinstance(layer.ffn, GatedMLP):
        return
    where, kernels = meshes.sharding(block.mesh), rounding.kernels_for(block.mesh, settings.group)
    factors, (outer, *_) = block.factors(layer), middle.outer

    def made(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    jobs: list[tuple] = []
    inner: tuple = ()
    for path in calibrate.MAPS:
        given = block.cfg, middle.window, path, factors, factors, outer, inner or None
        total, later = made(middles.looked.eval_shape(*given, None))
        weight, asked = at(layer, path).weight, SEARCHES[settings.search]
        ways = weight, total, tokens, settings, kernels
        found = made(_rounded_whole.eval_shape(*ways))[0]
        jobs += [(middles.looked, *given, total), (middles.means, total, tokens), (_rounded_whole, *ways)]
        jobs.append((layout.packing, *layout.packing_of(block, path, found, weight.shape)))
        if path in asked and path in ("mixer.qkv", "ffn.gate_up"):
            jobs.append((search, weight, total.moments, settings.group, settings.symmetric))
            jobs += [(_fold_whole, layer, path, made(layer.norm1)), (WHOLE[2], total, made(layer.norm1))]
        if path == "ffn.down":
            jobs.append((middles.closed, block.cfg, factors, inner[0], later[0] if block.roomy else None))
        elif path != "mixer.qkv":
            inner = later

    def compiled(lowered):
        try:
            lowered.compile()
        except Exception as error:  # a compiler that found no room for its process: it is tried again when called
            log.debug("not compiled ahead: %s", error)

    most = min(len(jobs), os.cpu_count() or 1)
    with jax.default_matmul_precision(block.precision), ThreadPoolExecutor(most) as pool:
        for function, *rest in jobs:  # lowering holds the interpreter, and Triton knows one thread
            pool.submit(compiled, function.lower(*rest))


class Made(NamedTuple):
    """A quantized layer."""

    tensors: dict  # by their names in the folder
    about: dict  # what is told of it: its maps' errors, the largest input
    layer: Layer | None = None  # as it is read again from the tensors; None: not known
    outputs: tuple | None = None  # of it, and of the unquantized one, as `Block.follow` takes them


def quantized(block, settings: Settings, tokens: int, clock=None) -> Made:
    """A layer's tensors, and what became of it."""
    with jax.default_matmul_precision(block.precision):
        return _quantized(block, settings, tokens, clock or Clock())


def _quantized(block, settings, tokens, clock):
    plain = layer = block.layer  # scaled alike; one of them is rounded, map by map
    tensors: dict = {}
    errors, middle = {}, middles.Middle(block)
    sparse = not isinstance(layer.ffn, GatedMLP)
    kernels = rounding.kernels_for(block.mesh, settings.group)
    # A GPU compiles what it does whole; on the CPU the same is done step by step, as the figures above are of.
    rounded, folded, scaled = WHOLE if block.quick else (_rounded, fold, middles.Seen.scaled)
    for path in calibrate.MAPS[: 2 if sparse else None]:
        with clock.stage("inputs"):
            seen = middle.seen(path, layer, plain)
            _must_be_finite(seen, block, path, "inputs")
        with clock.stage("scales"):
            for of, scale in searched(block, path, layer, seen.moments, settings):
                layer, plain = folded(layer, of, scale), folded(plain, of, scale)
                seen = scaled(seen, scale) if of == path else seen
        with clock.stage("integers"):
            weight = at(layer, path).weight
            found, values, errors[path] = rounded(weight, seen, tokens, settings, kernels)
            _must_be_finite(found, block, path, "scales")
            tensors |= layout.packed(block, path, found, weight.shape)
        layer = placed(layer, path, values)
        tensors |= layout.biases(block, path, layer)
    whole, outputs = None if sparse else layer, None
    if sparse:
        layer, packed, lost = experts.quantized(
            block, layer, settings.group, settings.symmetric, SEARCHES[settings.search]
        )
        tensors, errors = tensors | packed, errors | lost
    elif block.quick:
        with clock.stage("outputs"):
            outputs = middle.outputs(layer, plain)
    tensors |= layout.norms(block, layer)
    about = {"errors": jax.tree.map(float, errors), "largest": max(map(float, middle.largest))}
    return Made(tensors, about, whole, outputs)


def _rounded(weight, seen, tokens, settings, kernels):
    """(a map's Rounded, its values, {way: the error of the outputs as a share of their mean square})."""
    flat = weight.reshape(len(weight), -1)
    moments = rounding.damped(seen.moments, tokens)
    target = _target(flat, seen, moments)
    found = rounding.solved(target, moments, settings.group, settings.symmetric, settings.rounds, kernels)
    nearest = rounding.round_to_nearest(flat, settings.group, settings.symmetric)
    errors = _errors(target, seen.moments, found=found, nearest=nearest)
    return found, found.values().reshape(weight.shape), errors


_rounded_whole = jax.jit(
    _rounded, static_argnames=("tokens", "settings", "kernels"), compiler_options=calibrate.OPTIONS
)
_fold_whole = jax.jit(fold, static_argnames="path")


WHOLE = _rounded_whole, _fold_whole, jax.jit(middles.Seen.scaled)


@jax.jit
def _target(weight, seen, moments):
    """The weight with which the map's inputs as they are come closest to what the unrounded model has here.

    That is what its own inputs and weight make, and what the hidden states lack that the outputs are added to.  It
    halves the error that adds up over the layers of SmolLM2-135M.
    """
    wanted = seen.apart @ weight
    if seen.owed is not None:
        wanted = wanted + seen.owed
    return weight + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(moments), wanted)


def searched(block, path, layer, moments, settings):
    """[(path, scales)] to be folded before `path` is rounded: its own, and those of the map that its outputs come to.

    v and up, which the inputs of o and down come from, are rounded with q and gate.
    """
    asked, ways = SEARCHES[settings.search], (settings.group, settings.symmetric)
    if path in ("mixer.o", "ffn.down"):
        return []
    out = [(path, search(at(layer, path).weight, moments, *ways))] if path in asked else []
    behind = {"mixer.qkv": "mixer.o", "ffn.gate_up": "ffn.down"}[path]
    if behind in asked:
        shape = at(layer, path).weight.shape  # of q, k and v: [D, K, G+2, H]
        tie = (shape[1], shape[2] - 2, shape[3]) if behind == "mixer.o" else None
        total, count = 0.0, 0
        for taken in block.inputs(behind, layer=layer):
            total, count = total + taken[behind].T @ taken[behind], count + len(taken[behind])
        out.append((behind, search(at(layer, behind).weight, total / count, *ways, tie)))
    return out


def _errors(weight, moments, **ways):
    """{way: the error of the outputs as a share of their mean square}."""
    out = {}
    for name, found in ways.items():
        lost, all_of_it = rounding.error(weight, found.values(), moments)
        out[name] = lost / jnp.maximum(all_of_it, 1e-30)
    return out


@jax.jit
def _finite(arrays):
    return jnp.all(jnp.stack([jnp.isfinite(part).all() for part in jax.tree.leaves(arrays)]))


def _must_be_finite(array, block, path, what):
    if not bool(_finite(array)):
        name = ", ".join(block.tensors(path, np.zeros((1, *at(block.layer, path).weight.shape[1:]), np.uint8)))
        raise ValueError(
            f"layer {block.index}: the {what} of {name} are no numbers, or too large; the weights are damaged, or the "
            "calibration text is nothing that the model can read"
        )
