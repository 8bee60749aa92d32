"""From the name of a model to a running engine: plan the memory, compile, read the weights, start."""

import os
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import NamedTuple

# Memory is planned here, not taken behind the user's back.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast over NVLink fails in many containers

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve import __version__, checkpoint, hub, ops, weights
from jaxserve import mesh as meshes
from jaxserve.checkpoint.orbax import save
from jaxserve.checkpoint.schemes import Packed
from jaxserve.engine.engine import Engine
from jaxserve.engine.guide import Guide
from jaxserve.engine.memory import free_bytes, make_plan
from jaxserve.engine.programs import compile_all
from jaxserve.engine.runner import Runner
from jaxserve.models.config import ModelConfig, from_hf
from jaxserve.models.decoder import Params

UNPACKED_SHARE = 0.5  # of the free memory, that values of quantized weights may take on the CPU
AHEAD, PIECE = (".safetensors", ".gguf"), 64 << 20  # files that are read ahead, in pieces of so many bytes
FORMATS = {None: ("hf", "llama"), "smooth_quant": ("hf", "smooth_quant")}  # what may be asked for, by what is there


def _quiet(*_):
    pass


class Model(NamedTuple):
    """A checkpoint, and how this machine will hold it."""

    source: object  # a Checkpoint
    cfg: ModelConfig  # as the checkpoint's config says
    mesh: Mesh
    dtype: np.dtype
    shapes: Params  # of ShapeDtypeStructs: what `read` returns
    held: dict  # of `weights.hold`

    def read(self, progress=_quiet, folder=None):
        """The weights on their devices.  `progress(done, total)` counts bytes; folder: of stored programs."""
        if hasattr(self.source, "restore"):  # converted before
            return self.source.restore(self.shapes, progress)
        compiled = partial(compile_all, devices=list(self.mesh.devices.flat), folder=folder)
        return weights.load(self.source, self.cfg, self.mesh, self.dtype, progress, self.held, compiled)

    def holds(self):
        """How quantized weights are held, for people; None where there are none."""
        method = getattr(self.source, "method", None) or getattr(self.source, "meta", {}).get("method")
        if not method:
            return None
        kept = sorted({how.kind for how in self.held.values() if not how.spread})
        if kept:
            return f"{method} weights, held as {' and '.join(kept)}"
        values = f"{method} weights, held as {self.dtype.name} values"
        return f"{values}: on the CPU that takes memory, and no time to unpack" if runs_on_cpu(self.mesh) else values


def open_model(model, config):
    """The Model of a folder, a GGUF file, a hub's id, or (None) the default model.  Reads no weights."""
    source = checkpoint.open(hub.resolve(model, config.revision, config.download_dir))
    cfg = model_config(source, config)
    mesh = meshes.make_mesh(config.tp)
    dtype = np.dtype(jnp.dtype(choose_dtype(cfg, config, mesh, source)))
    held = converted(source) if hasattr(source, "restore") else choose_held(source, cfg, mesh, dtype)
    shapes = weights.shapes(cfg, mesh, source.names, dtype, held)
    if hasattr(source, "restore"):  # before anything is compiled
        source.check(shapes)
    else:
        weights.check(source, cfg, mesh, held)
    return Model(source, cfg, mesh, dtype, shapes, held)


def choose_held(source, cfg, mesh, dtype):
    """How quantized weights are held (see `weights.hold`).

    On the CPU as values, which take up to eight times the memory, where half of what is free has room for them: to
    unpack 4 bits at every step makes a step slower than an unquantized one.
    """
    if not getattr(source, "packed", None):
        return {}
    if runs_on_cpu(mesh):
        spread = weights.hold(source, cfg, mesh, spread=True)
        size = weights.nbytes(weights.shapes(cfg, mesh, source.names, dtype, spread))
        if size <= free_bytes(list(mesh.devices.flat)) * UNPACKED_SHARE:
            return spread
    return weights.hold(source, cfg, mesh)


