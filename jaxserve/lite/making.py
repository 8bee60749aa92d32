"""A quantized folder from beginning to end: calibration text, layers, the folder, and what it cost.

What is done to the layers is up to a `Scheme`.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.checkpoint.safetensors import save
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from jaxserve.lite import calibrate, report, writing
from jaxserve.lite.evaluate import resolve
from jaxserve.lite.folder import WINDOWS, Folder, must_be_writable, opened, stamp
from jaxserve.progress import Clock, Lines, bar, stages

HELD_OUT = 8  # windows at most that are measured with, and not calibrated with
SAFE = 30000.0  # half of the largest number of float16
SCORES = ("nll", "top", "weights")  # what `writing.written` says of windows
SMALL = (32, 512)  # windows, and their tokens, on a CPU where nobody says how many

log = logging.getLogger("jaxserve")


class Calibration(NamedTuple):
    """What is looked at, and where the result goes."""

    work_dir: str
    dataset: str = "self"
    samples: int | None = None  # windows; None: 128, on a CPU fewer (`settled`)
    length: int | None = None  # tokens of a window; None: 2048, on a CPU fewer
    batch: int | None = None  # windows computed at once; None: 4, on a CPU 1

    def settled(self, platform: str) -> "Calibration":
        """The same with numbers for what was left open."""
        samples, length, batch = (*SMALL, 1) if platform == "cpu" else (128, 2048, 4)
        return self._replace(samples=self.samples or samples, length=self.length or length, batch=self.batch or batch)


class Scheme(NamedTuple):
    """How a model is quantized.

    in_config(held): the quantization_config for an `engine.loading.Model`, ValueError where it cannot be done;
    run(held, windows, folder, batch, progress): writes the layers into a `Folder`, and returns what is to be told of
    that, or None; settings: what else the result depends on, for a run that goes on; errors_of: what its layers' errors
    are a share of.
    """

    in_config: Callable
    run: Callable
    settings: dict
    errors_of: str = "outputs"


def make(
    model: str | None,
    config: EngineConfig,
    calibration: Calibration,
    scheme: Scheme,
    tell: Callable[[str], object] = log.info,
    show: bool | Lines | None = None,
    measured: bool = True,
):
    """Writes the folder, and returns its path.  tell(line): what people are told; measured: with a report in the end.

    ValueError says what is wrong with the model, the text or the options, and names the layer that fails.
    """
    clock, path = Clock(), str(resolve(model, config))
    with clock.stage("opening"):
        held = open_model(path, config)
    with ExitStack() as stack:
        stack.enter_context(closing(held.source))
        folder, calibration = begun(held, calibration, scheme)
        stack.callback(folder.close)
        if folder.left is not None:
            tell(f"{calibration.work_dir}: is complete but for its report, which is made now")
        elif folder.resumed:
            tell(f"{calibration.work_dir}: an unfinished run goes on")
        elif folder.discarded:
            tell(f"{calibration.work_dir}: begun anew; an unfinished run had other settings, or other files")
        with clock.stage("text"):
            windows, kept, before = texts(path, config, calibration, folder, tell, show, measured)
        if folder.left is None:
            with clock.stage("layers"), bar(held.cfg.layers, show, desc="layers", unit=" layers") as shown:
                told = scheme.run(
                    held, windows, folder, calibration.batch, lambda done, _: shown.update(done - shown.n)
                )
            if told:
                tell(f"layers, {told}")
            errors = [folder.about(layer).get("errors", {}) for layer in range(held.cfg.layers)]
            with clock.stage("saving"), stages(show) as progress:
                dtype = choose_dtype(held, folder) if config.dtype == "auto" else config.dtype
                left = {"errors": errors} if measured else None
                made = folder.finish(dtype, lambda *counts: progress("saving", *counts), left)
            tell(f"{made}: written after {time.perf_counter() - clock.began:.0f} s")
        else:
            errors = folder.left["errors"]
        if measured:
            with clock.stage("report"):
                report.write(path, folder.path, config, kept, errors, tell, show, before, scheme.errors_of)
        folder.forget()
    tell(str(clock))
    return folder.path


def choose_dtype(held, folder) -> str:
    """float16, which every engine has kernels for, unless the hidden states come near what it can hold."""
    largest = max(folder.about(layer).get("largest", 0.0) for layer in range(held.cfg.layers))
    return "float16" if largest < SAFE else "bfloat16"


def begun(held, calibration: Calibration, scheme: Scheme) -> tuple[Folder, Calibration]:
    """The folder that is to be written, and the calibration without open numbers."""
    _must_have_values(held.source)
    calibration = calibration.settled(held.mesh.devices.flat[0].platform)
    if calibration.length > held.cfg.max_position:
        raise ValueError(f"--calib-seqlen {calibration.length} is more than the model's {held.cfg.max_position}")
    known = calibration._asdict() | scheme.settings
    known.pop("work_dir")
    if (file := Path(calibration.dataset).expanduser()).is_file():
        known["text"] = stamp(file)
    return Folder(calibration.work_dir, held.source, scheme.in_config(held), known), calibration


def _must_have_values(source) -> None:
    """ValueError for a checkpoint whose weights are not the model's own."""
    if hasattr(source, "restore"):
        raise ValueError(f"{source.path}: was made by `jaxserve convert`; give the model it was made from")
    if method := getattr(source, "method", None):
        raise ValueError(f"{source.path}: its weights are quantized already ({method}); take the unquantized model")


