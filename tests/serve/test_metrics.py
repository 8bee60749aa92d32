import json
import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.request import Overloaded, Request
from jaxserve.serve.door import Door
from jaxserve.serve.metrics import Meter, cumulative, render
from tests.serve.stub import StubEngine
from tests.serve.test_door import Sink
from tests.waiting import soon

# of vLLM's dashboards, and ours of the same thing where it has another name
VLLM = {
    "num_requests_running": None,
    "num_requests_waiting": None,
    "kv_cache_usage_perc": None,
    "prefix_cache_queries_total": None,
    "prefix_cache_hits_total": "cached_tokens_total",
    "num_preemptions_total": None,
    "prompt_tokens_total": None,
    "generation_tokens_total": None,
    "request_success_total": None,
    "time_to_first_token_seconds_bucket": None,
    "inter_token_latency_seconds_bucket": None,
    "time_per_output_token_seconds_bucket": "inter_token_latency_seconds_bucket",
    "e2e_request_latency_seconds_bucket": None,
    "request_queue_time_seconds_bucket": None,
    "request_prefill_time_seconds_bucket": None,
    "request_decode_time_seconds_bucket": None,
}


def samples(text):
    """(name, the labels but model_name) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = frozenset(pair for pair in sample.labels.items() if pair[0] != "model_name")
            assert (sample.name, labels) not in found
            found[sample.name, labels] = sample.value
    return found


def plain(found):
    return {name: value for (name, labels), value in found.items() if not labels}


@pytest.fixture(scope="module")
def door():
    with StubEngine(rate=200, lanes=2, path="/models/stub-1b/") as engine, Door(engine, max_queued=1) as door:
        yield door


def work(door, count=5, new=4):
    """Requests one after the other; the last is aborted."""
    for i in range(count):
        request = Request([3] * 10, new if i < count - 1 else 10_000, outbox=Sink())
        outbox = request.outbox
        door.submit(request)
        if i == count - 1:
            door.abort(request)
        outbox.wait()


def test_the_text_has_every_name_and_parses(door):
    work(door)
    text = door.metrics()
    found = samples(text)
    names = {name for name, _ in found}
    for theirs, ours in VLLM.items():
        assert {f"vllm:{theirs}", f"jaxserve:{ours or theirs}"} <= names
    assert all('model_name="stub-1b"' in line for line in text.splitlines() if line.startswith(("jaxserve:", "vllm:")))
    assert {"process_resident_memory_bytes", "process_open_fds"} <= names


def test_figures(door):
    before = samples(door.metrics())
    work(door, count=5, new=4)
    after = samples(door.metrics())
    grown = {key: after[key] - before[key] for key in after}
    reason = "jaxserve:request_success_total"
    assert grown[reason, frozenset({("finished_reason", "length")})] == 4
    assert grown[reason, frozenset({("finished_reason", "abort")})] == 1
    counts = plain(grown)
    first, gaps = (counts[f"vllm:{name}_seconds_count"] for name in ("time_to_first_token", "inter_token_latency"))
    assert first + gaps == counts["vllm:generation_tokens_total"] >= 16
    assert counts["jaxserve:e2e_request_latency_seconds_count"] == 5
    assert counts["jaxserve:request_prompt_tokens_sum"] == 50
    assert counts["jaxserve:steps_total"] >= counts["jaxserve:iteration_tokens_count"] > 0
    assert gaps / 400 < counts["vllm:inter_token_latency_seconds_sum"] < gaps / 2  # 5 ms each, or the machine is busy
    whole = plain(after)
    assert whole["vllm:num_requests_running"] == whole["vllm:num_requests_waiting"] == 0
    assert whole["vllm:kv_cache_usage_perc"] == 0


def test_gauges_while_at_work(door):
    outboxes = []
    requests = [Request([3] * 10, 10_000, outbox=Sink()) for _ in range(3)]
    for request in requests:
        outboxes.append(request.outbox)
        door.submit(request)
    with pytest.raises(Overloaded):
        door.submit(Request([3], 1, outbox=Sink()))
    soon(lambda: plain(samples(door.metrics()))["vllm:num_requests_running"] == 2)
    found = samples(door.metrics())
    gauges = plain(found)
    assert gauges["vllm:num_requests_waiting"] == 1 and gauges["jaxserve:num_tokens_waiting"] == 10
    assert 0 < gauges["jaxserve:kv_cache_usage_perc"] < 1
    assert found["jaxserve:admission_rejections_total", frozenset({("reason", "requests")})] >= 1
    for request in requests:
        door.abort(request)
    for outbox in outboxes:
        outbox.wait()


def test_counters_never_fall(door):
    """And buckets rise towards +Inf, whose count is the histogram's."""
    before = samples(door.metrics())
    for _ in range(3):
        work(door, count=2)
        now = samples(door.metrics())
        for (name, labels), value in now.items():
            if name.startswith(("jaxserve:", "vllm:")) and name.endswith(("_total", "_count", "_sum", "_bucket")):
                assert value >= before[name, labels], name
        before = now
    buckets = [
        (dict(labels)["le"], v) for (name, labels), v in before.items() if name == "jaxserve:iteration_tokens_bucket"
    ]
    counts = [value for _, value in sorted(buckets, key=lambda pair: float(pair[0]))]
    assert counts == sorted(counts) and counts[-1] == plain(before)["jaxserve:iteration_tokens_count"]


def test_a_snapshot_is_plain_data(door):
    """It travels to a web worker, which makes the text of it."""
    snapshot = door.snapshot()
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot))
    assert samples(render(packed)).keys() == samples(render(json.loads(json.dumps(snapshot)))).keys()


def test_a_name_with_quotes_stays_one_label():
    text = render(Meter('a "b"\\\n').snapshot({}))
    labels = {s.labels["model_name"] for f in text_string_to_metric_families(text) for s in f.samples if s.labels}
    assert labels - {'a "b"\\\n'} == set()


def test_buckets_are_cumulative():
    assert cumulative((1, 2.5), [3, 0, 2]) == [("1.0", 3.0), ("2.5", 3.0), ("+Inf", 5.0)]


DOCS = Path(__file__).parents[2] / "docs"
NAME = re.compile(r"\b(?:jaxserve|vllm):[a-z0-9_]+|\bprocess_[a-z_]+")


def test_the_dashboard_asks_for_metrics_that_are_there(door):
    board = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))
    there = {name for name, _ in samples(door.metrics())}
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    expressions += [variable["definition"] for variable in board["templating"]["list"] if "definition" in variable]
    asked = {name for expression in expressions for name in NAME.findall(expression)}
    assert len(asked) > 20 and asked <= there, asked - there
    for expression in expressions:
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_the_dashboard_is_in_order():
    """Ids are unique, no panel lies on another, and each says what it shows."""
    board = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not own & cells, panel["title"]
        cells |= own
        if panel["type"] != "row":
            assert panel["description"] and len({target["refId"] for target in panel["targets"]}) == len(
                panel["targets"]
            )


def test_the_page_names_every_metric(door):
    """Of ours; and none that is not there."""
    page = (DOCS / "monitoring.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:5] for line in page.splitlines() if line.startswith("| `") and "kind" not in line]
    named = {(name, row[1].strip()) for row in rows for name in re.findall(r"`([a-z0-9_]+)", row[0])}
    families = text_string_to_metric_families(door.metrics())
    real = {
        (family.name.removeprefix("jaxserve:") + ("_total" if family.type == "counter" else ""), family.type)
        for family in families
        if family.name.startswith("jaxserve:")
    }
    assert named == real