def converted(source):
    """How the weights of a converted folder are held; ValueError where this machine would hold them otherwise."""
    if (made := source.meta.get("layout")) not in (None, ops.layout()):
        raise ValueError(
            f"{source.path}: its quantized weights are laid out for {made}, and this machine needs them laid out for "
            f"{ops.layout()}; convert the original folder again here"
        )
    return {path: Packed(*how) for path, how in source.meta.get("held", {}).items()}


def load(model, config, report=_quiet, progress=_quiet, guide=None, scores_only=False, once=False):
    """An Engine that answers with `model` (see `open_model`).

    guide: for guided decoding, the tokenizer's table for llguidance, or what makes it when it is needed first.
    scores_only: the engine will answer no request, only `score`; once: it is for work that is soon over (see Runner).
    There is less to compile.

    `report(text)` gets lines for people: the memory plan, what was chosen, how long it took.
    `progress(what, done, total)` is called while compiling (programs) and loading (bytes).  ValueError says what is
    wrong with the model, the configuration or the machine.
    """
    began = time.perf_counter()
    held = open_model(model, config)
    run_as = weights.padded(held.cfg, config.tp)
    size, values = weights.nbytes(held.shapes), weights.scratch(held.shapes)
    plan = make_plan(run_as, config, list(held.mesh.devices.flat), size, held.dtype, values)
    report(str(plan))
    if holds := held.holds():
        report(holds)
    runner = Runner(run_as, held.mesh, plan, held.dtype, held.shapes, scores_only, once)
    _compile_and_read(runner, held, report, progress)
    if (used := runner.workspace()) > plan.workspace:
        report(f"note: the largest program needs {used / 2**30:.2f} GiB of workspace, more than planned")
    warming = time.perf_counter()
    runner.reset()
    runner.warm_up()
    report(f"warmed up in {time.perf_counter() - warming:.1f} s")
    original = held.cfg.rope.original if held.cfg.rope.kind == "dynamic" else None
    if guide is not None:
        guide = Guide(guide, runner.vocab)
    engine = Engine(runner, prefix_caching=config.enable_prefix_caching, rope_original=original, guide=guide)
    engine.path, engine.config, engine.plan, engine.dtype = held.source.path, held.cfg, plan, held.dtype.name
    engine.checkpoint_config, engine.generation_config = held.source.config, held.source.generation_config
    engine.info = {
        "path": str(held.source.path),
        "session_len": plan.session_len,
        "max_batch_size": plan.lanes,
        "vocab": held.cfg.vocab,
        "width": held.cfg.width,
        "dtype": held.dtype.name,
        "checkpoint_config": held.source.config,
        "generation_config": held.source.generation_config,
        "cache_tokens": plan.tokens,
        "version": __version__,
    }
    held.source.close()
    engine.settle()
    report(f"ready after {time.perf_counter() - began:.1f} s")
    return engine


def _compile_and_read(runner, held, report, progress):
    """Compiles the programs, then loads the weights, whose files are read ahead meanwhile.

    Not both at once: XLA times kernels on arrays as large as the KV cache, and weights that come to lie between these
    would leave no room in one piece for the cache itself.  Where all programs are stored it has nothing to time.
    """
    began, over = time.perf_counter(), threading.Event()
    one_by_one, counts, reading = threading.Lock(), (0, 0, 0), None
    folder = hub.cache_dir() / "programs"

    def read():
        begun = time.perf_counter()
        params = jax.block_until_ready(held.read(partial(progress, "loading"), folder))
        return params, time.perf_counter() - begun

    def stored():
        nonlocal reading
        reading = _begun(read)
        reading.add_done_callback(lambda _: compiled())

    def compiled(*now):  # or, with nothing new, the weights have been read
        nonlocal counts
        with one_by_one:
            left = bool(now) or counts[0] < counts[1]
            counts = now or counts
            if left and (reading is None or reading.done()):  # one bar at a time
                progress("compiling", *counts[:2])

    ahead = threading.Thread(target=_read_ahead, args=(held.source.path, over), name="jaxserve-read-ahead", daemon=True)
    ahead.start()
    try:
        runner.compile(folder, compiled, stored)
    finally:
        over.set()
    compiling = time.perf_counter() - began
    ready = f"{len(runner.programs)} programs ready in {compiling:.1f} s ({counts[2]} from the cache)"
    if reading is None:
        report(ready)
    runner.params, took = reading.result() if reading else read()
    if reading:  # no line before, into the bar of the weights
        report(ready)
    report(f"weights loaded in {took:.1f} s")