def texts(path, config, calibration, folder, tell, show, measured=True) -> tuple:
    """Windows to calibrate with, others to measure with, and what the model itself makes of these or None.

    Those of an unfinished run are kept in its folder.
    """
    stored = folder.partial / WINDOWS
    if not stored.exists():
        count = calibration.samples + held_out(calibration.samples)
        scored = held_out(count) if measured else 0
        try:
            found, before = writing.windows(
                path, config, calibration.dataset, count, calibration.length, tell, show, scored
            )
            if len(found) < 2:
                raise ValueError(
                    f"{calibration.dataset}: fills one window of {calibration.length} tokens; one more is needed to "
                    "measure with; give more text, or a smaller --calib-seqlen"
                )
        except BaseException:  # nothing has been done that could be gone on with
            shutil.rmtree(folder.partial, ignore_errors=True)
            raise
        scores = {} if before is None else dict(zip(SCORES, map(np.asarray, before), strict=True))
        new = stored.with_suffix(".new")
        save({"windows": found} | scores, new)
        os.replace(new, stored)
    with opened(stored) as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    windows, known = kept["windows"], [kept[name] for name in SCORES if name in kept] or None
    calibrated = len(windows) - held_out(len(windows))
    return windows[:calibrated], windows[calibrated:], known


def observe(model, config, calibration: Calibration, tell=log.info, show: bool | Lines | None = None) -> Path:
    """Writes activations.safetensors into the work dir: of each input of every map the mean and the largest size."""
    path = str(resolve(model, config))
    held = open_model(path, config)
    target = Path(calibration.work_dir).expanduser() / "activations.safetensors"
    with closing(held.source):
        _must_have_values(held.source)
        calibration = calibration.settled(held.mesh.devices.flat[0].platform)
        must_be_writable(calibration.work_dir)
        count, length = calibration.samples or 0, calibration.length or 0
        windows, _ = writing.windows(path, config, calibration.dataset, count, length, tell, show)
        out: dict[str, np.ndarray] = {}
        with bar(held.cfg.layers, show, desc="layers", unit=" layers") as shown:
            for block in calibrate.layers(held, windows, lambda *_: shown.update(), calibration.batch or 1):
                for path, sizes in _sizes(block).items():
                    for name in block.tensors(path, np.zeros((1, *calibrate.at(block.layer, path).weight.shape[1:]))):
                        out |= {f"{name}.{what}": np.asarray(size) for what, size in sizes.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_suffix(".new")
    save(out, new)
    new.chmod(0o644)  # the library lets nobody else read it
    new.replace(target)
    tell(f"{target}: written; the largest input is {max(float(size.max()) for size in out.values()):.4g}")
    return target


def _sizes(block) -> dict[str, dict]:
    """For each map of a layer absmax and absmean float32[inputs]; experts and their router are left out."""
    paths = [path for path in calibrate.MAPS if block.rows[path].arrange not in calibrate.EXPERT_ARRANGES]
    found: dict[str, dict] = {}
    for taken in block.inputs(*paths):
        for path, x in taken.items():
            size, of = jnp.abs(x), found.setdefault(path, {"absmax": 0.0, "absmean": 0.0})
            of["absmax"] = jnp.maximum(of["absmax"], size.max(0))
            of["absmean"] = of["absmean"] + size.mean(0) / len(block.hidden)
    return found


def held_out(count: int) -> int:
    """How many of so many windows are not calibrated with."""
    return min(HELD_OUT, max(1, count // 3))
