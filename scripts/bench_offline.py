"""Times the engine on the workloads of workloads.py: three runs each, the median, and a check of what came out.

    python scripts/bench_offline.py --model DIR --work lat1 mix

Prints a line for people and one of JSON for each workload.  Greedy, end-of-sequence ignored, prefix cache off.  The
check: every request has its number of tokens, and a sample of requests run alone gives the same ids (a difference
counts only where the first two choices are further apart than the type computed in can tell).

`--work host` reports what a step of decoding costs the host at 1, 16, 64 and 256 requests, in microseconds: to plan,
pack, launch and commit it; and how many steps a launch has.
"""

import argparse
import json
import queue
import statistics
import sys
import time

import workloads

from jaxserve.config import EngineConfig
from jaxserve.engine import launch, loading
from jaxserve.engine.request import Request, SamplingParams

SAMPLE = 4  # requests that are also run alone
TIE = {
    "float32": 0.01,
    "bfloat16": 0.3,
    "float16": 0.1,
}  # log-probability gap under which a different choice is excused


HOST = (1, 16, 64, 256)  # requests at once while the host is timed
TIMED = 100  # launches


class Clock:
    """Times methods of an engine from outside: what they take of the engine's own thread."""

    def __init__(self, engine):
        self.spent, self.undo = dict.fromkeys(("plan", "pack", "launch", "wait", "commit"), 0.0), []
        scheduler, runner = engine.scheduler, engine.runner
        parts = (scheduler, "plan", "plan"), (runner, "pack", "pack"), (runner, "dispatch", "launch")
        for owner, method, name in (*parts, (launch.InFlight, "read", "wait"), (scheduler, "commit", "commit")):
            self._wrap(owner, method, name)

    def _wrap(self, owner, method, name):
        real = getattr(owner, method)

        def timed(*args):
            began = time.perf_counter()
            try:
                return real(*args)
            finally:
                self.spent[name] += time.perf_counter() - began

        setattr(owner, method, timed)
        self.undo.append((owner, method, real if isinstance(owner, type) else None))

    def close(self):
        for owner, method, real in self.undo:
            if real is None:
                delattr(owner, method)
            else:
                setattr(owner, method, real)


class Collector:
    """Gathers a request's tokens, and tells the driver when it ends."""

    def __init__(self, ended):
        self.ended, self.tokens, self.times, self.margins = ended, [], [], []

    def put(self, output):
        if output.token is not None:
            self.tokens.append(output.token)
            self.times.append(time.perf_counter())
            if len(output.top) > 1:
                self.margins.append(output.top[0][1] - output.top[1][1])
        if output.finish:
            self.error = output.error
            self.ended.put(self)


def run(engine, reqs, clients, logprobs=None):
    """(seconds, a Collector for each request): `clients` requests open at a time."""
    ended, out = queue.SimpleQueue(), []
    todo = iter(reqs)

    def start():
        for ids, length in todo:
            out.append(Collector(ended))
            engine.submit(Request(list(ids), length, SamplingParams(logprobs=logprobs), outbox=out[-1]))
            return

    began = time.perf_counter()
    for _ in range(min(clients, len(reqs))):
        start()
    for _ in reqs:
        ended.get()
        start()
    return time.perf_counter() - began, out


