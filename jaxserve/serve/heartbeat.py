"""Tells those who wait on a queue that nothing has come for a while.

One thread or greenlet a process looks at all of them: under gevent a timeout for each `get` costs as much as the rest
of a token does (6 us against 3, measured), and is needed once in ten seconds.
"""

import functools
import math
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from queue import SimpleQueue

LOOKS = 4  # in the time that may pass in silence


class Waiter:
    """One who waits; `last` is when something came."""

    __slots__ = ("last", "queue", "seconds")

    def __init__(self, queue: SimpleQueue, seconds: float):
        self.queue, self.seconds, self.last = queue, seconds, time.monotonic()


class _Heart:
    def __init__(self):
        self._waiters: set[Waiter] = set()
        self._pause = math.inf  # seconds until the next look
        self._sooner = threading.Event()
        threading.Thread(target=self._beat, name="jaxserve-heartbeat", daemon=True).start()

    def add(self, waiter: Waiter) -> None:
        self._waiters.add(waiter)
        if waiter.seconds / LOOKS < self._pause:
            self._sooner.set()

    def remove(self, waiter: Waiter) -> None:
        self._waiters.discard(waiter)

    def _beat(self):
        while True:
            self._pause = math.inf  # whoever comes while this looks around rings
            waiters = list(self._waiters)
            self._pause = min((waiter.seconds for waiter in waiters), default=math.inf) / LOOKS
            if self._sooner.wait(self._pause if waiters else None):
                self._sooner.clear()
                continue
            now = time.monotonic()
            for waiter in waiters:
                if now - waiter.last >= waiter.seconds:
                    waiter.last = now
                    waiter.queue.put(waiter)


@functools.cache
def _heart() -> _Heart:
    """One a process, made when it is first needed: after the fork."""
    return _Heart()


@contextmanager
def beating(queue: SimpleQueue, seconds: float) -> Generator[Waiter]:
    """A Waiter that is put into its own queue whenever so many seconds have passed since `last`, or a quarter more."""
    waiter = Waiter(queue, seconds)
    _heart().add(waiter)
    try:
        yield waiter
    finally:
        _heart().remove(waiter)
