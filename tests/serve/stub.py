"""An engine without a model or jax: every request gets its tokens at a steady rate, as a batch would give them.

The tokens are a function of the prompt and the position (`token`), so that a client can tell whether one is missing.
`python -m tests.serve.stub --help`: the whole server on it, as `jaxserve serve` starts it.
"""

import argparse
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future

import numpy as np

from jaxserve.engine.request import EngineDead, Output

VOCAB = 50_000
PAGE = 16


def token(request, index):
    """The token at an index of a request's answer."""
    return (request.tokens[0] + index) % VOCAB


class StubEngine:
    """The interface of jaxserve.engine.engine.Engine; one turn emits one token to each running request."""

    def __init__(self, *, rate=50.0, lanes=256, session_len=4096, pages=100_000, vocab=VOCAB, path="/models/stub"):
        """rate: turns a second; 0 = as fast as it goes."""
        self.rate, self.session_len, self.max_batch_size, self.pages = rate, session_len, lanes, pages
        self.vocab, self.path = vocab, path
        self.on_turn = []
        self.running: OrderedDict = OrderedDict()
        self.waiting: OrderedDict = OrderedDict()
        self.counts = dict.fromkeys(("steps", "step_tokens", "prompt_tokens", "cached_tokens", "generated_tokens"), 0)
        self.late = 0.0  # seconds by which the latest turn began after its time
        self._pages_used = 0
        self._lanes = list(range(lanes))
        self._inbox = deque()
        self._wake = threading.Condition()
        self._closed, self._dead = False, None
        self._thread = threading.Thread(target=self._loop, name="stub-engine", daemon=True)
        self._thread.start()

    # From any thread ------------------------------------------------------------------------------------------------

    def submit(self, request):
        if request.prompt_len > self.session_len:
            raise ValueError(f"{request.prompt_len} prompt tokens do not fit into the session of {self.session_len}")
        self._send(self._add, request)

    def abort(self, request):
        if not self._closed:
            self._send(self._end, request, Output(None, "abort"))

    def score(self, tokens, want="logprobs"):
        return self.score_async(tokens, want).result()

    def score_async(self, tokens, want="logprobs"):
        future = Future()
        self._send(self._score, future, tokens, want)
        return future

    def stats(self):
        return self.counts | {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "preemptions": 0,
            "pages_used": self._pages_used,
            "pages_cached": 0,
            "pages_free": self.pages - self._pages_used,
            "step_tokens_padded": self.counts["step_tokens"],
            "busy_s": 0.0,
        }

    @property
    def info(self):
        return {
            "path": self.path,
            "session_len": self.session_len,
            "max_batch_size": self.max_batch_size,
            "vocab": self.vocab,
            "width": 8,
            "dtype": "float32",
            "checkpoint_config": {},
            "generation_config": {},
            "cache_tokens": self.pages * PAGE,
            "version": "0",
        }

    @property
    def alive(self):
        return not self._closed and self._dead is None

    def kill(self, why="killed by a test"):
        """What a fault does to an engine: every request ends with an error."""
        with self._wake:
            self._dead = why
            self._wake.notify()

    def close(self):
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _send(self, action, *arguments):
        with self._wake:
            if self._dead is not None:
                raise EngineDead(f"the engine has stopped: {self._dead}")
            if self._closed:
                raise EngineDead("the engine is closed")
            self._inbox.append((action, arguments))
            self._wake.notify()

    # On the engine's thread -----------------------------------------------------------------------------------------

    def _loop(self):
        due = time.perf_counter()
        while True:
            with self._wake:
                while not (self._inbox or self.running or self.waiting or self._closed or self._dead):
                    self._wake.wait()
                    due = time.perf_counter()
                sent, self._inbox = self._inbox, deque()
            for action, arguments in sent:
                action(*arguments)
            if self._closed or self._dead:
                break
            if self.rate:
                due += 1 / self.rate
                now = time.perf_counter()
                if due > now:
                    time.sleep(due - now)
                else:
                    self.late, due = now - due, now
            self._turn()
            for call in self.on_turn:
                call()
        self._finish()

    def _turn(self):
        computed = 0
        while self.waiting and self._lanes:
            request, _ = self.waiting.popitem(last=False)
            request.lane = self._lanes.pop()
            self._pages_used += -(-(request.prompt_len + request.max_new_tokens) // PAGE)
            self.running[request] = None
            self.counts["prompt_tokens"] += request.prompt_len
            computed += request.prompt_len
        for request in list(self.running):
            made = len(request.tokens) - request.prompt_len
            new = (request.tokens[0] + made) % self.vocab
            request.tokens.append(new)
            self.counts["generated_tokens"] += 1
            computed += 1
            if made + 1 >= request.max_new_tokens or new in request.stop_ids:
                self._end(request, Output(new, "stop" if new in request.stop_ids else "length"))
            else:
                request.outbox.put(Output(new))
        self.counts["steps"] += 1
        self.counts["step_tokens"] += computed

    def _add(self, request):
        request.max_new_tokens = min(request.max_new_tokens, self.session_len - request.prompt_len)
        if request.max_new_tokens < 1:
            self._end(request, Output(None, "length"))
        else:
            self.waiting[request] = None

    def _end(self, request, output):
        if request.finish:
            return
        request.finish = output.finish
        self.waiting.pop(request, None)
        if request in self.running:
            del self.running[request]
            self._lanes.append(request.lane)
            self._pages_used -= -(-(request.prompt_len + request.max_new_tokens) // PAGE)
            request.lane = -1
        request.outbox.put(output)

    def _score(self, future, tokens, want):
        n = len(tokens)
        values = {
            "logprobs": lambda: np.full(n - 1, -1.0, np.float32),
            "alternatives": lambda: (
                np.full(n - 1, -1.0, np.float32),
                np.tile(np.arange(20, dtype=np.int32), (n - 1, 1)),
                np.tile(-np.arange(20, dtype=np.float32), (n - 1, 1)),
            ),
            "logits": lambda: np.zeros((n, self.vocab), np.float32),
            "hidden": lambda: np.ones((n, 8), np.float32),
            "last": lambda: np.ones(8, np.float32),
        }
        future.set_result(values[want]())

    def _finish(self):
        with self._wake:
            self._closed, sent, self._inbox = True, self._inbox, deque()
        for action, arguments in sent:
            if action in (self._add, self._score):
                action(*arguments)
        for request in [*self.running, *self.waiting]:
            error = None if self._dead is None else f"the engine has stopped: {self._dead}"
            self._end(request, Output(None, "error" if error else "abort", error=error))


def main():
    """Launcher, web processes and link as they are; in the engine's process a stub, with the default model's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second of a request")
    parser.add_argument("--lanes", type=int, default=512)
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the server")
    given = parser.parse_args()
    from jaxserve import hub
    from jaxserve.config import EngineConfig
    from jaxserve.serve import engine_process, run
    from jaxserve.serve.address import Failed
    from jaxserve.serve.options import ServerOptions

    settings = {name: read(value) for name, _, value in (text.partition("=") for text in given.option)}
    engine_process.load = lambda *_: StubEngine(
        rate=given.rate,
        lanes=given.lanes,
        session_len=given.session_len,
        vocab=49_152,
        path=str(hub.default_gguf()),
    )
    try:
        return run.run(None, EngineConfig(), ServerOptions(**settings))
    except Failed as failed:
        print(failed.message, file=sys.stderr)
        return failed.exit_code


def read(value):
    if value in ("True", "False"):
        return value == "True"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    return value


if __name__ == "__main__":
    sys.exit(main())
