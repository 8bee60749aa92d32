"""A server that is tested by its URL: what is sent to it, what comes back, and whether good clients notice.

Knows no row of the table and nothing of how the server is made.  It speaks through plain sockets, so that it can send
what no HTTP library sends.
"""

import functools
import http.client
import io
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
WAIT = 120  # seconds; a deadline for what has none of its own
PIECE = 1 << 16
NEXT = 2.0  # seconds within which a normal request is answered: the table's
GAUGES = {"running": "num_requests_running", "waiting": "num_requests_waiting", "cache": "cache_usage_perc"}


@dataclass
class Reply:
    """An answer; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)  # names in small letters
    data: bytes = b""
    seconds: float = 0.0

    def json(self):
        """What it holds, None if that is no JSON."""
        try:
            return json.loads(self.data)
        except ValueError:
            return None

    @property
    def error(self) -> dict | None:
        """The error of an OpenAI envelope."""
        found = self.json()
        found = found.get("error") if isinstance(found, dict) else None
        return found if isinstance(found, dict) and isinstance(found.get("message"), str) else None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        choice = self.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"] or ""

    def __str__(self):
        return f"{self.status or 'closed'} {self.data[:160]!r}"


class Target:
    """One server.

    seen, took: all replies since `begin`, and seconds that were measured beside them.  errors: all error bodies since
    the start.
    """

    def __init__(self, url: str, key: str | None = None, *, memory: Callable[[], int] | None = None, slack: float = 1):
        """memory: bytes that its processes hold.  slack: how many times over a time limit may be passed."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"a server's address is http://HOST:PORT, not {url}")
        self.address, self.host = (parts.hostname, parts.port or 80), parts.netloc
        self.key, self.memory, self.slack = key, memory, slack
        self.seen: list[Reply] = []
        self.took: list[float] = []
        self.errors: list[bytes] = []
        found = self.get("/v1/models")
        if found.status != 200:
            raise ValueError(f"{url}/v1/models answers {found}")
        card = found.json()["data"][0]
        self.model, self.context = card["id"], card.get("max_model_len")
        self.said = [{"role": "user", "content": "Name a river."}]

    def begin(self) -> None:
        self.seen, self.took = [], []

    # One exchange ---------------------------------------------------------------------------------------------------

    def head(self, method: str, path: str, size: int | None = None, **headers: str) -> bytes:
        """The beginning of a request, as a client of this server sends it.

        headers: with "_" for "-"; an empty one is left out.
        """
        given = {"Host": self.host, "Connection": "close", "Content-Type": "application/json"}
        if self.key:
            given["Authorization"] = f"Bearer {self.key}"
        if size is not None:
            given["Content-Length"] = str(size)
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape")

    def post(self, path: str, body: dict | bytes, *, wait: float = WAIT, **headers: str) -> Reply:
        """headers: as in `head`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.raw([self.head("POST", path, len(data), **headers), data], wait)

    def get(self, path: str, method: str = "GET", **headers: str) -> Reply:
        return self.raw([self.head(method, path, **headers)])

    def raw(self, pieces: Iterable[bytes], wait: float = WAIT) -> Reply:
        """Sends bytes over a connection of their own; the answer may come before all of them are sent."""
        began = time.monotonic()
        try:
            with socket.create_connection(self.address, timeout=wait) as client:
                data = _exchange(client, iter(pieces), began + wait)
        except ConnectionError:
            data = b""
        reply = _parsed(data)
        reply.seconds = time.monotonic() - began
        self.seen.append(reply)
        if reply.status >= 400:
            self.errors.append(reply.data)
        return reply

    def chat(self, **body) -> Reply:
        """One message.  body: more fields; ... leaves one out."""
        given = {"model": self.model, "messages": self.said, "max_tokens": 4, "temperature": 0} | body
        return self.post(CHAT, {name: value for name, value in given.items() if value is not ...})

    def complete(self, **body) -> Reply:
        given = {"model": self.model, "prompt": "Name a river.", "max_tokens": 4, "temperature": 0} | body
        return self.post(COMPLETION, {name: value for name, value in given.items() if value is not ...})

    @functools.cached_property
    def usual(self) -> float:
        """Seconds that a good request takes: what is no part of a limit for what goes before the answer."""
        seen, taken = self.seen, sorted(self.chat().seconds for _ in range(5))
        self.seen = seen[:-5]
        return taken[2]

    # Connections that stay open -------------------------------------------------------------------------------------

    def open(self, path: str = COMPLETION, small: bool = False, **body) -> socket.socket:
        """A connection over which a request was sent, and nothing was read.  small: a reader with little room."""
        given = {"model": self.model, "temperature": 0, "stream": True} | body
        if path == COMPLETION:
            given = {"prompt": "Name a river."} | given
        data = json.dumps(given).encode()
        client = socket.socket()
        if small:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(WAIT)
        client.connect(self.address)
        client.sendall(self.head("POST", path, len(data)) + data)
        return client

    def load(self) -> dict[str, float] | None:
        """Requests that run and wait, and the share of the cache in use; None where /metrics does not say so."""
        samples = self.metrics()
        found = {}
        for name, ends in GAUGES.items():
            values = [value for sample, value in samples.items() if sample.partition("{")[0].endswith(ends)]
            if values:
                found[name] = values[0]
        return found if {"running", "waiting"} <= found.keys() else None

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its whole name; ValueError if the text is none."""
        from prometheus_client.parser import text_string_to_metric_families

        reply = self.raw([self.head("GET", "/metrics")])
        self.seen.pop()
        if reply.status != 200:
            return {}
        samples = {}
        for family in text_string_to_metric_families(reply.data.decode()):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                samples[f"{sample.name}{{{labels}}}"] = sample.value
        return samples

    # Whether it lives -----------------------------------------------------------------------------------------------

    def alive(self) -> str | None:
        """What is wrong with the next normal request."""
        reply = self.chat(max_tokens=1)
        self.seen.pop()
        if reply.status != 200:
            return f"the next request: {reply}"
        if reply.seconds > NEXT * self.slack:
            return f"the next request took {reply.seconds:.1f} s"
        return None