def _begun(function):
    """A Future of what the function returns, which runs on a thread that nobody waits for who leaves."""
    future: Future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="jaxserve-read", daemon=True).start()
    return future


def _read_ahead(path, over):
    """Asks the system for a checkpoint's large files, so that they are in memory when they are needed."""
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.suffix in AHEAD]
    for file in sorted(files):
        try:
            with open(file, "rb", buffering=0) as opened:
                for offset in range(0, file.stat().st_size, PIECE):
                    if over.is_set():
                        return
                    os.posix_fadvise(opened.fileno(), offset, PIECE, os.POSIX_FADV_WILLNEED)
        except (OSError, AttributeError):  # whoever reads it then says what is wrong; macOS has no such call
            return


def convert(model, folder, config, report=_quiet, progress=_quiet):
    """Saves a model's weights in the new `folder` as the engine holds them, for this tp and dtype.

    Reports both load times.
    """
    held = open_model(model, config)
    if hasattr(held.source, "restore"):
        raise ValueError(f"{held.source.path} is converted already")
    began = time.perf_counter()
    params = jax.block_until_ready(held.read(lambda done, total: progress("loading", done, total)))
    slow = time.perf_counter() - began
    meta = {"dtype": held.dtype.name, "tp": config.tp, "kv_heads": weights.padded(held.cfg, config.tp).kv_heads}
    if method := getattr(held.source, "method", None):
        meta |= {"method": method, "layout": ops.layout(), "held": held.held}
    save(params, meta, folder, held.source, lambda done, total: progress("saving", done, total))
    del params
    began = time.perf_counter()
    with checkpoint.open(folder) as again:
        again.restore(held.shapes, lambda done, total: progress("loading", done, total))
    if holds := held.holds():
        report(holds)
    report(f"loading took {slow:.1f} s from {held.source.path}, {time.perf_counter() - began:.1f} s from {folder}")


def runs_on_cpu(mesh):
    """Whether a mesh's devices are the processor's."""
    return mesh.devices.flat[0].platform == "cpu"


def model_config(source, config):
    """The checkpoint's ModelConfig with what `config` overrides."""
    method, asked = getattr(source, "method", None), config.model_format
    method = method or getattr(source, "meta", {}).get("method")  # of what was converted
    if asked and asked not in FORMATS.get(method, (method,)):
        found = f"{method} weights" if method else "unquantized weights"
        raise ValueError(f"{source.path}: model_format={asked}, and the checkpoint has {found}; leave the option out")
    cfg = from_hf(source.config)
    if factor := config.rope_scaling_factor:
        cfg = replace(
            cfg, rope=replace(cfg.rope, kind="dynamic", factor=factor, original=cfg.rope.original or cfg.max_position)
        )
    return cfg


def choose_dtype(cfg, config, mesh, source):
    """The type to compute in.

    As asked; that of a converted folder; on the CPU float32, for the others are slow there; else the checkpoint's,
    if it has 16 bits.
    """
    if config.dtype != "auto":
        return config.dtype
    if hasattr(source, "meta"):
        return source.meta["dtype"]
    if runs_on_cpu(mesh):
        return "float32"
    return cfg.dtype if cfg.dtype != "float32" else "bfloat16"
