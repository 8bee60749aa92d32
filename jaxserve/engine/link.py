"""The engine as a web process sees it: the interface of `Engine`, over a Unix socket.  No jax.

Works with threads and, after gevent's monkey patching, with greenlets.  The link connects by itself, again and again;
while there is no connection every call raises EngineDead at once, and what was under way ends with an error.
"""

import array
import itertools
import logging
import os
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.engine import frames
from jaxserve.engine.frames import Abort, Call, Done, Failed, Hello, Ping, Score, State, Submit, Tokens, frame
from jaxserve.engine.listener import Listener
from jaxserve.engine.request import EngineDead, Output, Overloaded, Request

__all__ = ["Link", "Listener"]

log = logging.getLogger("jaxserve")

STALL = 5  # seconds without a word after which the engine is thought to be stuck
PATIENCE = 10  # seconds that `info` waits for the first connection
AGAIN = 0.2  # seconds between two attempts to connect
READ = 1 << 18  # bytes read at once
UNSENT = 2 * frames.MOST  # bytes that wait to be sent, before requests are refused
GROUPS = 10_000  # groups and salts whose numbers are remembered
GONE = "the engine has stopped; it is started again"
STUCK = f"the engine has not answered for {STALL} seconds"
_params = msgspec.msgpack.Encoder().encode


