"""What HTTP costs: the workload `mix` of workloads.py through a server, against the same work offline.

    python scripts/bench_serve.py --model DIR --offline 30000

Starts `jaxserve serve` for the model, sends the token ids of scripts/bench_offline.py to /v1/completions as 256 clients
do, three times, and reports the run with the median throughput.  --offline: the output tokens/s of
`bench_offline.py --work mix` on the same machine.  Greedy, end-of-sequence ignored, prefix cache off.  A table for
people, and the last line is JSON.  Exit status 1 if a request failed, has a wrong number of tokens, or lost one.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import workloads

from jaxserve.bench import drive, figures
from jaxserve.bench.work import Item
from tests.serve import processes


def measure(server: processes.Running, items: list[Item], clients: int, runs: int, parts: int | None) -> list[dict]:
    """The figures of each run."""
    # Ids that the tokenizer does not know print nothing: with their numbers every token has its chunk all the same.
    target = drive.Target(server.url, drive.first_model(server.url), extra={"return_token_ids": True})
    drive.run(target, [Item(list(range(1000, 1100)), 16)], concurrency=1)
    found = []
    for _ in range(runs):
        before, cpu = server.metrics(), server.cpu()
        result = drive.run(target, items, concurrency=clients, processes=parts)
        after, cpu_after = server.metrics(), server.cpu()
        run = figures.summary(result, wanted=[item.output for item in items])
        run["lost"] = sum(r["tokens"] - r["seen"] for r in result["records"] if not r["error"])
        run["steps"] = after["jaxserve:steps_total"] - before["jaxserve:steps_total"]
        run["engine_busy"] = round(
            (after["jaxserve:busy_seconds_total"] - before["jaxserve:busy_seconds_total"]) / run["seconds"], 3
        )
        run["cores"] = {name: round((cpu_after[name] - cpu[name]) / run["seconds"], 2) for name in cpu}
        run["clients"] = result["clients"]
        found.append(run)
        print(f"{run['out_tok_s']:,.1f} tokens/s out in {run['seconds']:.2f} s", file=sys.stderr, flush=True)
    return found


def command(given) -> list[str]:
    """`python` with these arguments is the server."""
    if given.stub is not None:
        return processes.stub(given.stub, given.max_batch_size, http_workers=given.http_workers)
    return [
        *("-m", "jaxserve", "serve", given.model, "--server-port", "0", "--http-workers", str(given.http_workers)),
        *("--session-len", str(given.session_len), "--max-batch-size", str(given.max_batch_size)),
        *("--tp", str(given.tp), "--dtype", given.dtype, "--no-enable-prefix-caching", "--log-level", "warning"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the checkpoint")
    parser.add_argument("--stub", type=float, metavar="RATE", help="instead: an engine that only emits, 0 = at once")
    parser.add_argument("--offline", type=float, metavar="TOKENS_S", help="output tokens/s of the same work offline")
    parser.add_argument("--work", default="mix", choices=workloads.NAMES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--http-workers", type=int, default=4)
    parser.add_argument("--client-processes", type=int)
    parser.add_argument("--start", type=float, default=900, help="seconds that loading and compiling may take")
    given = parser.parse_args()
    if (given.model is None) == (given.stub is None):
        parser.error("give a --model (or --stub)")
    requests, clients = workloads.requests(given.work)
    items = [Item(ids, length) for ids, length in requests]
    began = time.perf_counter()
    try:
        with processes.served(command(given), given.start) as server:
            ready = time.perf_counter() - began
            print(f"ready after {ready:.1f} s", file=sys.stderr, flush=True)
            runs = measure(server, items, clients, given.runs, given.client_processes)
    except AssertionError as error:  # above it stands what the server wrote
        parser.error(str(error))
    middle = statistics.median_low(run["out_tok_s"] for run in runs)
    best = next(run for run in runs if run["out_tok_s"] == middle)
    report = {"engine": "jaxserve", "model": Path(given.model or "stub").name, "work": given.work, "clients": clients}
    report |= {"ready_s": round(ready, 1), "tp": given.tp, "http_workers": given.http_workers, "runs": len(runs)}
    report |= {"spread": round((max(r["out_tok_s"] for r in runs) - min(r["out_tok_s"] for r in runs)) / middle, 3)}
    report["client_processes"] = best.pop("clients")
    report |= best
    print(f"{report['model']} {given.work} through HTTP, {clients} clients\n{figures.table(best)}")
    print(f"cores: {best['cores']}, busiest client {best['client_busy']}; engine busy {best['engine_busy']:.0%}")
    if given.offline:
        report["offline_out_tok_s"], report["of_offline"] = given.offline, round(middle / given.offline, 4)
        print(f"{middle:,.1f} of {given.offline:,.1f} tokens/s offline: {middle / given.offline:.1%}")
    print(json.dumps(report))
    sys.exit(1 if any(r["errors"] or r["short"] or r["lost"] for r in runs) else 0)


if __name__ == "__main__":
    main()
