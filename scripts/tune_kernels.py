"""Finds the block sizes of the kernels on this GPU and writes them to pallas_kernels/tuned/<device>.json.

    python scripts/tune_kernels.py [--kernel paged_decode] [--head-dim 128] [--seconds 220] [--out FOLDER]

Each size is judged by the time over all cases, every case weighted alike.  What is in the file already takes part, so a
run can only improve it, and a run that --seconds cuts short keeps what it has found.  The candidates of a group are
compiled at once in threads, then timed one after the other.
"""

import argparse
import itertools
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench_kernels

from pallas_kernels import triton_call, tuning

# Rows of one token: (cached, 1) each.
DECODE = {"1 x 0.5k": [(511, 1)], "1 x 32k": [(32767, 1)], "8 x 4k": [(4095, 1)] * 8, "32 x 1k": [(1023, 1)] * 32,
          "64 x 2k": [(2047, 1)] * 64, "256 x 0.6k": [(600, 1)] * 256,
          "mixed": [(199, 1)] * 48 + [(8191, 1)] * 16}  # fmt: skip
PROMPTS = {"1 x 4k": [(0, 4096)], "8 x 0.5k": [(0, 512)] * 8, "mixed": [(4096, 512), (0, 512), (700, 1100)]}
HEADS = {64: (8, 4), 128: (8, 2), 256: (4, 2)}
CASES = {
    "hopper_prefill": PROMPTS,
    "paged_decode": DECODE,
    "paged_prefill": PROMPTS,
    "paged_decode_int8": DECODE,
    "paged_decode_int4": DECODE,
    "paged_prefill_int8": PROMPTS,
    "paged_prefill_int4": PROMPTS,
    "rope_kv_write": {str(tokens): tokens for tokens in (1, 16, 256, 2048)},
}
STEPS = {  # tried one group after the other, all combinations within a group
    "paged_decode": (
        {"block": (32, 64, 128), "warps": (4, 8), "stages": (3, 4)},
        {"programs": (264, 396, 528, 1056), "smallest": (64, 128, 256), "parts": (4096, 8192)},
    ),
    "hopper_prefill": (
        {"pingpong": (0, 1), "registers": ([24, 240], [40, 232]), "block": (128,)},
        {"block": (64,), "stages": (3, 4)},
    ),
    "paged_prefill": ({"rows": (64, 128), "block": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},),
    "rope_kv_write": ({"warps": (1, 2, 4, 8)},),
}
for kind in ("_int8", "_int4"):  # fewer warps a piece: each does more between what they must agree on
    STEPS["paged_decode" + kind] = (
        {"block": (32, 64, 128), "warps": (1, 2, 4), "stages": (2, 3, 4)},
        {"programs": (1056, 2112, 4224), "smallest": (64, 128, 256)},
    )
    STEPS["paged_prefill" + kind] = ({"rows": (8, 16, 32), "block": (32, 64), "warps": (1, 2), "stages": (2, 3)},)
