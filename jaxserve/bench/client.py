"""One process of the load: many requests at once over raw sockets, and the time of every chunk that comes back.

`python -m jaxserve.bench.client` reads a job from a line of standard input and the moment to begin from the next, and
writes its records to standard output (`drive` starts it).  Sockets and epoll, because a client must not be what is
measured.
"""

import os
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import orjson

TICKET = 4  # bytes of a request's number in the pipe that all clients draw from
BLOCK = 1 << 18
SWEEP = 1.0  # seconds between two looks at time limits


class Answer:
    """The bytes of one HTTP answer, turned into the payloads of its server-sent events, or its body."""

    def __init__(self):
        self.status, self.head, self.body = 0, b"", bytearray()
        self.stream = False  # whether it is one of server-sent events
        self.complete = False  # the answer has come to its end, as HTTP counts
        self._raw = bytearray()
        self._left: int | None = None  # bytes of a body with a length
        self._chunked = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that `data` completes; of an answer that is no stream, none: it is in `body`."""
        self._raw += data
        if not self.status:
            end = self._raw.find(b"\r\n\r\n")
            if end < 0:
                return []
            self._read_head(bytes(self._raw[:end]))
            del self._raw[: end + 4]
        if self._chunked:
            self._unchunk()
        else:
            self.body += self._raw
            self._raw.clear()
            self.complete = self._left is not None and len(self.body) >= self._left
        return self._events() if self.stream else []

    def _read_head(self, head: bytes) -> None:
        line, _, rest = head.partition(b"\r\n")
        self.status, self.head = int(line.split(None, 2)[1]), rest.lower()
        fields = dict(field.split(b":", 1) for field in self.head.split(b"\r\n") if b":" in field)
        self._chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
        self.stream = b"text/event-stream" in fields.get(b"content-type", b"")
        if b"content-length" in fields:
            self._left = int(fields[b"content-length"])

    def _unchunk(self) -> None:
        raw, at = self._raw, 0
        while (end := raw.find(b"\r\n", at)) >= 0:
            size = int(raw[at:end].partition(b";")[0], 16)
            if len(raw) < end + size + 4:
                break
            self.body += raw[end + 2 : end + 2 + size]
            at = end + size + 4
            if not size:
                self.complete = True
                break
        del raw[:at]

    def _events(self) -> list[bytes]:
        end = self.body.rfind(b"\n")
        if end < 0:
            return []
        lines = bytes(self.body[:end]).split(b"\n")
        del self.body[: end + 1]
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


class Stream:
    """One request on its way, and what is known of its answer."""

    __slots__ = ("answer", "due", "gaps", "last", "number", "out", "record", "said", "sent", "socket")

    def __init__(self, number: int, due: float | None, sock: socket.socket, out: bytes):
        """due: when it should have been sent, if a plan says.  out: what is still to be sent."""
        self.number, self.due, self.sent = number, due, time.perf_counter()
        self.socket, self.out, self.answer = sock, out, Answer()
        self.gaps: list[float] = []
        self.last, self.said = 0.0, 0
        self.record: dict = {
            "number": number,
            "error": None,
            "first": None,
            "tokens": None,
            "prompt": None,
            "finish": None,
        }

    def event(self, payload: bytes, now: float) -> None:
        """Takes one event in."""
        if payload == b"[DONE]":
            self.record["done"] = True
            return
        message = orjson.loads(payload)
        if message.get("error"):
            self.record["error"] = text_of(message["error"])
        for choice in message.get("choices") or ():
            self.record["finish"] = choice.get("finish_reason") or self.record["finish"]
            tokens = spoken(choice)
            if tokens:
                self._spoke(tokens, now)
        if usage := message.get("usage"):
            self.record["tokens"], self.record["prompt"] = usage.get("completion_tokens"), usage.get("prompt_tokens")

    def _spoke(self, tokens: int, now: float) -> None:
        if self.last:
            self.gaps.append(now - self.last)
        else:
            self.record["first"] = now
        self.last = now
        self.said += tokens

    def ended(self, now: float, error: str | None = None) -> dict:
        """The record of a request whose answer is complete, or cut short by an error."""
        record, answer = self.record, self.answer
        record["error"] = record["error"] or error or self._fault()
        if not record["error"] and not answer.stream:
            message = orjson.loads(bytes(answer.body))
            usage = message.get("usage") or {}
            record["tokens"], record["prompt"] = usage.get("completion_tokens"), usage.get("prompt_tokens")
        record["seen"] = self.said  # of the ids in the chunks, where the server lists them; else chunks with text
        record["tokens"] = record["tokens"] or self.said
        started = self.sent if self.due is None else self.due
        record |= {"start": started, "lag": self.sent - started, "end": now, "last": self.last or now}
        record["gaps"] = [round(gap, 6) for gap in self.gaps]
        return record

    def _fault(self) -> str | None:
        answer = self.answer
        if not answer.status:
            return "the server closed the connection without an answer"
        if answer.status != 200:
            try:
                message = text_of(orjson.loads(bytes(answer.body)))
            except orjson.JSONDecodeError:
                message = bytes(answer.body[:200]).decode(errors="replace")
            return f"HTTP {answer.status}: {message}"
        if answer.stream and not self.record.get("done") and not self.record["finish"]:
            return "the stream ended before its end"
        return None


def spoken(choice: dict) -> int:
    """Tokens in a chunk's choice, as far as it tells: those listed, else 1 for any text."""
    if ids := choice.get("token_ids"):
        return len(ids)
    if choice.get("text"):
        return 1
    delta = choice.get("delta")
    if delta and any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls")):
        return 1
    return 0


