"""A long run of everything that clients do to a server, good and bad: whether it is afterwards what it was before.

    python scripts/soak.py --minutes 30 [--model MODEL]

Without a model the whole server stands on a stub engine.  60 % of the requests are good (several routes, streamed and
not) and their answers are checked; 30 % are given up somewhere on their way; 10 % are bad and must get a 4xx.  Pages,
files, threads, memory and gauges must return to where they were after the warm-up.  A table for people, and the last
line is JSON.  Exit status 1 if anything did not return, or was answered wrongly.
"""

import argparse
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serve import processes, traffic

SETTLE = 20  # seconds in which a server that nobody asks anything must come to rest
LOOK = 2.0  # seconds between two looks at its processes and at /metrics
GAUGES = ("num_requests_running", "num_requests_waiting", "num_tokens_waiting", "kv_cache_usage_perc")
MORE_MEMORY = 24 << 20  # bytes that a process may have more in the end ...
MORE_SHARE = 0.1  # ... or this share of what it had: freed memory does not go back page by page
POOL = 10  # threads of gevent's pool in a web process, which come as they are needed and stay
POOL_FILES = 2  # of each of them


class Soak:
    """The clients, and what has become of their requests."""

    def __init__(self, server: processes.Running, clients: int, seed: int, pause: float):
        self.server, self.clients, self.seed, self.pause = server, clients, seed, pause
        self.model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.samples: list[dict] = []
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """So many seconds of requests; returns when all have ended."""
        until = time.monotonic() + seconds
        crowd = [threading.Thread(target=self._client, args=(until, i), daemon=True) for i in range(self.clients)]
        for thread in crowd:
            thread.start()
        before: dict[str, float] = {}
        while any(thread.is_alive() for thread in crowd):
            time.sleep(LOOK)
            now = self.server.metrics()
            for name, value in before.items():
                if name.endswith(("_total", "_count", "_bucket")) and now.get(name, 0) < value:
                    self._note(f"{name} fell from {value} to {now.get(name)}")
            before = now
            self.samples.append(holdings(self.server))
        self.seed += 1

    def _client(self, until: float, number: int) -> None:
        draw = Random(f"{self.seed} {number}")
        while time.monotonic() < until:
            kind = draw.choices(("good", "abort", "bad"), (60, 30, 10))[0]
            try:
                what, fault = getattr(traffic, kind)(self.server.url, self.model, draw)
            except OSError as error:
                what, fault = kind, f"{type(error).__name__}: {error}"
            with self._lock:
                self.counts[kind] += 1
                self.counts[f"{kind}: {what}"] += 1
            if fault:
                self._note(f"{what}: {fault}")
            time.sleep(self.pause * draw.random() * 2)

    def _note(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)

    def settle(self) -> dict[str, float]:
        """Waits until the gauges say that nobody is there; returns them."""
        deadline = time.monotonic() + SETTLE
        while True:
            found = self.server.metrics()
            gauges = {name: found[f"jaxserve:{name}"] for name in GAUGES}
            if not any(gauges.values()) or time.monotonic() > deadline:
                time.sleep(1)  # what is closed has been closed
                return gauges
            time.sleep(0.2)


def holdings(server: processes.Running) -> dict:
    """Memory, files and threads of every process, by its name and number."""
    return {
        f"{name} {i}": {
            "bytes": process.memory_info().rss,
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "pid": process.pid,
        }
        for name, group in server.processes().items()
        for i, process in enumerate(group)
    }


