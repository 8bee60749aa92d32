"""What the server counts, and its text for Prometheus.

`Meter` is plain numbers: cheap enough to be fed on the engine's thread for every token.  `render` turns a snapshot of
them into exposition text, under our names (`jaxserve:*`) and under those that vLLM's dashboards ask for (`vllm:*`).
A snapshot is plain data, so it can be rendered in another process.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

FINISHES = ("stop", "length", "abort", "error")
REJECTIONS = ("requests", "tokens", "concurrent", "draining")  # which bound a refused request met

# Upper edges of buckets.  vLLM's, and finer where a small model on a fast device would fall into its first one.
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
GAP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80),
)
REQUEST_SECONDS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Histogram:
    """How many values fell between which edges.  One thread observes."""

    __slots__ = ("counts", "edges", "sum")

    def __init__(self, edges: tuple[float, ...]):
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self.sum += value


class Timed(NamedTuple):
    """A histogram: its edges, our name of it, vLLM's names, and what it is of."""

    edges: tuple[float, ...]
    ours: str
    theirs: tuple[str, ...]
    text: str


def same(edges: tuple[float, ...], name: str, text: str) -> Timed:
    return Timed(edges, name, (name,), text)


HISTOGRAMS = {
    "first": same(SECONDS, "time_to_first_token_seconds", "arrival to first token"),
    "gap": Timed(
        GAP_SECONDS,
        "inter_token_latency_seconds",
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        "between two tokens of a request",
    ),
    "total": same(REQUEST_SECONDS, "e2e_request_latency_seconds", "arrival to end"),
    "queue": same(REQUEST_SECONDS, "request_queue_time_seconds", "arrival to start"),
    "prefill": same(REQUEST_SECONDS, "request_prefill_time_seconds", "start to first token"),
    "decode": same(REQUEST_SECONDS, "request_decode_time_seconds", "first token to last"),
    "prompt": same(TOKENS, "request_prompt_tokens", "tokens of a prompt"),
    "generation": same(TOKENS, "request_generation_tokens", "tokens of an answer"),
    "step": Timed(STEP_TOKENS, "iteration_tokens", ("iteration_tokens_total",), "tokens computed in a step"),
}

# our metric, vLLM's, what it is; the value is the snapshot's of our name
GAUGES = (
    ("num_requests_running", "num_requests_running", "requests that hold a seat on the device"),
    ("num_requests_waiting", "num_requests_waiting", "requests that wait for a seat, preempted ones included"),
    ("num_tokens_waiting", None, "prompt tokens in the queue"),
    ("kv_cache_usage_perc", "kv_cache_usage_perc", "share of the KV cache in use, 0 to 1"),
    ("prefix_cache_hit_rate", None, "share of prompt tokens that the prefix cache had, since the start, 0 to 1"),
)
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "prompt tokens of requests that were started"),
    ("generation_tokens", "generation_tokens", "tokens generated"),
    ("cached_tokens", "prefix_cache_hits", "prompt tokens that came from the prefix cache"),
    ("prefix_cache_queries", "prefix_cache_queries", "prompt tokens looked up in the prefix cache"),
    ("num_preemptions", "num_preemptions", "requests that had to give their pages up"),
    ("corrupted_requests", "corrupted_requests", "requests ended because the logits were not numbers"),
    ("timeouts", None, "requests ended by their time limit"),
    ("steps", None, "steps of the device"),
    ("step_tokens", None, "tokens computed, prompts and answers"),
    ("busy_seconds", None, "seconds in which the engine was at work"),
)