def text_of(error) -> str:
    """The message in an error of any server."""
    while isinstance(error, dict):
        error = error.get("error") or error.get("message") or error.get("detail") or str(error)
    return str(error)[:200]


class Client:
    """Runs a job: {url, headers, bodies, timeout, done: fd that gets a byte for each request that ends, ...}."""

    def __init__(self, job: dict):
        url = urlsplit(job["url"])
        self.host, self.tls = url.hostname, url.scheme == "https"
        self.port = url.port or (443 if self.tls else 80)
        self.address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        head = [f"POST {url.path} HTTP/1.1", f"Host: {url.netloc}", "Content-Type: application/json"]
        head += ["Connection: close", *(f"{name}: {value}" for name, value in job["headers"].items())]
        self.head = "\r\n".join(head) + "\r\nContent-Length: "
        self.bodies, self.timeout = job["bodies"], job["timeout"]
        self.poller = select.epoll()
        self.streams: dict[int, Stream] = {}
        self.records: list[dict] = []
        self.done = job["done"]

    def open(self, number: int, due: float | None = None) -> None:
        """Sends a request."""
        body = orjson.dumps(self.bodies[number])
        family, kind, protocol, _, address = self.address
        sock = socket.socket(family, kind, protocol)
        stream = Stream(number, due, sock, f"{self.head}{len(body)}\r\n\r\n".encode() + body)
        try:
            if family != socket.AF_UNIX:
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                stream.socket.connect(address)
                stream.socket = ssl.create_default_context().wrap_socket(stream.socket, server_hostname=self.host)
            stream.socket.setblocking(False)
            if not self.tls:
                stream.socket.connect_ex(address)
        except OSError as error:
            self.close(stream, str(error))
            return
        self.streams[stream.socket.fileno()] = stream
        self.poller.register(stream.socket, select.EPOLLIN | select.EPOLLOUT)

    def close(self, stream: Stream, error: str | None = None) -> None:
        """Ends a request, and records it."""
        self.streams.pop(stream.socket.fileno(), None)
        stream.socket.close()
        try:
            record = stream.ended(time.perf_counter(), error)
        except orjson.JSONDecodeError:
            record = stream.ended(time.perf_counter(), "the answer is no JSON")
        self.records.append(record)
        os.write(self.done, b".")

    def turn(self, wait: float) -> None:
        """Waits for sockets, at most so long, and serves those that are ready."""
        for fd, events in self.poller.poll(wait):
            stream = self.streams.get(fd)
            if stream is None:
                continue
            try:
                if stream.out and events & select.EPOLLOUT:
                    self.send(stream)
                if events & ~select.EPOLLOUT:
                    self.receive(stream)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                continue
            except (OSError, ValueError, AttributeError, TypeError) as error:
                self.close(stream, f"{type(error).__name__}: {error}")

    def send(self, stream: Stream) -> None:
        sent = stream.socket.send(stream.out)
        stream.out = stream.out[sent:]
        if not stream.out:
            self.poller.modify(stream.socket, select.EPOLLIN)

    def receive(self, stream: Stream) -> None:
        data = stream.socket.recv(BLOCK)
        now = time.perf_counter()
        while isinstance(stream.socket, ssl.SSLSocket) and stream.socket.pending():
            data += stream.socket.recv(BLOCK)
        for payload in stream.answer.feed(data) if data else ():
            stream.event(payload, now)
        if not data or stream.answer.complete or stream.record.get("done"):
            self.close(stream)

    def sweep(self) -> None:
        """Ends what takes too long."""
        now = time.perf_counter()
        for stream in [stream for stream in self.streams.values() if now - stream.sent > self.timeout]:
            self.close(stream, f"no end after {self.timeout:g} s")


