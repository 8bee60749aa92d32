"""Finds the block sizes of the attention kernels on this GPU and writes them to pallas_kernels/tuned/<device>.json.

    python scripts/tune_kernels.py [--kernel paged_decode] [--head-dim 128] [--seconds 500]

Each size is judged by the time over all cases, every case weighted alike; about six seconds a candidate.  What is in
the file already takes part, so a run can only improve it, and a run that --seconds cuts short keeps what it has
found.
"""

import argparse
import itertools
import json
import math
import time

import bench_kernels
import jax

from pallas_kernels import triton_call, tuning

CASES = {  # by kernel, with kv heads, query heads a kv head and head dim filled in
    "paged_decode": ([(4095, 1)], [(1023, 1)] * 16, [(199, 1)] * 48 + [(4095, 1)] * 16),
    "paged_prefill": ([(0, 4096)], [(4096, 512), (0, 512), (700, 700)]),
}
HEADS = {64: (8, 2), 128: (8, 4), 256: (4, 2)}
STEPS = {  # tried one group after the other, all combinations within a group
    "paged_decode": (
        {"block": (32, 64, 128), "warps": (4, 8), "stages": (3, 4)},
        {"programs": (528, 1056, 2112), "smallest": (64, 128, 256)},
    ),
    "paged_prefill": ({"rows": (64, 128), "block": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},),
}


def cost(kernel, head_dim):
    """Sum of the logarithms of the cases' times; infinite where the sizes do not fit the device."""
    total = 0.0
    for spans in CASES[kernel]:
        try:
            jax.clear_caches()
            total += math.log(bench_kernels.measure(kernel, (spans, *HEADS[head_dim], head_dim))["us"])
        except Exception as problem:  # too much shared memory, mostly; XLA and Triton each have their own exceptions
            print(f"  does not run: {str(problem).splitlines()[0][:100]}")
            return math.inf
    return total


def tune(kernel, head_dim, table, deadline):
    """Improves table[kernel][key] in place."""
    key = f"16x{head_dim}"
    best = dict(tuning.lookup(kernel, "bfloat16", head_dim))
    table.setdefault(kernel, {})[key] = best
    least = cost(kernel, head_dim)
    print(f"{kernel} {key}: {math.exp(least / len(CASES[kernel])):.1f} us with {best}", flush=True)
    for group in STEPS[kernel]:
        around = dict(best)
        for values in itertools.product(*group.values()):
            candidate = around | dict(zip(group, values, strict=True))
            if candidate == around or time.monotonic() > deadline:
                continue
            table[kernel][key] = candidate
            if (now := cost(kernel, head_dim)) < least - 0.01 * len(CASES[kernel]):  # by 1 % and more
                best, least = candidate, now
                print(f"  {math.exp(least / len(CASES[kernel])):.1f} us with {best}", flush=True)
        table[kernel][key] = best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", choices=CASES, help="only this one")
    parser.add_argument("--head-dim", type=int, choices=HEADS, help="only this one")
    parser.add_argument("--seconds", type=float, default=500, help="stop after so long [500]")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    kind, _ = triton_call.device()
    path = tuning.path(kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    tuning.TABLES[path.stem] = table
    for kernel in CASES if options.kernel is None else [options.kernel]:
        for head_dim in HEADS if options.head_dim is None else [options.head_dim]:
            tune(kernel, head_dim, table, deadline)
            lines = ",\n".join(
                f'  "{name}": {{\n' + ",\n".join(f'    "{k}": {json.dumps(v)}' for k, v in sizes.items()) + "\n  }"
                for name, sizes in table.items()
            )
            path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
