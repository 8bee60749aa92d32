"""Where the time of a step goes: by part of the model, and by kernel; on the CPU, by operation.

    python scripts/profile_step.py --model DIR --rows 64 --prompt 512 [--steps 8] [--prefill] [--top 25]

Decoding by default: --rows requests are begun, and --steps steps are traced when all of them have their first token.
With --prefill their prompts are traced instead.  Kernels are traced as they run in service, in CUDA graphs; XLA tells
no parts of the model then, so that table is for the CPU.  There operations run beside each other, and their times add
up to more than a step takes.  The last line is JSON.
"""

import argparse
import collections
import glob
import gzip
import json
import re
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench_offline
import jax
import numpy as np

from jaxserve.engine import runner
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.sizes import Sizes, bucket

SCOPES = ("mixer", "ffn", "head", "sample")  # named in models/decoder.py and step.py
NUMBER = re.compile(r"[_.]?\d+")
NAMED = re.compile(r'%?([\w.-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')


def scope_of(texts):
    """The first of SCOPES that is a part of one of the paths."""
    words = {word for text in texts for word in str(text).split("/")}
    return next((scope for scope in SCOPES if scope in words), "rest")


def few(rows):
    """As Sizes.choose, without the sizes that this profile does not need; those of a start before are on disk."""

    def choose(*given):
        sizes = Sizes.choose(*given)
        if not sizes.whole:
            return sizes
        whole, drawn = bucket(rows, sizes.whole), bucket(rows, sizes.rows)
        bursts = tuple((size, steps) for size, steps in sizes.bursts if size >= rows)[:1]
        tokens = tuple(sorted({sizes.scored[0], sizes.tokens[-1]}))
        return replace(sizes, tokens=tokens, rows=(drawn,), scored=tokens[:1], whole=(whole,), bursts=bursts)

    return choose


def outermost(events):
    """Those events of the CPU that are in no other one of their thread."""
    end = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] >= end.get(event["tid"], 0):
            end[event["tid"]] = event["ts"] + event["dur"]
            yield event


def kernels(folder, programs):
    """[(name, scope, microseconds)] of what ran on the device, from the trace under `folder`.

    programs: those that ran, as compiled: on the CPU a trace names operations, and only these know their scopes.
    """
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    names = collections.defaultdict(str)
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            names[event["pid"], event.get("tid") if event["name"] == "thread_name" else None] = event["args"]["name"]
    if jax.default_backend() == "cpu":
        of = {name: path for program in programs for name, path in NAMED.findall(program.as_text())}
        ran = outermost(e for e in events if e.get("ph") == "X" and "hlo_op" in e.get("args", {}))
        return [(NUMBER.sub("", e["name"])[:70], scope_of([of.get(e["args"]["hlo_op"], "")]), e["dur"]) for e in ran]
    found = []
    for event in events:
        on_gpu = "GPU" in names[event.get("pid"), None] and "Stream" in names[event.get("pid"), event.get("tid")]
        if event.get("ph") == "X" and on_gpu:
            found.append((NUMBER.sub("", event["name"])[:70], scope_of(event.get("args", {}).values()), event["dur"]))
    return found


def between_turns(engine, ready, action, first=None):
    """Runs `action` on the engine's thread after a turn, once `ready()` holds and nothing is on the device any more.

    The profiler must neither begin nor end beside a launch: the launch would fail, and the device with it.
    first: is called when nothing can be missed any more.
    """
    done = threading.Event()

    def hook():
        if done.is_set() or not ready():
            return
        for step in engine.turns.pending:
            np.asarray(step.drawn.tokens)  # it has come to the host, too
        jax.block_until_ready(engine.runner.state)
        try:
            action()
        finally:
            done.set()

    engine.on_turn.append(hook)
    if first is not None:
        first()
    if not done.wait(120):
        sys.exit("the requests do not come to the point; fewer --rows or a shorter --prompt?")
    engine.on_turn.remove(hook)


def trace(engine, rows, prompt, steps, prefill):
    """(kernels as in `kernels`, steps traced)."""
    asked = [([1000 + (i * 131 + j) % 9000 for j in range(prompt)], 1 if prefill else 100_000) for i in range(rows)]
    ended, running, ran, at = bench_offline.queue.SimpleQueue(), [], set(), []
    call = engine.runner._call

    def note(key, *arguments):
        ran.add(key)
        return call(key, *arguments)

    def start():
        for ids, length in asked:
            collector = bench_offline.Collector(ended)
            length = min(length, engine.info["session_len"] - len(ids))
            running.append(Request(ids, length, SamplingParams(), outbox=collector))
            engine.submit(running[-1])

    def begin():
        ran.clear()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        at.append(engine.stats()["steps"])

    def end():
        at.append(engine.stats()["steps"])
        jax.profiler.stop_trace()
        for request in running:
            engine.abort(request)

    with tempfile.TemporaryDirectory() as folder:
        engine.runner._call = note
        if prefill:
            begin()  # no request is there
            between_turns(engine, lambda: ended.qsize() == rows, end, first=start)
        else:
            start()
            between_turns(engine, lambda: all(request.outbox.tokens for request in running), begin)
            between_turns(engine, lambda: engine.stats()["steps"] - at[0] >= steps, end)
        taken = at[1] - at[0]
        return kernels(folder, [engine.runner.programs[key] for key in ran]), taken


def table(rows, steps, column, most):
    """Prints time a step by one column of `kernels`; returns {key: microseconds a step}."""
    time_of, count = collections.Counter(), collections.Counter()
    for row in rows:
        time_of[row[column]] += row[2]
        count[row[column]] += 1
    for key, total in time_of.most_common(most):
        print(f"{total / steps:10.1f} us {count[key] / steps:7.1f} x {total / count[key]:8.2f} us  {key}", flush=True)
    return {key: round(total / steps, 2) for key, total in time_of.most_common(most)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=bench_offline.at_least_one, default=64, help="requests [64]")
    parser.add_argument("--prompt", type=bench_offline.at_least_one, default=512, help="tokens of each [512]")
    parser.add_argument("--steps", type=bench_offline.at_least_one, default=8, help="of decoding to trace [8]")
    parser.add_argument("--prefill", action="store_true", help="trace the prompts' steps instead")
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--top", type=int, default=25, help="kernels to print [25]")
    options = parser.parse_args()
    if (least := options.prompt + (1 if options.prefill else options.steps)) >= options.session_len:
        parser.error(f"the prompts and steps need --session-len {least + 1} or more, not {options.session_len}")
    runner.Sizes = SimpleNamespace(choose=few(options.rows))
    knobs = {"tp": options.tp, "session_len": options.session_len, "max_batch_size": max(256, options.rows)}
    engine = bench_offline.load(parser, options.model, **knobs)
    bench_offline.run(engine, [(list(range(1000, 1100)), 16)], 1)
    found, steps = trace(engine, options.rows, options.prompt, options.steps, options.prefill)
    engine.close()
    total = sum(row[2] for row in found) / steps
    print(f"{steps:.0f} steps, {len(found) / steps:.0f} kernels and {total:.0f} us of them a step")
    scopes = table(found, steps, 1, len(SCOPES) + 1)
    print()
    names = table(found, steps, 0, options.top)
    label = Path(options.model).name
    print(json.dumps({"model": label, "rows": options.rows, "prompt": options.prompt, "prefill": options.prefill,
                      "steps": steps, "us": round(total, 1), "scopes": scopes, "kernels": names}))  # fmt: skip


if __name__ == "__main__":
    main()
