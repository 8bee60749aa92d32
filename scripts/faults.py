"""Faults and bad inputs against any server that speaks OpenAI's protocol: what it answers, and whether it lives on.

    python scripts/faults.py http://127.0.0.1:23333 [--api-key KEY] [--json FILE]

The rows that need no more than a URL; all 75, and where each is shown, are in tests/serve/faults/table.py.  While a row
is done, four greedy streams run beside it; they must be answered as without it, and the next normal request within 2 s,
else the row counts as failed.  A table for people, and the last line is JSON.  Exit status 1 if a row failed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from tests.serve.faults import table
from tests.serve.faults.row import judge
from tests.serve.faults.target import Streams, Target


def memory_of(pid: int | None):
    """A function that tells the bytes that a server's processes hold; None where they are not at hand."""
    if pid is None:
        return None
    launcher = psutil.Process(pid)

    def memory() -> int:
        return sum(process.memory_info().rss for process in [launcher, *launcher.children(recursive=True)])

    return memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--api-key", help="one that the server asks for; without it rows 40 and 41 are left out")
    parser.add_argument(
        "--limit", type=int, help="requests that the server takes at once; without it row 51 is left out"
    )
    parser.add_argument("--room", action="store_true", help="its context holds 260 000 words: row 24")
    parser.add_argument("--pid", type=int, help="of the server, on this machine: its memory is looked at, too")
    parser.add_argument("--rows", default="1-75", help="only these, such as 1,5,30-35")
    parser.add_argument("--slack", type=float, default=1.0, help="how many times over a time limit may be passed")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer of the streams beside")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    target = Target(given.url, given.api_key, memory=memory_of(given.pid), slack=given.slack)
    wanted = table.chosen(given.rows)
    has = {"": True, "key": bool(given.api_key), "limit": bool(given.limit), "room": given.room}
    streams, results = Streams(target, given.tokens), []
    watch = table.Watch(target)
    for row in table.checks(limit=given.limit, watch=watch):
        if row.number not in wanted or not has[row.needs]:
            continue
        result = judge(row, target, None if row.number == table.LAST else streams)
        results.append(result)
        print(line(result), flush=True)
    score = sum(result.passed for result in results)
    print(f"{score} of {len(results)} rows; the table has {len(table.ROWS)}")
    report = {
        "url": given.url,
        "model": target.model,
        "score": score,
        "of": len(results),
        "rows": [
            {
                "row": result.row.number,
                "fault": result.row.fault,
                "expected": result.row.expected,
                "got": result.got,
                "seconds": round(result.seconds, 4),
                "passed": result.passed,
                "wrong": result.wrong,
            }
            for result in results
        ],
    }
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("url", "model", "score", "of")}))
    sys.exit(score != len(results))


def line(result) -> str:
    row = result.row
    mark = "ok  " if result.passed else "FAIL"
    text = f"{row.number:>2} {mark} {result.seconds:8.3f} s  {row.fault}: {row.expected}; got {result.got}"
    return "\n".join([text, *(f"        {wrong[:300]}" for wrong in result.wrong[:10])])


if __name__ == "__main__":
    main()
