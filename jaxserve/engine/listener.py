"""The engine's end of the link: web processes connect here over a Unix socket, submit requests and get their tokens.

One thread reads all connections.  The engine's thread sends the tokens of a turn, one frame a connection, without ever
waiting: what a connection does not take is kept up to a bound, and then the connection is cut.  A connection that ends
takes its requests with it.
"""

import logging
import os
import selectors
import socket
import stat
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from pathlib import Path

import msgspec
import numpy as np

from jaxserve.engine import frames
from jaxserve.engine.frames import Abort, Done, Failed, Ping, Score, State, Submit, Tokens, frame
from jaxserve.engine.request import EngineDead, Output, Overloaded, Request, SamplingParams

log = logging.getLogger("jaxserve")

UNSENT = 2 * frames.MOST  # bytes that wait for a connection to be read, before it is cut
READ = 1 << 18  # bytes read at once
_read_params = msgspec.msgpack.Decoder(SamplingParams).decode


class Seat:
    """The outbox of a request that came over a connection."""

    __slots__ = ("connection", "extend", "number", "request", "told")

    def __init__(self, connection: "Connection", number: int):
        self.connection, self.number, self.extend = connection, number, connection.fresh.extend
        self.request: Request | None = None
        self.told = False  # whether the other end knows how much of the prompt was cached

    def put(self, output: Output) -> None:
        """Called by the engine for every token."""
        if self.told and output.finish is None and output.logprob is None:
            self.extend((self.number, output.token))
            return
        cached = 0 if self.told or self.request is None else self.request.cached
        self.told = True
        whole = (output.token, output.finish, output.logprob, output.top, output.error, cached)
        self.extend((self.number, whole))
        if output.finish is not None:
            self.connection.live.pop(self.number, None)
            self.request = None
            if output.token is None:  # not from a step, so no turn may follow
                self.connection.flush()


