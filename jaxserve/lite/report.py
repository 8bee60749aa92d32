"""What a quantized folder is, beside the model it was made from: size, memory, perplexity, and where it errs.

Perplexity is measured through the engine, on text that was not calibrated with.
"""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxserve.lite import evaluate

FILE, PLOT = "quantization_report.json", "quantization_error.png"


def write(
    model, made: Path, config, windows: np.ndarray, errors: list[dict], tell, show=None, before=None, of="outputs"
) -> dict:
    """Tells a table, and writes it into the folder `made`, with a plot where matplotlib is there.

    windows: int32[n, length] token ids; errors: for each layer {map: its error, or {way: error}}; before: of `measured`
    for the model, where it is known already; of: as for `draw`.
    """
    rows = measured([(model, "before"), (made, "after")], config, windows, show, before)
    for line in table(rows):
        tell(line)
    found = {"tokens": int(windows.size), "rows": rows, "errors": errors}
    (made / FILE).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    try:
        draw(made / PLOT, errors, of)
        tell(f"the error of every layer: {made / PLOT}")
    except ImportError:
        tell(f"the error of every layer: {made / FILE} (a plot needs matplotlib: pip install 'jaxserve[bench]')")
    return found


def measured(models, config, windows, show, first=None) -> list[dict]:
    """A dict for each (model, name): bytes on the disk, of the weights in memory and of all arrays, and perplexity.

    first: (what `evaluate.measure` returns for these windows, bytes of the weights in memory) of the first model.
    """
    rows: list[dict] = []
    for model, name in models:
        if first is None or rows:
            # A GPU multiplies int4 weights with 16 bits only.
            knobs = replace(config, dtype="auto") if rows and jax.default_backend() != "cpu" else config
            with closing(evaluate.opened(model, knobs, windows.shape[1], show)) as engine:
                found = *evaluate.measure(engine, windows, show, name), engine.plan.weights
                del engine
        else:
            found = first
        first = first or found
        sizes = {"disk": evaluate.file_bytes(evaluate.resolve(model, config)), "weights": int(found[2])}
        rows.append({"name": name, **sizes, **evaluate.figures(*found[:2], *first[:2])})
    return rows


def table(rows: list[dict]) -> list[str]:
    """Lines for people."""
    before, after = rows
    mib = 1 << 20
    lines = [f"{'':<32}{'before':>12}{'after':>12}"]
    for words, key in (("weights on the disk, MiB", "disk"), ("weights in memory, MiB", "weights")):
        lines.append(f"{words:<32}{before[key] / mib:>12,.1f}{after[key] / mib:>12,.1f}")
    error = after["change_error"]
    change = f"{100 * after['change']:+.2f} % +- " + ("unknown (one window)" if error is None else f"{100 * error:.2f}")
    lines.append(f"{'perplexity':<32}{before['perplexity']:>12.4f}{after['perplexity']:>12.4f}  {change}")
    lines.append(f"{'the same likeliest token':<32}{'':>12}{after['agreement']:>12.1%}")
    if after["weights"] >= before["weights"]:
        lines.append("in memory a CPU with room keeps values, since it computes faster with them; a GPU keeps integers")
    lines.append(f"measured on {after['tokens']:,} tokens that were not calibrated with")
    return lines


def draw(file: Path, errors: list[dict], of: str = "outputs"):
    """A plot of every map's error over the layers, which is returned; ImportError without matplotlib.

    of: what is in error: the "outputs" over the calibration text, or the "weights" themselves.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, path in enumerate(dict.fromkeys(path for layer in errors for path in layer)):
        for way, style in (("nearest", ":"), ("found", "-")):
            points = [_of(layer.get(path), way) for layer in errors]
            if any(point is not None for point in points):
                values = [np.nan if point is None else point for point in points]
                label = path if way == "found" else None
                axes.plot(values, style, color=f"C{number}", label=label, marker=".")
    axes.set(xlabel="layer", ylabel=f"squared error of a map's {of},\nas a share of their squares", yscale="log")
    if any(_of(error, "nearest") is not None for layer in errors for error in layer.values()):
        axes.set_title("dotted: rounded to nearest", fontsize="small")
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    figure.savefig(file, dpi=120)
    return figure


def _of(error, way):
    if isinstance(error, dict):
        return error.get(way)
    return error if way == "found" else None
