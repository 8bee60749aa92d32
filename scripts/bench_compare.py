"""Says which figures of bench_offline.py got worse from one run to another, by more than the runs' own noise.

    python scripts/bench_compare.py OLD NEW [--least 0.02]

OLD and NEW are files with the `RESULT {...}` lines of bench_offline.py (other lines are passed over), or with its JSON
alone, an object a line.  A figure counts as worse when it changed by more than the larger of the two runs' spreads
(slowest less fastest, over the median) and --least.  Wrong token counts and answers that differ from those of requests
run alone count always, and so does a figure that OLD has and NEW lacks.  Exit status 1 if anything got worse or is
missing, 2 if there is nothing to compare.
"""

import argparse
import json
import sys
from pathlib import Path

FIGURES = {"out_tok_s": 1, "itl_ms": -1}  # 1: more is better; in_tok_s and req_s of one workload follow out_tok_s
FAULTS = ("wrong_counts", "different_alone")


def results(path):
    """{(model, work, tp): figures}, the last of each.  ValueError names a file that holds none or cannot be read."""
    found = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix("RESULT ")
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON, an object a line ({error})") from None
            if "work" in row:
                found[row.get("model"), row["work"], row.get("tp", 1)] = row
    if not found:
        raise ValueError(f"{path} holds no results")
    return found


def compare(old, new, least):
    """[(figure, what happened to it, worse)] of one workload."""
    noise = max(old.get("spread", 0.0), new.get("spread", 0.0), least)
    rows = []
    for figure, sign in FIGURES.items():
        before, after = old.get(figure), new.get(figure)
        if before and after:
            change = (after / before if sign > 0 else before / after) - 1
            text = f"{before:,} -> {after:,} ({change:+.1%}, noise {noise:.1%})"
            rows.append((figure, text, change < -noise))
        elif before:
            rows.append((figure, f"{before:,} -> {'nothing' if after is None else after}", True))
    for fault in FAULTS:
        if new.get(fault):
            rows.append((fault, f"{old.get(fault, 0)} -> {new[fault]}", True))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--least", type=float, default=0.02, help="what is never counted, as a fraction [0.02]")
    options = parser.parse_args()
    try:
        old, new = results(options.old), results(options.new)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not old.keys() & new.keys():
        print("the files have no workload of one model in common", file=sys.stderr)
        return 2
    worse = False
    for key, before in old.items():
        if key not in new:
            print(f"{key[0]} {key[1]} tp={key[2]}: missing")
            worse = True
            continue
        for figure, text, bad in compare(before, new[key], options.least):
            print(f"{key[0]} {key[1]} tp={key[2]}: {figure} {text}{'  WORSE' if bad else ''}")
            worse |= bad
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