class Connection:
    """One web process, as the engine's process knows it."""

    def __init__(self, listener: "Listener", sock: socket.socket, serial: int):
        self.listener, self.socket, self.serial = listener, sock, serial
        self.live: dict[int, Request] = {}
        self.scoring: dict[int, Future] = {}
        self.fresh: list = []  # entries of the next Tokens
        self.unframer = frames.Unframer()
        self.lock = threading.Lock()  # of what is sent
        self.unsent: deque[bytes | memoryview] = deque()
        self.unsent_bytes = 0
        self.broken = False

    def flush(self) -> None:
        """Sends the tokens that have come since the last time.  From any thread; does not wait."""
        with self.lock:
            if entries := self.fresh[:]:
                del self.fresh[: len(entries)]
                self._send(frame(Tokens(entries)))

    def send(self, message: msgspec.Struct) -> None:
        """Sends a message after those before it.  From any thread; does not wait."""
        data = frame(message)
        with self.lock:
            self._send(data)

    def _send(self, data):
        if self.broken:
            return
        if not self.unsent:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return self._break()
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
            self.listener.write_later(self)
        self.unsent.append(data)
        self.unsent_bytes += len(data)
        if self.unsent_bytes > self.listener.most_unsent:
            log.error("a web process does not read its tokens: its connection is cut, and its requests are aborted")
            self._break()

    def write(self) -> bool:
        """Sends more of what waits, after the socket has become writable.  Whether everything is sent."""
        with self.lock:
            while self.unsent and not self.broken:
                data = self.unsent[0]
                try:
                    sent = self.socket.send(data)
                except BlockingIOError:
                    return False
                except OSError:
                    self._break()
                    break
                self.unsent_bytes -= sent
                if sent < len(data):
                    self.unsent[0] = memoryview(data)[sent:]
                else:
                    self.unsent.popleft()
            return True

    def _break(self):
        """The reading thread sees the end of the connection, and does the rest."""
        self.broken = True
        self.unsent.clear()
        self.unsent_bytes = 0
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Listener:
    """Takes connections at `path`, in a folder that is its user's alone, for an Engine, a Door, or what is like it."""

    def __init__(self, engine, path: str | Path, *, most_unsent: int = UNSENT):
        self.engine, self.path, self.most_unsent = engine, Path(path), most_unsent
        folder = self.path.parent.stat()
        if folder.st_uid != os.getuid() or stat.S_IMODE(folder.st_mode) & 0o077:
            raise ValueError(
                f"{self.path.parent}: the folder of the engine's socket must be its user's alone (mode 0700)"
            )
        self.path.unlink(missing_ok=True)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(self.path))
        self.path.chmod(0o600)
        self._server.listen(64)
        self._server.setblocking(False)
        self.stalled = False  # set by whoever watches the engine's steps
        self._connections: list[Connection] = []
        self._serial = 0
        self._blocked: deque[Connection] = deque()  # to be written when they can be
        self._scored: deque[tuple[Connection, int, Future]] = deque()
        self._bell, self._ring = socket.socketpair()  # wakes the thread
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._selector.register(self._bell, selectors.EVENT_READ, self._woken)
        engine.on_turn.append(self.flush)
        self._thread = threading.Thread(target=self._loop, name="jaxserve-listener", daemon=True)
        self._thread.start()

    # From any thread ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "ready", "draining", "stalled" or "dead"."""
        state = getattr(self.engine, "state", None) or ("ready" if self.engine.alive else "dead")
        return "stalled" if self.stalled and state == "ready" else state

    def flush(self) -> None:
        """Sends what the turn made; the engine calls it at the end of each."""
        for connection in self._connections:
            if connection.fresh:
                connection.flush()

    def announce(self) -> None:
        """Tells every web process the state at once."""
        for connection in list(self._connections):
            connection.send(State(self.state))

    def close(self) -> None:
        """Ends all connections, and with them their requests."""
        self._closed = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write_later(self, connection: Connection) -> None:
        """For a connection's own use: the thread writes it when it can be written."""
        self._blocked.append(connection)
        self._wake()

    def _wake(self):
        try:
            self._ring.send(b"!")
        except OSError:  # it has enough to wake up for, or is closed
            pass

    # On the listener's thread ---------------------------------------------------------------------------------------

    def _loop(self):
        while not self._closed:
            for key, events in self._selector.select():
                try:
                    self._attend(key.data, events)
                except Exception:
                    log.exception("the link to the web processes failed")
                    if isinstance(key.data, Connection):
                        self._end(key.data)
        for connection in list(self._connections):
            self._end(connection)
        self.engine.on_turn.remove(self.flush)
        self._selector.close()
        for sock in (self._server, self._bell, self._ring):
            sock.close()
        self.path.unlink(missing_ok=True)

    def _attend(self, what, events):
        if not isinstance(what, Connection):
            return what()
        if events & selectors.EVENT_WRITE and what.write():
            self._selector.modify(what.socket, selectors.EVENT_READ, what)
        if events & selectors.EVENT_READ:
            self._read(what)

    def _woken(self):
        self._bell.recv(READ)
        while self._blocked:
            connection = self._blocked.popleft()
            if connection in self._connections:
                self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
        while self._scored:
            self._tell_score(*self._scored.popleft())

    def _accept(self):
        try:
            sock, _ = self._server.accept()
        except OSError as error:
            log.warning("a web process could not connect: %s", error)
            return
        if frames.peer_uid(sock) != os.getuid():
            log.warning("a process of another user tried to reach the engine")
            sock.close()
            return
        sock.setblocking(False)
        self._serial += 1
        connection = Connection(self, sock, self._serial)
        connection.send(frames.Hello(frames.VERSION, self.engine.info, self.state))
        self._connections.append(connection)
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection):
        try:
            data = connection.socket.recv(READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self._end(connection)
        try:
            for body in connection.unframer.feed(data):
                self._take(connection, frames.FROM_WEB.decode(body))
        except (ValueError, RecursionError) as error:
            log.error("a web process sent what cannot be read, and its connection is closed: %s", error)
            self._end(connection)

    def _end(self, connection):
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection.socket)
        with connection.lock:
            connection.broken = True
        connection.socket.close()
        for request in list(connection.live.values()):
            self.engine.abort(request)
        for future in list(connection.scoring.values()):
            future.cancel()

    def _take(self, connection, message):
        """Does what a web process asks.  ValueError if it may not ask it."""
        if isinstance(message, Ping):
            return connection.send(State(self.state))
        number = message.number
        if isinstance(message, Abort):
            if request := connection.live.get(number):
                self.engine.abort(request)
            elif future := connection.scoring.pop(number, None):
                future.cancel()
            return
        if number in connection.live or number in connection.scoring:
            raise ValueError(f"the number {number} is taken")
        answer: Done | Failed = Done(number)
        try:
            if isinstance(message, Submit):
                self._submit(connection, message)
            elif isinstance(message, Score):
                return self._score(connection, message)
            else:
                answer = Done(number, self._call(message))
        except Exception as error:
            answer = failed(number, error)
        connection.send(answer)

    def _submit(self, connection, message):
        seat = Seat(connection, message.number)
        if not frames.plain(message.salt):
            raise ValueError("a salt is a text, a number or bytes")
        salt = message.salt if message.own_salt is None else ("own", connection.serial, message.own_salt)
        request = Request(
            self._tokens(message.tokens),
            message.max_new_tokens,
            _read_params(message.params),
            frozenset(message.stop_ids),
            seat,
            message.id,
            group=None if message.group is None else (connection.serial, message.group),
            salt=salt,
            grammar=message.grammar,
        )
        seat.request = connection.live[message.number] = request
        try:
            self.engine.submit(request)
        except BaseException:
            connection.live.pop(message.number, None)
            raise

    def _tokens(self, data):
        """Token ids, each of the vocabulary: the device does not look."""
        tokens, vocab = np.frombuffer(data, np.int32), self.engine.info["vocab"]
        if not len(tokens):
            raise ValueError("the prompt is empty")
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"token ids of this model are 0 to {vocab - 1}")
        return tokens.tolist()

    def _call(self, message):
        value = getattr(self.engine, message.name)(*message.arguments)
        if message.name == "drain":
            self.announce()
        return value

    def _score(self, connection, message):
        future = self.engine.score_async(self._tokens(message.tokens), message.want)
        connection.scoring[message.number] = future

        def done(future):  # on the engine's thread, which has better things to do than to copy arrays
            self._scored.append((connection, message.number, future))
            self._wake()

        future.add_done_callback(done)

    def _tell_score(self, connection, number, future):
        if connection.scoring.pop(number, None) is None or future.cancelled():
            return  # nobody waits
        try:
            value = future.result()
            arrays = [np.ascontiguousarray(a) for a in (value if isinstance(value, tuple) else (value,))]
            connection.send(Done(number, [(a.dtype.name, a.shape, a.data.cast("B")) for a in arrays]))
        except Exception as error:
            connection.send(failed(number, error))


def failed(number: int, error: BaseException) -> Failed:
    """An exception, as the other end will raise it."""
    if isinstance(error, Overloaded):
        return Failed(number, "overloaded", str(error), error.retry_after)
    if isinstance(error, EngineDead | CancelledError):
        return Failed(number, "dead", str(error) or "the engine has stopped")
    if isinstance(error, ValueError):
        return Failed(number, "value", str(error))
    log.error("a request could not be taken", exc_info=error)
    return Failed(number, "error", f"{type(error).__name__}: {error}")
