"""All figures of the README's tables: bench_offline.py for each model and each kind of KV cache, one after the other.

    python scripts/bench_all.py docs/h200 MODEL_FOLDER... [--seconds 600] [--runs 3]

Writes FOLDER/NAME.jsonl, or NAME-kvN.jsonl, a line as soon as it is measured: bench_compare.py and plot_bench.py read
them.  A file is begun anew when its first line comes.  The models' own caches come first; what finds no time is named.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
KV = {8: ("batch256", "mix"), 4: ("batch256", "mix")}  # quant_policy: workloads


def measure(model, policy, folder, options, until):
    """How many workloads of a model were measured; kills the engine when the time is over."""
    command = [sys.executable, str(HERE / "bench_offline.py"), "--model", str(model), "--runs", str(options.runs)]
    if policy:
        command += ["--quant-policy", str(policy), "--work", *KV[policy]]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        timer = threading.Timer(max(1, until - time.monotonic()), child.kill)
        timer.start()
        for line in child.stdout:
            if line.startswith("RESULT "):
                found.append(line.removeprefix("RESULT "))
                name = json.loads(found[-1])["model"]
                (folder / f"{name}.jsonl").write_text("".join(found))
        timer.cancel()
    return len(found), child.returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("models", type=Path, nargs="+", help="folders of checkpoints")
    parser.add_argument("--seconds", type=float, default=3600, help="for all together [3600]")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kv", type=int, nargs="*", default=[0, *KV], help="quant_policy of the caches [0 8 4]")
    options = parser.parse_args()
    if missing := [str(model) for model in options.models if not model.is_dir()]:
        parser.exit(2, f"no such folder: {', '.join(missing)}\n")
    options.folder.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + options.seconds, []
    for policy in options.kv:
        for model in options.models:
            what = f"{model.name}, quant_policy {policy}"
            if time.monotonic() > until:
                failed.append(f"{what}: no time")
                continue
            count, code = measure(model, policy, options.folder, options, until)
            if code:
                failed.append(f"{what}: ended with {code} after {count} workloads")
    print("\n".join(failed) or "all measured", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
