"""Draws throughput against the number of requests, from bench_offline.py's figures, with the device's limit.

    python scripts/plot_bench.py docs/throughput.png RESULTS [RESULTS ...] --weights-gb 3.44 --kv-kb 98

RESULTS: as for bench_compare.py, each a curve (lat1 and the batchN workloads).  The limit is what the device's memory
and its tensor cores allow: every step reads all weights and the keys and values of all requests, and a prompt's token
costs two operations a weight.
"""

import argparse
from pathlib import Path

import bench_compare
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

PROMPT, ANSWER = 512, 256  # tokens of a request in workloads.py


def curve(path):
    """(model, numbers of requests, tokens/s) of a file."""
    rows = bench_compare.results(path)
    points = sorted((1 if work == "lat1" else int(work[5:]), row["out_tok_s"], model)
                    for (model, work, _), row in rows.items() if work == "lat1" or work[5:].isdecimal())  # fmt: skip
    if not points:
        raise SystemExit(f"{path} has no figures of lat1 or batchN")
    requests, rate, models = zip(*points, strict=True)
    return models[0], requests, rate


def limit(requests, weights, kv, bandwidth, flops, bits):
    """Tokens/s that the device allows: weights in bytes, kv in bytes a token, bandwidth in bytes/s."""
    read = ANSWER * (weights + requests * (PROMPT + ANSWER / 2) * kv) / bandwidth
    computed = 2 * requests * (PROMPT + ANSWER) * weights * 8 / bits / flops
    return requests * ANSWER / np.maximum(read, computed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--labels", nargs="+", help="of the curves [file names]")
    parser.add_argument("--weights-gb", type=float, help="of weights that a step reads, 10^9 bytes; no limit without")
    parser.add_argument("--kv-kb", type=float, default=0.0, help="of a token's keys and values, in 10^3 bytes")
    parser.add_argument("--bits", type=int, default=16, help="of a weight [16]")
    parser.add_argument("--bandwidth", type=float, default=4300, help="GB/s [4300, an H200 as measured]")
    parser.add_argument("--tflops", type=float, default=790, help="[790, likewise]")
    options = parser.parse_args()
    labels = options.labels or [Path(path).stem for path in options.results]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ticks, model = {1}, None
    for path, label in zip(options.results, labels, strict=True):
        model, requests, rate = curve(path)
        ticks |= set(requests)
        axes.plot(requests, rate, marker="o", label=label)
        for x, y in zip(requests, rate, strict=True):
            axes.annotate(f"{y:,.0f}", (x, y), textcoords="offset points", xytext=(4, -12), fontsize=8)
    if options.weights_gb:
        x = np.geomspace(1, max(ticks), 100)
        rates = options.bandwidth * 1e9, options.tflops * 1e12
        axes.plot(x, limit(x, options.weights_gb * 1e9, options.kv_kb * 1e3, *rates, options.bits), "k--", lw=1,
                  label="limit of memory and tensor cores")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel="tokens/s",
             title=f"{model}: {PROMPT} tokens in, {ANSWER} out")  # fmt: skip
    axes.set_xticks(marks := sorted(ticks), [str(n) for n in marks], minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(x=0.1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.image, dpi=120)
    print(options.image)


if __name__ == "__main__":
    main()
