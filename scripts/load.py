"""Many slow streams at once: whether every token arrives, and how evenly.

    python scripts/load.py --streams 512 --rate 50 --seconds 20

The whole server (launcher, web processes, link) stands on an engine that only emits tokens, so what is measured is
everything but the model.  A table for people, and the last line is JSON.  Exit status 1 if a token is missing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxserve.bench import drive, figures
from jaxserve.bench.work import made_up
from tests.serve import processes as serving


def measure(
    server: serving.Running, streams: int, tokens: int, *, chat: bool = False, processes: int | None = None
) -> dict:
    """The figures of so many streams at once, of so many tokens each; `lost` counts the tokens that are missing."""
    target = drive.Target(server.url, drive.first_model(server.url), chat=chat, extra={"return_token_ids": True})
    items = made_up(streams, (8, 64), (tokens, tokens), 0, ids=None if chat else (1000, 40_000))
    before = server.cpu()
    began = time.perf_counter()
    result = drive.run(target, items, concurrency=streams, processes=processes)
    seconds = time.perf_counter() - began
    after = server.cpu()
    found = figures.summary(result, wanted=[tokens] * streams)
    good = [record for record in result["records"] if not record["error"]]
    found["lost"] = streams * tokens - sum(record["seen"] for record in good)
    found["cores"] = {name: round((after[name] - before[name]) / seconds, 2) for name in after}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=512)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second of each stream")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2, help="web processes")
    parser.add_argument("--chat", action="store_true")
    given = parser.parse_args()
    with serving.served(serving.stub(given.rate, given.streams, http_workers=given.workers)) as server:
        found = measure(server, given.streams, round(given.rate * given.seconds), chat=given.chat, processes=1)
    print(figures.table(found))
    print(f"tokens lost {found['lost']}; cores {found['cores']}, client {found['client_busy']}")
    print(json.dumps(vars(given) | found))
    sys.exit(1 if found["lost"] or found["errors"] else 0)


if __name__ == "__main__":
    main()
