"""Server-sent events, and what becomes of clients that leave or do not read.

No WSGI server notices a client that leaves while nothing is written, so the sockets of waiting requests are watched.
"""

import functools
import logging
import select
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager

import orjson
from flask import Response, request

from jaxserve.serve import errors
from jaxserve.serve.errors import ApiError

log = logging.getLogger("jaxserve")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
SEND_BUFFER = 128 << 10  # bytes that the kernel may hold for a client that does not read
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data(value) -> bytes:
    """One event without a name."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def event(name: str, value) -> bytes:
    """One event with a name."""
    return b"event: " + name.encode() + b"\n" + data(value)


def error_event(error: ApiError) -> bytes:
    """An error after the answer has begun, as OpenAI's clients understand it."""
    return data(error.body())


def sse(
    answer, chunks: Iterable[bytes], *, slow_reader: float, error: Callable[[ApiError], bytes] = error_event
) -> Response:
    """Answers with a stream of events; the end of the stream, or of the client, closes `answer`.

    chunks: whole events, several in one if they come together.  What they raise becomes the last event, by `error`.
    slow_reader: seconds after which a client that does not read is given up.
    """
    stream = _Stream(answer, iter(chunks), error, client_socket())
    if stream.socket is not None:
        _bound(stream.socket, slow_reader)
    return Response(stream, mimetype="text/event-stream", headers=HEADERS)


class _Stream:
    """A generator would not do: closed before its first step, it never comes to its `finally`."""

    def __init__(self, answer, chunks: Iterator[bytes], error, client: socket.socket | None):
        self.answer, self.chunks, self.error, self.socket = answer, chunks, error, client
        if client is not None:
            _watch().add(client, answer.close)

    def __iter__(self):
        return self

    def __next__(self) -> bytes:
        try:
            return next(self.chunks)
        except StopIteration:
            raise
        except Exception as error:
            self.chunks = iter(())
            return self.error(errors.of(error))

    def close(self) -> None:
        if self.socket is not None:
            _watch().remove(self.socket)
            self.socket = None
        self.answer.close()


@contextmanager
def watched(answer, keep: bool = False) -> Generator[None]:
    """While this lasts, `answer` is closed as soon as the client of the current request leaves.

    keep: it goes on after this, if nothing was raised.
    """
    client = client_socket()
    if client is not None:
        _watch().add(client, answer.close)
    try:
        yield
    except BaseException:
        answer.close()
        raise
    finally:
        if client is not None:
            _watch().remove(client)
    if not keep:
        answer.close()


def client_socket() -> socket.socket | None:
    """The socket of the current request; None where the WSGI server does not tell."""
    return request.environ.get("gunicorn.socket") or request.environ.get("werkzeug.socket")


def _bound(client: socket.socket, seconds: float) -> None:
    client.settimeout(seconds)
    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


class _Watch:
    """Calls back when the other end of a socket is closed: one epoll, read by a greenlet or a thread."""

    def __init__(self):
        self._left: dict[int, Callable[[], None]] = {}
        monkey = sys.modules.get("gevent.monkey")
        if monkey is not None and monkey.is_module_patched("select"):
            import gevent

            self._epoll = monkey.get_original("select", "epoll")()
            gevent.spawn(self._greenlet)
        else:
            self._epoll = select.epoll()
            threading.Thread(target=self._thread, name="jaxserve-clients", daemon=True).start()

    def add(self, client: socket.socket, left: Callable[[], None]) -> None:
        descriptor = client.fileno()
        if descriptor < 0:
            left()
            return
        self._left[descriptor] = left
        mask = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLONESHOT
        try:
            self._epoll.register(descriptor, mask)
        except FileExistsError:
            self._epoll.modify(descriptor, mask)

    def remove(self, client: socket.socket) -> None:
        descriptor = client.fileno()
        if self._left.pop(descriptor, None) is not None:
            try:
                self._epoll.unregister(descriptor)
            except OSError:
                pass  # it is closed already

    def _greenlet(self):
        from gevent.socket import wait_read

        while True:
            wait_read(self._epoll.fileno())
            self._call(self._epoll.poll(0))

    def _thread(self):
        while True:
            self._call(self._epoll.poll())

    def _call(self, events):
        for descriptor, _ in events:
            left = self._left.get(descriptor)
            if left is not None:
                try:
                    left()
                except Exception:
                    log.exception("an answer whose client left could not be ended")


@functools.cache
def _watch() -> _Watch:
    """One a process, made at the first request: after the fork."""
    return _Watch()
