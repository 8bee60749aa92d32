"""The work on which engines are compared: token ids and lengths from a fixed seed, so no tokenizer is in the way.

lat1     one request, 512 in, 256 out: the latency of decoding
batchN   N equal requests at once, 512 in, 256 out
mix      1000 requests, 16-1024 in, 16-512 out, 256 clients
prefill  64 requests of 2048 in, 1 out
contextN one request of N in, 64 out: the latency of decoding behind a long context
"""

import random

NAMES = ("lat1", "batch16", "batch64", "batch256", "mix", "prefill")
SEED = 1234
IDS = 40_000  # token ids are below it, so a vocabulary has as many at least


def requests(name):
    """([(input ids, output length)], clients): the requests of a workload, and how many are open at a time."""
    draw = random.Random(SEED)

    def ids(n):
        return [draw.randrange(1000, IDS) for _ in range(n)]

    if name == "lat1":
        return [(ids(512), 256)], 1
    if name.startswith("batch") and name[5:].isdecimal():
        count = int(name[5:])
        return [(ids(512), 256) for _ in range(count)], count
    if name == "mix":
        return [(ids(draw.randint(16, 1024)), draw.randint(16, 512)) for _ in range(1000)], 256
    if name == "prefill":
        return [(ids(2048), 1) for _ in range(64)], 64
    if name.startswith("context") and name[7:].isdecimal():
        return [(ids(int(name[7:])), 64)], 1
    raise ValueError(f"no workload {name}; there are {', '.join(NAMES)}, contextN")
