"""What the records of a run say: times, throughput, goodput; and tables of it for people."""

from collections import Counter

import numpy as np

PERCENTILES = (50, 90, 95, 99)
TIMES = {
    "ttft_ms": "time to first token",
    "itl_ms": "between two chunks",
    "tpot_ms": "a token after the first",
    "e2e_ms": "whole request",
}
LIMITS = {"ttft": "ttft_ms", "tpot": "tpot_ms", "itl": "itl_ms", "e2e": "e2e_ms"}  # what a goodput may be bound by


def samples(records: list[dict]) -> dict[str, np.ndarray]:
    """Milliseconds of the requests without errors: one value a request, of `itl_ms` one a chunk."""
    good = [r for r in records if not r["error"]]
    spoken = [r for r in good if r["first"] is not None]
    several = [r for r in spoken if r["tokens"] > 1]
    values = {
        "ttft_ms": [r["first"] - r["start"] for r in spoken],
        "itl_ms": [gap for r in spoken for gap in r["gaps"]],
        "tpot_ms": [(r["last"] - r["first"]) / (r["tokens"] - 1) for r in several],
        "e2e_ms": [r["end"] - r["start"] for r in good],
    }
    return {name: np.array(found) * 1e3 for name, found in values.items()}


def summary(result: dict, limits: dict[str, float] | None = None, wanted: list[int] | None = None) -> dict:
    """The figures of a run as plain data.

    limits: name of LIMITS -> most ms (of itl_ms a request's mean counts); then `goodput_req_s` is the requests a second
    that kept them all.  wanted: tokens asked of each request; then `short` counts the answers with another number.
    """
    records = result["records"]
    good = [r for r in records if not r["error"]]
    seconds = max((r["end"] for r in records), default=0) - min((r["start"] for r in records), default=0)
    seconds = max(seconds, 1e-9)
    inputs, outputs = sum(r["prompt"] or 0 for r in good), sum(r["tokens"] for r in good)
    figures: dict = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "seconds": round(seconds, 3),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "req_s": round(len(good) / seconds, 3),
        "in_tok_s": round(inputs / seconds, 1),
        "out_tok_s": round(outputs / seconds, 1),
        "total_tok_s": round((inputs + outputs) / seconds, 1),
        "client_busy": result["busy"],
        "lag_ms": round(max((r["lag"] for r in records), default=0) * 1e3, 2),
    }
    for name, values in samples(records).items():
        if len(values):
            figures[name] = {"mean": round(float(values.mean()), 3)}
            figures[name] |= {f"p{p}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}
            figures[name]["max"] = round(float(values.max()), 3)
    if wanted is not None:
        figures["short"] = sum(r["tokens"] != wanted[r["number"]] for r in good)
    if limits:
        figures["goodput_req_s"] = round(sum(keeps(r, limits) for r in good) / seconds, 3)
    if figures["errors"]:
        figures["error_texts"] = dict(Counter(r["error"] for r in records if r["error"]).most_common(5))
    return figures


def keeps(record: dict, limits: dict[str, float]) -> bool:
    """Whether a request stayed within limits in ms."""
    if record["first"] is None:
        return False
    after = record["last"] - record["first"]
    times = {
        "ttft": record["first"] - record["start"],
        "tpot": after / max(1, record["tokens"] - 1),
        "itl": after / max(1, len(record["gaps"])),
        "e2e": record["end"] - record["start"],
    }
    return all(times[name] * 1e3 <= most for name, most in limits.items())


def table(figures: dict) -> str:
    """A run's figures for people."""
    lines = [
        f"{'requests':<28}{figures['requests']:>12,}   errors {figures['errors']:,}",
        f"{'seconds':<28}{figures['seconds']:>12,.2f}",
        f"{'requests/s':<28}{figures['req_s']:>12,.2f}",
    ]
    if "goodput_req_s" in figures:
        lines.append(f"{'requests/s within limits':<28}{figures['goodput_req_s']:>12,.2f}")
    for name, words in (("in_tok_s", "input"), ("out_tok_s", "output"), ("total_tok_s", "all")):
        lines.append(f"{words + ' tokens/s':<28}{figures[name]:>12,.1f}")
    header = "".join(f"{name:>10}" for name in ("mean", *(f"p{p}" for p in PERCENTILES), "max"))
    lines.append(f"\n{'ms':<28}{header}")
    for name, words in TIMES.items():
        if name in figures:
            short = name.removesuffix("_ms").upper()
            lines.append(f"{f'{short}, {words}':<28}" + "".join(f"{v:>10,.1f}" for v in figures[name].values()))
    for text, count in figures.get("error_texts", {}).items():
        lines.append(f"{count:,} x {text}")
    if figures.get("short"):
        lines.append(f"{figures['short']:,} answers have another number of tokens than asked for")
    if figures["client_busy"] > 0.8:
        lines.append(f"the busiest client used {figures['client_busy']:.0%} of a core: more --processes may show more")
    return "\n".join(lines)


ROW = (
    ("out_tok_s", "out tok/s", "{:,.0f}"),
    ("req_s", "req/s", "{:,.2f}"),
    ("ttft_ms.p50", "TTFT p50", "{:,.1f}"),
    ("ttft_ms.p99", "p99", "{:,.1f}"),
    ("itl_ms.p50", "ITL p50", "{:,.1f}"),
    ("itl_ms.p99", "p99", "{:,.1f}"),
    ("e2e_ms.p50", "E2E p50", "{:,.0f}"),
    ("e2e_ms.p99", "p99", "{:,.0f}"),
    ("errors", "errors", "{:,}"),
)


def pick(figures: dict, name: str):
    """A figure by its name, `a.b` for b of a; None where there is none."""
    first, _, second = name.partition(".")
    value = figures.get(first)
    return value.get(second) if second and isinstance(value, dict) else value


def rows(runs: list[dict]) -> str:
    """Several runs, one a line."""
    lines = [f"{'load':<14}" + "".join(f"{title:>11}" for _, title, _ in ROW)]
    for run in runs:
        cells = (pick(run, name) for name, _, _ in ROW)
        shown = (f"{form.format(cell) if cell is not None else '-':>11}" for cell, (_, _, form) in zip(cells, ROW))
        lines.append(f"{run['load']:<14}" + "".join(shown))
    return "\n".join(lines)


COMPARED = (
    *("out_tok_s", "total_tok_s", "req_s", "goodput_req_s", "ttft_ms.mean", "ttft_ms.p50", "ttft_ms.p99"),
    *("itl_ms.mean", "itl_ms.p50", "itl_ms.p99", "tpot_ms.p50", "tpot_ms.p99", "e2e_ms.p50", "e2e_ms.p99"),
)


def comparison(first: dict, second: dict) -> str:
    """Two reports of `jaxserve bench serve --json` side by side, runs of the same load against each other.

    ValueError if they have no load in common.
    """
    ours, theirs = ({run["load"]: run for run in report["runs"]} for report in (first, second))
    common = [load for load in ours if load in theirs]
    if not common:
        raise ValueError(f"the files have no load in common: {', '.join(ours)} and {', '.join(theirs)}")
    lines = []
    for load in common:
        lines.append(f"{load:<20}{'A':>14}{'B':>14}{'B / A':>10}")
        for name in COMPARED:
            a, b = pick(ours[load], name), pick(theirs[load], name)
            if a is not None and b is not None:
                ratio = f"{b / a:>10.3f}" if a else f"{'-':>10}"
                lines.append(f"{name.replace('.', ' '):<20}{a:>14,.2f}{b:>14,.2f}{ratio}")
        lines.append("")
    different = [key for key in ("work", "endpoint", "model") if first.get(key) != second.get(key)]
    lines += [f"A and B differ in {key}: {first.get(key)} and {second.get(key)}" for key in different]
    return "\n".join(lines).rstrip()