class Meter:
    """The server's counts since it started.  `model` is the label model_name of every metric."""

    def __init__(self, model: str = ""):
        self.model = model
        for name, timed in HISTOGRAMS.items():
            setattr(self, name, Histogram(timed.edges))
        self.ended = dict.fromkeys(FINISHES, 0)
        self.rejected = dict.fromkeys(REJECTIONS, 0)
        self.corrupted = self.timeouts = 0

    first: Histogram
    gap: Histogram
    total: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    prompt: Histogram
    generation: Histogram
    step: Histogram

    @property
    def tokens(self) -> int:
        """Tokens delivered."""
        return sum(self.gap.counts) + sum(self.first.counts)

    def snapshot(self, stats: Mapping[str, float]) -> dict:
        """Plain data for `render`.  stats: Door.stats()."""
        running = stats.get("running", 0)
        used, cached, free = (stats.get(f"pages_{state}", 0) for state in ("used", "cached", "free"))
        prompt, hits = stats.get("prompt_tokens", 0), stats.get("cached_tokens", 0)
        return {
            "model": self.model,
            "pid": os.getpid(),
            "gauges": {
                "num_requests_running": running,
                "num_requests_waiting": max(0, stats.get("inside", 0) - running),
                "num_tokens_waiting": stats.get("queued_tokens", 0),
                "kv_cache_usage_perc": used / max(1, used + cached + free),
                "prefix_cache_hit_rate": hits / max(1, prompt),
            },
            "counters": {
                "prompt_tokens": prompt,
                "generation_tokens": self.tokens,
                "cached_tokens": hits,
                "prefix_cache_queries": prompt,
                "num_preemptions": stats.get("preemptions", 0),
                "corrupted_requests": self.corrupted,
                "timeouts": self.timeouts,
                "steps": stats.get("steps", 0),
                "step_tokens": stats.get("step_tokens", 0),
                "busy_seconds": stats.get("busy_s", 0.0),
            },
            "ended": dict(self.ended),
            "rejected": dict(self.rejected),
            "histograms": {name: (list(getattr(self, name).counts), getattr(self, name).sum) for name in HISTOGRAMS},
        }


class Collected(Collector):
    """A snapshot as prometheus_client's metric families."""

    def __init__(self, snapshot: dict):
        self.snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot, model = self.snapshot, [self.snapshot["model"]]
        label = ["model_name"]
        for ours, theirs, text in GAUGES:
            for name in names(ours, theirs):
                gauge = GaugeMetricFamily(name, text, labels=label)
                gauge.add_metric(model, snapshot["gauges"][ours])
                yield gauge
        for ours, theirs, text in COUNTERS:
            for name in names(ours, theirs):
                counter = CounterMetricFamily(name, text, labels=label)
                counter.add_metric(model, snapshot["counters"][ours])
                yield counter
        for name in names("request_success", "request_success"):
            ended = CounterMetricFamily(name, "requests that ended, by reason", labels=[*label, "finished_reason"])
            for reason, count in snapshot["ended"].items():
                ended.add_metric([*model, reason], count)
            yield ended
        rejected = CounterMetricFamily(
            "jaxserve:admission_rejections", "requests refused, by the bound they met", labels=[*label, "reason"]
        )
        for reason, count in snapshot["rejected"].items():
            rejected.add_metric([*model, reason], count)
        yield rejected
        for key, timed in HISTOGRAMS.items():
            counts, total = snapshot["histograms"][key]
            buckets = cumulative(timed.edges, counts)
            for name in names(timed.ours, *timed.theirs):
                histogram = HistogramMetricFamily(name, timed.text, labels=label)
                histogram.add_metric(model, buckets, total)
                yield histogram


def names(ours: str, *theirs: str | None) -> list[str]:
    return [f"jaxserve:{ours}", *(f"vllm:{name}" for name in theirs if name)]


def cumulative(edges: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Counts between edges as Prometheus wants them: how many values are at most each edge."""
    below, buckets = 0, []
    for edge, count in zip((*map(float, edges), "+Inf"), counts):
        below += count
        buckets.append((str(edge), float(below)))
    return buckets


def render(snapshot: dict) -> str:
    """Exposition text (version 0.0.4) of a snapshot, and of the process that made it: memory, CPU, open files."""
    registry = CollectorRegistry()
    registry.register(Collected(snapshot))
    ProcessCollector(pid=lambda: snapshot["pid"], registry=registry)
    return generate_latest(registry).decode()