def closed_loop(client: Client, slots: int, tickets: Iterator[int]) -> None:
    """Keeps so many requests open, as long as there are any."""
    swept, more = time.perf_counter(), True
    while more or client.streams:
        while more and len(client.streams) < slots:
            number = next(tickets, None)
            if number is None:
                more = False
            else:
                client.open(number)
        client.turn(SWEEP)
        if time.perf_counter() - swept > SWEEP:
            client.sweep()
            swept = time.perf_counter()


def open_loop(client: Client, plan: list[tuple[float, int]], slots: int | None) -> None:
    """Sends each request at its time, however many are open; with slots, it waits while so many are."""
    plan, swept = plan[::-1], time.perf_counter()
    while plan or client.streams:
        now = time.perf_counter()
        while plan and plan[-1][0] <= now and (slots is None or len(client.streams) < slots):
            due, number = plan.pop()
            client.open(number, due)
        full = slots is not None and len(client.streams) >= slots
        client.turn(max(0.0, min(SWEEP, plan[-1][0] - time.perf_counter())) if plan and not full else SWEEP)
        if now - swept > SWEEP:
            client.sweep()
            swept = now


def drawn(fd: int) -> Iterator[int]:
    """Numbers of requests from the pipe that all clients share, until it is empty."""
    while len(ticket := os.read(fd, TICKET)) == TICKET:
        yield int.from_bytes(ticket)


def run(job: dict, start: float) -> dict:
    """Does a job from a moment on: {"records": [...], "busy": CPU seconds of this process over those it took}.

    The job has `plan`, [(seconds after the start, number)], or `tickets`, a pipe to draw numbers from; and `slots`, how
    many requests may be open (None: all).
    """
    client = Client(job)
    time.sleep(max(0.0, start - time.perf_counter()))
    began, cpu = time.perf_counter(), time.process_time()
    if "plan" in job:
        open_loop(client, [(start + due, number) for due, number in job["plan"]], job["slots"])
    else:
        closed_loop(client, job["slots"] or len(job["bodies"]), drawn(job["tickets"]))
    busy = (time.process_time() - cpu) / max(1e-9, time.perf_counter() - began)
    return {"records": client.records, "busy": round(busy, 3)}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches whoever started this, who ends it
    job = orjson.loads(sys.stdin.buffer.readline())
    os.write(job["done"], b"r")
    line = sys.stdin.buffer.readline()
    if line:  # else whoever started this is gone
        result = run(job, float(line))
        os.close(job["done"])
        sys.stdout.buffer.write(orjson.dumps(result))


if __name__ == "__main__":
    main()