class Streams:
    """Good clients: streams of greedy answers, whose texts are compared with those of an undisturbed run."""

    PROMPTS = ("Once upon a time", "The capital of France is", "One two three four", "Water boils at")

    def __init__(self, target: Target, tokens: int = 48, rounds: int = 2):
        """rounds: undisturbed runs; what any of them answers counts as right."""
        self.target, self.tokens = target, tokens
        self.right: list[set[str]] = [set() for _ in self.PROMPTS]
        for _ in range(rounds):
            for known, text in zip(self.right, self._all(), strict=True):
                known.add(text)

    def _all(self) -> list[str]:
        texts = [""] * len(self.PROMPTS)

        def one(index):
            texts[index] = self._answer(self.PROMPTS[index])

        _together(one, range(len(self.PROMPTS)))
        if broken := [text for text in texts if text.startswith("!")]:
            raise ValueError(f"the server cannot be tested, as its streams fail undisturbed: {broken[0]}")
        return texts

    @contextmanager
    def beside(self, patient: bool = False) -> Iterator[list[str]]:
        """Keeps them running; the list holds, afterwards, how they differed.

        patient: they come again where they are told to, as the server is full.
        """
        differing: list[str] = []
        stop = threading.Event()

        def client(index):
            while not stop.is_set():
                text = self._answer(self.PROMPTS[index])
                if patient and text.startswith(("!ValueError: 503", "!ValueError: 429")):
                    stop.wait(0.2)
                    continue
                if text not in self.right[index]:
                    differing.append(f"a stream beside it: {text[:120]!r}, not {next(iter(self.right[index]))[:120]!r}")
                    return

        threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(len(self.PROMPTS))]
        for thread in threads:
            thread.start()
        try:
            yield differing
        finally:
            stop.set()
            for thread in threads:
                thread.join(WAIT)

    def _answer(self, prompt: str) -> str:
        """The whole text of a stream; "!" and a reason where it did not come to its end."""
        text = ""
        try:
            with self.target.open(prompt=prompt, max_tokens=self.tokens) as client:
                for event in events(client):
                    if event == "[DONE]":
                        return text
                    found = json.loads(event)
                    if "error" in found:
                        return f"!{event}"
                    for choice in found.get("choices", ()):
                        text += choice.get("text") or ""
        except (OSError, ValueError) as error:
            return f"!{type(error).__name__}: {error}"
        return f"!it was cut after {text!r}"


def events(client: socket.socket) -> Iterator[str]:
    """The events of an answer that is a stream.  ValueError if it is none."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    if answer.status != 200:
        raise ValueError(f"{answer.status} {answer.read()[:200]!r}")
    while line := answer.readline():
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def first(client: socket.socket) -> bytes:
    """The head of an answer and, if it streams, its first event."""
    data = b""
    while b"data:" not in data and (piece := client.recv(PIECE)):
        data += piece
    return data


def many(work: Callable[[int], object], count: int, threads: int = 16) -> list:
    """What `work` returns for 0 to count - 1, done by a few threads."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(count)))


def _together(work, items) -> None:
    threads = [threading.Thread(target=work, args=(item,), daemon=True) for item in items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)


def _exchange(client: socket.socket, pieces: Iterator[bytes], deadline: float) -> bytes:
    """What comes back until the other end closes."""
    client.setblocking(False)
    sending: memoryview | None = memoryview(next(pieces))
    received = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        writing = [client] if sending is not None and not received else []
        readable, writable, _ = select.select([client], writing, [], left)
        if readable:
            try:
                piece = client.recv(PIECE)
            except BlockingIOError:
                continue
            except ConnectionError:
                break
            if not piece:
                break
            received.append(piece)
        elif writable:
            try:
                sending = sending[client.send(sending[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except ConnectionError:  # what it has said before may still be read
                sending = None
                continue
            while sending is not None and not sending:
                following = next(pieces, None)
                sending = None if following is None else memoryview(following)
    return b"".join(received)


class _Bytes:
    """What http.client reads an answer from."""

    def __init__(self, data):
        self.data = data

    def makefile(self, *_):
        return io.BytesIO(self.data)


def _parsed(data: bytes) -> Reply:
    if not data:
        return Reply(0)
    answer = http.client.HTTPResponse(_Bytes(data))
    try:
        answer.begin()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, headers, answer.read())
    except http.client.HTTPException:
        return Reply(0, data=data)