# Rows of one token among prompts of so many in all: from which number on is the Hopper kernel no slower?
MIXES = {prompt: [(600, 1)] * 250 + [(0, prompt // 2)] * 2 for prompt in (64, 128, 256, 512, 1024)}


def lower(kernel, case, head_dim):
    """(lowered, Work) of a case with the sizes that are in the table now."""
    made = bench_kernels.work(kernel.replace("hopper", "paged"), (case, *HEADS[head_dim], head_dim))
    return (bench_kernels.without_hopper(made.lower) if kernel == "paged_prefill" else made.lower()), made


def compiled(pool, lowered):
    """A list of (executable, Work), or None where one does not compile: too much shared memory, mostly."""
    jobs = [(pool.submit(program.compile), made) for program, made in lowered]
    try:
        return [(job.result(), made) for job, made in jobs]
    except Exception as problem:  # XLA and Triton each have their own exceptions
        print(f"  does not compile: {str(problem).splitlines()[0][:100]}")
        return None


def microseconds(program, made):
    return bench_kernels.seconds(program, made, budget=0.015) * 1e6


def costs(pool, kernel, head_dim, candidates, table, deadline):
    """The mean logarithm of the cases' microseconds, for each candidate; infinite where it does not run in time."""
    key, lowered = f"16x{head_dim}", []
    for candidate in candidates:
        table[kernel][key] = candidate
        lowered.append([lower(kernel, case, head_dim) for case in CASES[kernel].values()])
    out = []
    for programs in [compiled(pool, programs) for programs in lowered]:
        if programs is None or time.monotonic() > deadline:
            out.append(math.inf)
        else:
            out.append(sum(math.log(microseconds(*each)) for each in programs) / len(programs))
    return out


def tune(pool, kernel, head_dim, table, deadline):
    """Improves table[kernel][key] in place."""
    key = f"16x{head_dim}"
    best = dict(tuning.lookup(kernel, "bfloat16", head_dim))
    table.setdefault(kernel, {})[key] = best
    for step, group in enumerate(STEPS[kernel]):
        tried = [best | dict(zip(group, values, strict=True)) for values in itertools.product(*group.values())]
        tried = [best, *(candidate for candidate in tried if candidate != best)]
        found = costs(pool, kernel, head_dim, tried, table, deadline)
        if step == 0:
            print(f"{kernel} {key}: {math.exp(found[0]):.1f} us with {best}", flush=True)
        least = min(found)
        if least < found[0] - 0.01:  # by 1 % and more
            best = tried[found.index(least)]
            print(f"  {math.exp(least):.1f} us with {best}", flush=True)
        table[kernel][key] = best


def tune_threshold(pool, head_dim, table):
    """Sets `tokens`, those that a step must have for the Hopper kernel, in place."""
    size = table["hopper_prefill"][f"16x{head_dim}"]
    size["tokens"] = 0
    lowered = [
        lower(kernel, case, head_dim) for case in MIXES.values() for kernel in ("hopper_prefill", "paged_prefill")
    ]
    took = [microseconds(*each) for each in compiled(pool, lowered)]
    size["tokens"] = 128
    for prompt, hopper, triton in zip(MIXES, took[::2], took[1::2], strict=True):
        print(f"250 rows and {prompt} tokens, head dim {head_dim}: {hopper:.1f} us, Triton {triton:.1f} us", flush=True)
        if hopper > triton * 1.01:
            size["tokens"] = max(size["tokens"], len(MIXES[prompt]) + prompt)


def write(table, path):
    lines = ",\n".join(
        f'  "{name}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in sizes.items()) + "\n  }"
        for name, sizes in table.items()
    )
    path.write_text(f"{{\n{lines}\n}}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=CASES, help="only this one")
    parser.add_argument("--head-dim", type=int, choices=HEADS, nargs="+", default=list(HEADS), help="only these")
    parser.add_argument("--seconds", type=float, default=500, help="stop after so long [500]")
    parser.add_argument("--out", type=Path, default=tuning.TUNED, help="folder of the file to write")
    options = parser.parse_args()
    if reason := triton_call.available():
        parser.exit(2, f"the kernels cannot run: {reason}\n")
    deadline = time.monotonic() + options.seconds
    kind, capability = triton_call.device()
    path = tuning.path(kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    tuning.TABLES[path.stem] = table
    hopper = capability == 90
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for head_dim, kernel in itertools.product(options.head_dim, CASES):
            if options.kernel not in (None, kernel) or time.monotonic() > deadline:
                continue
            if kernel == "hopper_prefill" and not (hopper and head_dim in (64, 128)):
                continue
            if kernel == "paged_prefill" and hopper and head_dim in (64, 128):
                continue  # left with windows and small steps there
            tune(pool, kernel, head_dim, table, deadline)
            if kernel == "hopper_prefill":
                tune_threshold(pool, head_dim, table)
            write(table, options.out / path.name)


if __name__ == "__main__":
    main()
