"""From the name of a model to a running engine: plan the memory, compile, read the weights, start."""

from dataclasses import replace
import logging
import os
import time

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # memory is planned here, not taken behind the user's back
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp

from jaxserve import checkpoint, hub, weights
from jaxserve import mesh as meshes
from jaxserve.engine.engine import Engine
from jaxserve.engine.memory import make_plan
from jaxserve.engine.runner import Runner
from jaxserve.models.config import from_hf

log = logging.getLogger("jaxserve")


def _quiet(*_):
    pass


def load(model, config, report=_quiet, progress=_quiet):
    """An Engine that answers with `model` (a folder, a GGUF file, a hub's id, or None for the default model).

    `report(text)` gets lines for people: the memory plan, what was chosen, how long it took.  `progress(what, done, total)` is called
    while compiling (programs) and loading (bytes).  ValueError says what is wrong with the model, the configuration or the machine.
    """
    began = time.perf_counter()
    source = checkpoint.open(hub.resolve(model, config.revision, config.download_dir))
    cfg = model_config(source, config)
    mesh = meshes.make_mesh(config.tp)
    dtype = jnp.dtype(choose_dtype(cfg, config, mesh))
    run_as = weights.padded(cfg, config.tp)
    shapes = weights.shapes(cfg, mesh, source.names, dtype)
    plan = make_plan(run_as, config, list(mesh.devices.flat), weights.nbytes(shapes), dtype)
    report(str(plan))
    runner = Runner(run_as, mesh, plan, dtype, shapes)
    found = 0

    def compiled(done, total, loaded):
        nonlocal found
        found = loaded
        progress("compiling", done, total)

    runner.compile(executables_folder(), compiled)
    ready = time.perf_counter()
    report(f"{len(runner.programs)} programs ready after {ready - began:.1f} s ({found} from the cache)")
    runner.params = weights.load(source, cfg, mesh, dtype, lambda done, total: progress("loading", done, total))
    runner.reset()
    report(f"weights loaded in {time.perf_counter() - ready:.1f} s")
    if (used := runner.workspace()) > plan.workspace:
        report(f"note: the largest program needs {used / 2**30:.2f} GiB of workspace, more than planned")
    runner.warm_up()
    original = cfg.rope.original if cfg.rope.kind == "dynamic" else None
    engine = Engine(runner, prefix_caching=config.enable_prefix_caching, rope_original=original)
    engine.path, engine.config, engine.plan, engine.dtype = source.path, cfg, plan, dtype.name
    engine.checkpoint_config, engine.generation_config = source.config, source.generation_config
    source.close()
    report(f"ready after {time.perf_counter() - began:.1f} s")
    return engine


def model_config(source, config):
    """The checkpoint's ModelConfig with what `config` overrides."""
    cfg = from_hf(source.config)
    if factor := config.rope_scaling_factor:
        cfg = replace(
            cfg, rope=replace(cfg.rope, kind="dynamic", factor=factor, original=cfg.rope.original or cfg.max_position)
        )
    return cfg


def choose_dtype(cfg, config, mesh):
    """The type to compute in: as asked; else float32 on the CPU, which is slow in others, and on a GPU the checkpoint's 16-bit type."""
    if config.dtype != "auto":
        return config.dtype
    if mesh.devices.flat[0].platform == "cpu":
        return "float32"
    return cfg.dtype if cfg.dtype != "float32" else "bfloat16"


def executables_folder():
    """Where compiled programs are kept."""
    return hub.cache_dir() / "programs"
