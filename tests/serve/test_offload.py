"""What a web process does in its pool of threads takes no lock of gevent's.

gevent's monkey patching makes every lock one of its own.  Two threads of the pool that want the same one at the same
moment may wait for ever: about one request in 100,000 was never answered, and its thread was lost.
"""

import subprocess
import sys

SCRIPT = """
from gevent import monkey
monkey.patch_all()
import json, traceback
import gevent.thread

current, here, taken = monkey.get_original("_thread", "get_ident"), monkey.get_original("_thread", "get_ident")(), []

def watched(kind):
    acquire = kind.acquire
    def acquired(self, *arguments, **named):
        if current() != here:
            taken.append("".join(traceback.format_stack(limit=6)))
        return acquire(self, *arguments, **named)
    kind.acquire = acquired

watched(gevent.thread.LockType)
from jaxserve.serve import service
from tests.serve.local import serving

pooled = []
offload = service.offload
service.offload = lambda work, *arguments: (pooled.append(work), offload(work, *arguments))[1]
service.offload(gevent.thread.allocate_lock().acquire)
assert len(taken) == 1, "it is not seen"
taken.clear(), pooled.clear()

tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}
schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
long = [{"role": "user", "content": "word " * 3000}]
with serving(session_len=40_000, service={"tool_format": "hermes"}) as server:
    for body in (
        {"messages": long, "max_tokens": 2},
        {"messages": long[:1] * 2, "tools": [tool], "tool_choice": "required", "max_tokens": 2},
        {"messages": [{"role": "user", "content": "a"}] * 3000, "max_tokens": 2},
        *({"messages": "hi", "response_format": schema, "max_tokens": 2} for _ in range(3)),
        {"messages": "hi", "structured_outputs": {"regex": "("}},
        {"messages": "x" * 200_000},
    ):
        print(server.post("/v1/chat/completions", body)[0])
    print(server.post("/v1/messages/count_tokens", {"model": "fake-1b", "messages": long})[0])
    print(server.post("/tokenize", {"prompt": "word " * 3000})[0])
print(len(pooled))
assert not taken, taken[0]
"""


def test_threads_of_the_pool_take_no_lock_of_gevents():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *statuses, pooled = map(int, done.stdout.split())
    assert statuses == [200] * 6 + [400, 400, 200, 200] and pooled >= 8