class Wire:
    """One connection, and what waits to be sent over it."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self.unsent: deque[bytes] = deque()
        self.unsent_bytes = 0


class Waiter:
    """A question that the engine has not answered yet."""

    def __init__(self):
        self.answered = threading.Event()
        self.value: Any = None
        self.error: Exception | None = None


class Link:
    """The engine behind the Listener at `path`.  Safe to call from any thread or greenlet."""

    def __init__(self, path: str | Path, info: dict | None = None, render: Callable[[dict], str] | None = None):
        """info: what is known of the engine already; else the first connection brings it.

        render(snapshot) makes the text of `metrics` here; None: the engine's process does.
        """
        self.path, self._info, self._render = str(path), info, render
        self._lock = threading.Lock()  # of what follows
        self._wire: Wire | None = None
        self._numbers = itertools.count(1)
        self._live: dict[int, Request] = {}
        self._number_of: dict[Request, int] = {}
        self._waiters: dict[int, Waiter] = {}
        self._named: OrderedDict[Hashable, int] = OrderedDict()  # groups and salts
        self._state, self._silence = "dead", 0
        self._unsent = threading.Event()
        self._connected = threading.Event()
        self._closed = False
        threading.Thread(target=self._receive, name="jaxserve-link", daemon=True).start()
        threading.Thread(target=self._send, name="jaxserve-link-writer", daemon=True).start()

    # The engine's interface -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues a request, and waits until the engine has taken it.

        ValueError if it can never be served, Overloaded if too much is queued, EngineDead.
        """
        message = Submit(
            next(self._numbers),
            _bytes(request.tokens),
            request.max_new_tokens,
            msgspec.Raw(_params(request.params)),
            list(request.stop_ids),
            request.id,
            self._name(request.group),
            request.salt if frames.plain(request.salt) else None,
            None if frames.plain(request.salt) else self._name(request.salt),
            request.grammar,
        )
        self._ask(message, request)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is; its outbox gets an Output.  Does not wait, and may be called again."""
        with self._lock:
            if (number := self._number_of.get(request)) is not None:
                self._post(Abort(number))

    def score(self, tokens, want: frames.WANTS = "logprobs"):
        """As the engine's: waits, and returns an array or a tuple of them.  Whoever stops waiting aborts it."""
        import numpy as np

        parts = self._ask(Score(next(self._numbers), _bytes(tokens), want))
        arrays = [np.frombuffer(data, np.dtype(name)).reshape(shape) for name, shape, data in parts]
        return tuple(arrays) if len(arrays) > 1 else arrays[0]

    def stats(self) -> dict[str, float]:
        """Counts of the engine and of its door."""
        return self._call("stats")

    def snapshot(self) -> dict:
        """The door's plain data from which `jaxserve.serve.metrics.render` makes text."""
        return self._call("snapshot")

    def metrics(self) -> str:
        """Text for Prometheus."""
        return self._call("metrics") if self._render is None else self._render(self.snapshot())

    def drain(self) -> None:
        """From now on the engine takes no more requests, from nobody."""
        self._call("drain")

    def keep(self, kind: str, key: str, value: bytes) -> None:
        """Stores a value where all web processes find it."""
        self._call("keep", kind, key, value)

    def recall(self, kind: str, key: str) -> bytes | None:
        """What was kept, or None."""
        return self._call("recall", kind, key)

    def forget(self, kind: str, key: str) -> None:
        """Drops what was kept, if anything."""
        self._call("forget", kind, key)

    @property
    def info(self) -> dict:
        """Plain data of the engine and its model."""
        if self._info is None and not self._connected.wait(PATIENCE):
            raise EngineDead(f"nothing answers at {self.path}")
        assert self._info is not None
        return self._info

    @property
    def state(self) -> str:
        """ "ready", "draining", "stalled" (it does not answer) or "dead" (there is no connection)."""
        if self._wire is None:
            return "dead"
        return "stalled" if self._silence >= STALL else self._state

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.state in ("ready", "draining")

    def close(self) -> None:
        """Ends the connection; what is under way ends with an error."""
        self._closed = True
        self._unsent.set()
        self._lose("the link to the engine was closed")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # What waits for an answer ---------------------------------------------------------------------------------------

    def _call(self, name, *arguments):
        return self._ask(Call(next(self._numbers), name, list(arguments)))

    def _ask(self, message, request: Request | None = None):
        """Sends a message that has a number, and returns what it is answered with."""
        number, waiter, data = message.number, Waiter(), frame(message)
        if self.state == "stalled":
            raise EngineDead(STUCK)
        with self._lock:
            if self._wire is None:
                raise EngineDead(GONE)
            if self._wire.unsent_bytes + len(data) > UNSENT:
                raise Overloaded("the engine is behind with reading requests")
            self._waiters[number] = waiter
            if request is not None:
                self._live[number], self._number_of[request] = request, number
            self._post(data)
        try:
            while not waiter.answered.wait(1):
                if self.state == "stalled":
                    raise EngineDead(STUCK)
            if waiter.error is not None:
                raise waiter.error
            return waiter.value
        except BaseException:
            self._forget(number, request, tell=waiter.error is None)
            raise
        finally:
            self._waiters.pop(number, None)

    def _forget(self, number, request, tell):
        with self._lock:
            if request is not None:
                self._live.pop(number, None)
                self._number_of.pop(request, None)
            if tell:
                self._post(Abort(number))

    def _post(self, message):
        """Hands a message, or its bytes, to the writer.  Under the lock."""
        if (wire := self._wire) is not None:
            data = message if isinstance(message, bytes) else frame(message)
            wire.unsent.append(data)
            wire.unsent_bytes += len(data)
            self._unsent.set()

    def _name(self, thing: Hashable) -> int | None:
        """A number that stands for a group or a salt: the same for equal ones."""
        if thing is None:
            return None
        with self._lock:
            number = self._named.setdefault(thing, next(self._numbers))
            self._named.move_to_end(thing)
            if len(self._named) > GROUPS:
                self._named.popitem(last=False)
            return number

    # The writer -----------------------------------------------------------------------------------------------------

    def _send(self):
        while not self._closed:
            self._unsent.wait()
            self._unsent.clear()
            wire = self._wire
            if wire is None:
                continue
            try:
                while wire.unsent:
                    self._write(wire, wire.unsent.popleft())
            except OSError:
                _shut(wire.socket)  # the reader does the rest

    def _write(self, wire: Wire, data: bytes):
        view = memoryview(data)
        while view and wire is self._wire:
            try:
                view = view[wire.socket.send(view) :]
            except TimeoutError:  # it does not read; whether that is a stall, the reader finds out
                pass
        with self._lock:
            wire.unsent_bytes -= len(data)

    # The reader -----------------------------------------------------------------------------------------------------

    def _receive(self):
        while not self._closed:
            try:
                sock = self._connect()
            except OSError:
                time.sleep(AGAIN)
                continue
            try:
                self._read(sock)
            except (OSError, ValueError, RecursionError) as error:
                log.warning("the connection to the engine failed: %s", error)
            finally:
                self._lose(GONE)
                sock.close()
            time.sleep(AGAIN / 2)

    def _connect(self):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(1)
            sock.connect(self.path)
            if frames.peer_uid(sock) != os.getuid():
                raise OSError("what listens there is another user's")
        except BaseException:
            sock.close()
            raise
        return sock

    def _read(self, sock):
        """Everything that comes over one connection, until it ends."""
        unframer = frames.Unframer()
        while not self._closed:
            try:
                data = sock.recv(READ)
            except TimeoutError:
                self._silence += 1
                with self._lock:
                    if self._wire is not None and not self._wire.unsent:
                        self._post(Ping())
                continue
            if not data:
                return
            self._silence = 0
            for body in unframer.feed(data):
                message = frames.FROM_ENGINE.decode(body)
                if isinstance(message, Tokens):
                    self._deliver(message.entries)
                elif isinstance(message, Hello):
                    self._greet(sock, message)
                elif isinstance(message, State):
                    self._state = message.state
                else:
                    self._answer(message)

    def _greet(self, sock, message):
        if message.version != frames.VERSION:
            raise ValueError(
                f"the engine speaks version {message.version} of the link, and this process {frames.VERSION}"
            )
        with self._lock:
            self._info, self._state, self._wire = message.info, message.state, Wire(sock)
        self._connected.set()

    def _deliver(self, entries):
        for number, what in zip(entries[::2], entries[1::2], strict=True):
            if (request := self._live.get(number)) is None:
                continue
            if type(what) is int:
                output = Output(what)
            else:
                token, finish, logprob, top, error, cached = what
                output = Output(token, finish, logprob, tuple(map(tuple, top)), error)
                request.cached = cached or request.cached
                if finish is not None:
                    request.finish = finish
                    self._live.pop(number, None)
                    self._number_of.pop(request, None)
            if output.token is not None:
                request.tokens.append(output.token)
            _put(request, output)

    def _answer(self, message):
        if (waiter := self._waiters.get(message.number)) is None:
            return
        if isinstance(message, Done):
            waiter.value = message.value
        else:
            waiter.error = _exception(message)
        waiter.answered.set()

    def _lose(self, why):
        """The connection is gone: nobody is left waiting."""
        with self._lock:
            wire, self._wire, self._silence, self._state = self._wire, None, 0, "dead"
            live, self._live, self._number_of = self._live, {}, {}
            waiters = dict(self._waiters)
            for number, waiter in waiters.items():
                live.pop(number, None)  # whoever submits it is told
                waiter.error = EngineDead(why)
                waiter.answered.set()
        if wire is not None:
            _shut(wire.socket)
        for request in live.values():
            request.finish = "error"
            _put(request, Output(None, "error", error=why))


def _bytes(tokens) -> bytes:
    try:
        return array.array("i", tokens).tobytes()
    except OverflowError:
        raise ValueError("a token id is below 2**31") from None


def _put(request, output):
    try:
        if request.outbox is not None:
            request.outbox.put(output)
    except Exception:
        log.exception("the outbox of request %s failed", request.id)


def _exception(message: Failed) -> Exception:
    if message.kind == "overloaded":
        return Overloaded(message.message, message.retry_after)
    kinds = {"value": ValueError, "dead": EngineDead, "error": RuntimeError}
    return kinds[message.kind](message.message)


def _shut(sock):
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