def check(engine, reqs, out, dtype):
    """(requests with a wrong count, sampled requests that differ from themselves alone beyond ties)."""
    wrong = sum(len(c.tokens) != length for c, (_, length) in zip(out, reqs))
    different = 0
    for i in range(0, len(reqs), max(1, len(reqs) // SAMPLE))[:SAMPLE]:
        _, (alone,) = run(engine, [reqs[i]], 1, logprobs=2)
        first = next((j for j, (a, b) in enumerate(zip(alone.tokens, out[i].tokens)) if a != b), None)
        different += first is not None and alone.margins[first] > TIE[dtype]
    return wrong, different


def bench(engine, name, runs, label, dtype):
    """The figures of one workload as a dict."""
    reqs, clients = workloads.requests(name)
    walls, out, before = [], None, engine.stats()
    for _ in range(runs):
        wall, out = run(engine, reqs, clients)
        walls.append(wall)
    after = engine.stats()
    wrong, different = check(engine, reqs, out, dtype)
    wall = statistics.median(walls)
    outputs, inputs = sum(n for _, n in reqs), sum(len(ids) for ids, _ in reqs)
    computed, padded = (after[k] - before[k] for k in ("step_tokens", "step_tokens_padded"))
    figures = dict(engine="jaxserve", model=label, work=name, wall_s=round(wall, 4), out_tok_s=round(outputs / wall, 1),
                   in_tok_s=round(inputs / wall, 1), req_s=round(len(reqs) / wall, 2))  # fmt: skip
    if clients == 1:
        times = out[0].times
        figures["itl_ms"] = round((times[-1] - times[0]) / (len(times) - 1) * 1e3, 3)
        figures["ttft_ms"] = round((wall - (times[-1] - times[0])) * 1e3, 1)
    steps, launches = ((after[key] - before[key]) // runs for key in ("steps", "launches"))
    figures |= dict(spread=round((max(walls) - min(walls)) / wall, 3), steps=steps, launches=launches,
                    padding=round(padded / computed - 1, 3), wrong_counts=wrong, different_alone=different)  # fmt: skip
    return figures


def host(engine, count):
    """Microseconds of the host a step while `count` requests decode, as a dict; `wait` is time it had to spare."""
    prompt, most = 64, engine.info["session_len"] - 64
    ended, running = queue.SimpleQueue(), []
    for i in range(count):
        ids = [1000 + (i * 131 + j) % 9000 for j in range(prompt)]
        running.append(Request(ids, most, SamplingParams(), outbox=Collector(ended)))
        engine.submit(running[-1])
    while not all(request.outbox.tokens for request in running):
        time.sleep(0.01)
    clock, before = Clock(engine), engine.stats()
    while engine.stats()["launches"] - before["launches"] < TIMED and not any(r.finish for r in running):
        time.sleep(0.001)
    after, spent = engine.stats(), dict(clock.spent)
    clock.close()
    for request in running:
        engine.abort(request)
    for _ in running:
        ended.get()
    steps, launches, computed, padded = (
        after[k] - before[k] for k in ("steps", "launches", "step_tokens", "step_tokens_padded")
    )
    figures = {name: round(seconds / steps * 1e6, 1) for name, seconds in spent.items()}
    busy = sum(value for name, value in figures.items() if name != "wait")
    return figures | {"busy": round(busy, 1), "steps_per_launch": round(steps / launches, 2),
                      "padding": round(padded / computed - 1, 3)}  # fmt: skip


def load(parser, model, **knobs):
    """An engine with these options, or the end of the script where it cannot be had."""
    try:
        config = EngineConfig(**knobs, enable_prefix_caching=False)
        engine = loading.load(model, config, report=lambda text: print(text, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if engine.info["vocab"] < workloads.IDS:
        engine.close()
        parser.error(f"{model} knows {engine.info['vocab']} tokens, and the work has ids up to {workloads.IDS - 1}")
    return engine


def at_least_one(text):
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def fit(parser, names, session_len):
    """Ends the script where a workload is not known or does not fit."""
    for name in names:
        try:
            reqs, _ = workloads.requests(name) if name != "host" else ([((), 128)], 1)
        except ValueError as error:
            parser.error(f"{error}, host")
        if (longest := max((len(ids) + length for ids, length in reqs), default=0)) > session_len or not reqs:
            parser.error(f"{name} needs --session-len {longest}, not {session_len}" if reqs else f"{name} is no work")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--work", nargs="+", default=[*workloads.NAMES, "host"], help="workloads, or host (default: all but contextN)"
    )
    parser.add_argument("--runs", type=at_least_one, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--num-tokens-per-iter", type=int, default=0)
    parser.add_argument("--quant-policy", type=int, default=0, help="of the KV cache: 8: int8, 4: int4, 16: fp8")
    options = parser.parse_args()
    fit(parser, options.work, options.session_len)
    began = time.perf_counter()
    engine = load(
        parser,
        options.model,
        tp=options.tp,
        dtype=options.dtype,
        session_len=options.session_len,
        max_batch_size=options.max_batch_size,
        num_tokens_per_iter=options.num_tokens_per_iter,
        quant_policy=options.quant_policy,
    )
    ready = time.perf_counter() - began
    label = options.model.rstrip("/").split("/")[-1] + (f"-kv{options.quant_policy}" if options.quant_policy else "")
    run(engine, [(list(range(1000, 1100)), 16)], 1)
    for name in options.work:
        if name == "host":
            counts = [count for count in HOST if count <= engine.info["max_batch_size"]]
            found = {str(count): host(engine, count) for count in counts}
            for count, figures in found.items():
                print(f"{label} host, {count} requests, us a step: {figures}", file=sys.stderr)
            print("RESULT " + json.dumps({"engine": "jaxserve", "model": label, "work": name, "tp": options.tp,
                                          "host_us": found}), flush=True)  # fmt: skip
            continue
        figures = bench(engine, name, options.runs, label, engine.dtype) | {
            "ready_s": round(ready, 1),
            "tp": options.tp,
        }
        print(
            f"{label} {name}: {figures['out_tok_s']:,} tokens/s out, {figures['in_tok_s']:,} in, {figures['wall_s']} s",
            file=sys.stderr,
        )
        print("RESULT " + json.dumps(figures), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
