"""Draws tokens/s against the number of requests, from bench_offline.py's figures, with the device's limit.

    python scripts/plot_bench.py docs/throughput.png docs/h200/*.jsonl --model il18-bf16 1.7 3.4 98

Each --model is a panel: its name in the results, the billions of weights that a token is multiplied with, the GB (10^9
bytes) that they take, and the KB (10^3 bytes) of a token's keys and values.  Results are as for bench_compare.py, of
any engines: a curve for each (lat1 and the batchN workloads; of lat1 the tokens/s after the first token).  The limit:
prompts cost two operations a weight of the tensor cores, and a step of decoding reads all weights and the keys and
values of all requests.
"""

import argparse
import itertools
import math
from pathlib import Path

import bench_compare
import numpy as np

try:
    import matplotlib
except ImportError:
    raise SystemExit("plot_bench.py draws with matplotlib: pip install '.[bench]'") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPT, ANSWER = 512, 256  # tokens of a request in workloads.py
COLOURS = {"jaxserve": "C0", "LMDeploy": "C1", "vLLM": "C2"}  # by name without version


def curves(paths, model):
    """{engine: [(requests, tokens/s)]} of a model."""
    out = {}
    for path in paths:
        for (name, work, tp), row in bench_compare.results(path).items():
            if name == model and tp == 1 and (work == "lat1" or work[5:].isdecimal()):
                point = (1, 1000 / row["itl_ms"]) if work == "lat1" else (int(work[5:]), row["out_tok_s"])
                out.setdefault(row["engine"], []).append(point)
    if not out:
        raise ValueError(f"no file has figures of {model} for lat1 or batchN")
    return {engine: sorted(out[engine]) for engine in sorted(out, key=lambda name: (name != "jaxserve", name))}


def limit(requests, weights, parameters, kv, bandwidth, flops):
    """Tokens/s that the device allows: weights in bytes, kv in bytes a token, bandwidth in bytes/s."""
    prompts = np.where(requests > 1, 2 * requests * PROMPT * parameters / flops, 0)  # lat1 is timed without its prompt
    read = (weights + requests * (PROMPT + ANSWER / 2) * kv) / bandwidth
    return requests * ANSWER / (prompts + ANSWER * np.maximum(read, 2 * requests * parameters / flops))


def panel(axes, options, model, parameters, weights, kv):
    """Draws a model: so many weights, in so many bytes; kv in bytes a token."""
    found = curves(options.results, model)
    colours, others = dict(COLOURS), itertools.count(len(COLOURS))  # others, and second versions: what comes next
    for engine, points in found.items():
        ours = engine == "jaxserve"
        colour = colours.pop(engine.split(" ")[0], None) or f"C{next(others)}"
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=2 if ours else 1, label=engine, color=colour)
        for x, y in points if ours else ():
            paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}  # the limit may cross it
            axes.annotate(
                f"{y:,.0f}", (x, y), textcoords="offset points", xytext=(-4, 5), fontsize=8, ha="right", bbox=paper
            )
    ticks = sorted({x for points in found.values() for x, _ in points})
    rates = options.bandwidth * 1e9, options.tflops * 1e12
    bounds = [limit(x, weights, parameters, kv, *rates) for x in ticks]
    axes.plot(ticks, bounds, "k--", lw=1, label="limit of memory and tensor cores")
    axes.set(xscale="log", yscale="log", title=model, xlabel="requests at once")
    axes.set_xticks(ticks, [str(n) for n in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.3)


def sizes(model):
    """(name, weights, bytes of them, bytes of a token's keys and values) of what --model was given."""
    name, *given = model
    for text in given:
        try:
            fine = 0 < float(text) < math.inf
        except ValueError:
            fine = False
        if not fine:
            raise ValueError(f"--model {' '.join(model)}: after its name come three numbers above 0, not {text!r}")
    return name, *(float(text) * unit for text, unit in zip(given, (1e9, 1e9, 1e3), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--model", nargs=4, action="append", required=True, metavar=("NAME", "BILLIONS", "GB", "KB"))
    parser.add_argument("--bandwidth", type=float, default=4300, help="GB/s [4300, an H200 as measured]")
    parser.add_argument("--tflops", type=float, default=790, help="[790, likewise]")
    options = parser.parse_args()
    figure, all_axes = plt.subplots(1, len(options.model), figsize=(4.6 * len(options.model), 4.2), squeeze=False,
                                    layout="constrained")  # fmt: skip
    try:
        for axes, model in zip(all_axes[0], options.model, strict=True):
            panel(axes, options, *sizes(model))
    except ValueError as error:
        parser.error(str(error))
    all_axes[0][0].set_ylabel(f"tokens/s ({PROMPT} tokens in, {ANSWER} out)")
    all_axes[0][0].legend(fontsize=8, loc="lower right")
    try:
        figure.savefig(options.image, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: no format has such a name
        parser.error(f"{options.image} cannot be written: {error}")
    print(options.image)


if __name__ == "__main__":
    main()