def differences(before: dict, after: dict) -> list[str]:
    """What has not returned to where it was."""
    found = []
    if before.keys() != after.keys():
        return [f"the processes were {', '.join(before)} and are {', '.join(after)}"]
    for name, then in before.items():
        now = after[name]
        if now["pid"] != then["pid"]:
            found.append(f"{name}: it was started again")
        pool = min(POOL, max(0, now["threads"] - then["threads"])) if name.startswith("jaxserve-web") else 0
        if now["files"] > then["files"] + POOL_FILES * pool:
            found.append(f"{name}: {now['files']} open files, {then['files']} before")
        if now["threads"] > then["threads"] + pool:
            found.append(f"{name}: {now['threads']} threads, {then['threads']} before")
        if now["bytes"] > then["bytes"] + max(MORE_MEMORY, MORE_SHARE * then["bytes"]):
            found.append(f"{name}: {now['bytes'] >> 20} MiB, {then['bytes'] >> 20} before")
    return found


def soak(server: processes.Running, seconds: float, *, warm_up: float, clients: int, seed: int, pause: float) -> dict:
    """The whole of it; `faults` in the report is empty if all is well."""
    run = Soak(server, clients, seed, pause)
    run.run(warm_up)
    run.settle()
    run.counts.clear()
    before = holdings(server)
    run.samples.clear()
    began = time.monotonic()
    run.run(seconds)
    lasted = time.monotonic() - began
    gauges = run.settle()
    after = holdings(server)
    faults = [f"{name} is {value} in the end" for name, value in gauges.items() if value]
    faults += differences(before, after)
    faults += [f"{count} x {text}" for text, count in Counter(run.wrong).most_common(20)]
    log = server.log.read_text(encoding="utf-8", errors="replace")
    if "Traceback" in log:
        faults.append("a traceback in the log: " + log[log.index("Traceback") :][:2000])
    return {
        "seconds": round(lasted, 1),
        "requests": sum(run.counts[kind] for kind in ("good", "abort", "bad")),
        "counts": dict(sorted(run.counts.items())),
        "before": before,
        "after": after,
        "growth_mib_h": growth(run.samples, lasted),
        "faults": faults,
    }


def growth(samples: list[dict], seconds: float) -> dict[str, float]:
    """MiB an hour by which each process grew: the mean of the last third against that of the first."""
    third = len(samples) // 3
    if not third:
        return {}
    hours = seconds * 2 / 3 / 3600

    def mean(some, name):
        return sum(sample[name]["bytes"] for sample in some if name in sample) / len(some)

    names = samples[0].keys() & samples[-1].keys()
    return {
        name: round((mean(samples[-third:], name) - mean(samples[:third], name)) / (1 << 20) / hours, 2)
        for name in sorted(names)
    }


def table(report: dict) -> str:
    lines = [f"{report['requests']:,} requests in {report['seconds']:,.0f} s"]
    lines += [f"  {count:>9,}  {kind}" for kind, count in report["counts"].items()]
    lines.append(f"{'':<22}{'MiB':>14}{'files':>12}{'threads':>12}{'MiB/h':>9}")
    for name, then in report["before"].items():
        now = report["after"].get(name, then)
        pairs = [(then["bytes"] >> 20, now["bytes"] >> 20)] + [(then[k], now[k]) for k in ("files", "threads")]
        cells = "".join(f"{f'{a} > {b}':>{width}}" for (a, b), width in zip(pairs, (14, 12, 12)))
        lines.append(f"{name:<22}{cells}{report['growth_mib_h'].get(name, 0):>9}")
    lines += ["everything returned to where it was"] if not report["faults"] else report["faults"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds before what is there is noted")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument(
        "--pause", type=float, default=0.05, help="seconds between two requests of a client, on average"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="folder, GGUF file or id; default: a stub engine")
    given = parser.parse_args()
    if given.model:
        command = ["-m", "jaxserve", "serve", given.model, "--server-port", "0", "--log-level", "warning"]
    else:
        command = processes.stub(rate=50, lanes=16)
    with processes.served(command, 900) as server:
        report = soak(
            server,
            60 * given.minutes,
            warm_up=given.warm_up,
            clients=given.clients,
            seed=given.seed,
            pause=given.pause,
        )
    print(table(report))
    print(json.dumps(report))
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
