"""Pictures of a benchmark's runs.  Needs matplotlib, the extra `bench`."""

from pathlib import Path

import numpy as np

SIZE = (7.5, 4.5)  # inches
SHOWN = 0.999  # of the values: a single straggler must not squeeze the rest to a line


def draw(folder: str | Path, runs: list[dict], samples: list[dict[str, np.ndarray]], title: str) -> list[Path]:
    """Writes PNG files: distributions of TTFT and ITL, and of several runs latency over throughput.

    runs: summaries with `load`; samples: of each run, what figures.samples made.  Returns the files.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, words in (("ttft_ms", "time to first token (ms)"), ("itl_ms", "time between two chunks (ms)")):
        if any(len(some[name]) for some in samples):
            figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
            distributions(axes, [(run["load"], some[name]) for run, some in zip(runs, samples)])
            axes.set(title=title, xlabel=words, ylabel="share of all", ylim=(0, 1.01))
            files.append(save(pyplot, figure, folder / f"{name.removesuffix('_ms')}_cdf.png"))
    if len(runs) > 1:
        figure, axes = pyplot.subplots(1, 2, figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
        throughput_latency(axes, runs)
        figure.suptitle(title)
        files.append(save(pyplot, figure, folder / "throughput_latency.png"))
    return files


def distributions(axes, named: list[tuple[str, np.ndarray]]) -> None:
    """A line for each set of values: the share that is at most x."""
    right = 0.0
    for name, values in named:
        if not len(values):
            continue
        values = np.sort(values)
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name)
        right = max(right, float(np.quantile(values, SHOWN)))
    axes.set_xlim(0, right * 1.05 or 1)
    axes.axhline(0.99, color="gray", linewidth=0.8, linestyle=":")
    axes.annotate("p99", (1, 0.99), xycoords=("axes fraction", "data"), ha="right", va="top", color="gray", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def throughput_latency(axes, runs: list[dict]) -> None:
    """Median and p99 of TTFT and ITL over output tokens/s; each point is a run, named by its load."""
    runs = sorted(runs, key=lambda run: run["out_tok_s"])
    for one, (name, words) in zip(axes, (("ttft_ms", "time to first token"), ("itl_ms", "time between two chunks"))):
        there = [run for run in runs if name in run]
        x = [run["out_tok_s"] for run in there]
        for percentile, marker in (("p50", "o"), ("p99", "s")):
            one.plot(x, [run[name][percentile] for run in there], marker=marker, label=percentile)
        for run in there:
            at = (run["out_tok_s"], run[name]["p99"])
            one.annotate(run["load"], at, textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        one.set(xlabel="output tokens/s", ylabel=f"{words} (ms)", yscale="log")
        one.yaxis.set_major_formatter("{x:g}")
        one.yaxis.set_minor_formatter("{x:g}")
        one.margins(0.12, 0.15)
        one.set_xlim(left=0)
        one.grid(alpha=0.3, which="both")
        one.legend()


def save(pyplot, figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
