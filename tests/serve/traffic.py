"""What clients send: good requests whose answers are checked, requests that are given up, and bad ones.

Each function does one request of its kind, chosen by `draw`, and returns (what it was, what was wrong or None).
"""

import http.client
import json
import socket
import struct
from contextlib import suppress
from random import Random
from urllib.parse import urlsplit

WAIT = 120  # seconds; a deadline
LONGEST = 40  # tokens of an answer
WORDS = "what is the capital of france and how many people live there today".split()  # noqa: SIM905


def text(draw: Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.choice((1, 5, 30, 200, 1500))))


def ask(url: str, path: str, body: bytes | dict, kind: str = "application/json") -> tuple[int, bytes]:
    """(status, body) of a POST over a connection of its own."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=WAIT)
    try:
        connection.request("POST", path, data, {"Content-Type": kind, "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def events(data: bytes) -> list[dict]:
    """The JSON of a stream's events; without [DONE]."""
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# Good ones ----------------------------------------------------------------------------------------------------------


def completion(model: str, draw: Random) -> tuple[str, dict]:
    prompt = text(draw) if draw.random() < 0.5 else [draw.randrange(100, 40_000) for _ in range(draw.randint(1, 300))]
    return "/v1/completions", {"model": model, "prompt": prompt}


def chat(model: str, draw: Random) -> tuple[str, dict]:
    messages = [{"role": "user", "content": text(draw)}]
    if draw.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Be brief."})
    return "/v1/chat/completions", {"model": model, "messages": messages}


def shaped(model: str, draw: Random) -> tuple[str, dict, int]:
    """A request to a route of OpenAI's with all sorts of parameters, and how many tokens its answers have."""
    path, body = draw.choice((completion, chat))(model, draw)
    length = draw.randint(1, LONGEST)
    body |= {"max_tokens": length, "ignore_eos": True, "temperature": draw.choice((0, 0.7)), "n": 1}
    if draw.random() < 0.2:
        body["n"] = 3
    if draw.random() < 0.2:
        body |= {"seed": draw.randrange(1000), "top_p": 0.9, "presence_penalty": 0.5}
    if draw.random() < 0.1:
        body["guided_regex"] = "[a-z ]*"  # as long as is asked for
    return path, body, length * body["n"]


def good(url: str, model: str, draw: Random) -> tuple[str, str | None]:
    """A request of a client that knows what it wants."""
    if draw.random() < 0.25:
        return other(url, model, draw)
    path, body, tokens = shaped(model, draw)
    if draw.random() < 0.5:
        status, data = ask(url, path, body)
        if status != 200:
            return path, f"{status} {data[:200]!r}"
        answer = json.loads(data)
        found, count = answer["usage"]["completion_tokens"], len(answer["choices"])
        if (found, count) != (tokens, body["n"]):
            return path, f"{found} tokens in {count} choices, not {tokens} in {body['n']}"
        return path, None
    return f"{path} streamed", streamed(url, path, body, tokens)


def streamed(url: str, path: str, body: dict, tokens: int) -> str | None:
    status, data = ask(url, path, body | {"stream": True, "stream_options": {"include_usage": True}})
    if status != 200:
        return f"{status} {data[:200]!r}"
    if not data.endswith(b"data: [DONE]\n\n"):
        return f"the stream ends in {data[-80:]!r}"
    chunks = events(data)
    finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    found = chunks[-1]["usage"]["completion_tokens"]
    if found != tokens or finishes != ["length"] * body["n"]:
        return f"{found} tokens, not {tokens}, that end in {finishes}"
    return None


def other(url: str, model: str, draw: Random) -> tuple[str, str | None]:
    """Other routes, by their status alone."""
    path, body = draw.choice((
        ("/tokenize", {"prompt": text(draw)}),
        ("/v1/encode", {"input": text(draw)}),
        ("/v1/embeddings", {"model": model, "input": text(draw)}),
        ("/v1/completions", {"model": model, "prompt": "a b c", "echo": True, "logprobs": 1, "max_tokens": 2}),
        ("/v1/chat/completions", {"model": model, "messages": "x", "max_tokens": 16, "guided_choice": ["yes", "no"]}),
        ("/v1/completions", {"model": model, "prompt": "x", "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"model": model, "input": text(draw), "max_output_tokens": 16, "store": False}),
        ("/v1/messages", {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}),
        ("/generate", {"prompt": text(draw), "max_tokens": 16}),
    ))  # fmt: skip
    status, data = ask(url, path, body)
    return path, None if status == 200 else f"{status} {data[:200]!r}"


# Those that are given up --------------------------------------------------------------------------------------------


def abort(url: str, model: str, draw: Random) -> tuple[str, str | None]:
    """A client that leaves: in its own request, at once, after a while, at a token; politely or not."""
    path, body, _ = shaped(model, draw)
    body |= {"stream": draw.random() < 0.7, "max_tokens": draw.choice((50, 2000))}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
    when = draw.choice(("in its request", "at once", "after a while", "at a token"))
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=WAIT) as client:
        if draw.random() < 0.3:  # closing it sends a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(whole[: draw.randint(1, len(whole) - 1)] if when == "in its request" else whole)
        if when == "after a while":
            client.settimeout(draw.random())
        elif when == "at a token":
            client.settimeout(2)
        try:
            for _ in range(draw.randint(1, 10) if when in ("after a while", "at a token") else 0):
                if not client.recv(4096):
                    break
        except TimeoutError:
            pass
    return when, None


# Bad ones -----------------------------------------------------------------------------------------------------------

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SAID = [{"role": "user", "content": "hi"}]
BAD = [
    ("truncated", COMPLETION, b'{"prompt": "a'),
    ("no object", COMPLETION, b"[]"),
    ("empty", CHAT, b""),
    ("deep", CHAT, b"[" * 50_000),
    ("not a number", COMPLETION, b'{"prompt": "a", "temperature": NaN}'),
    ("temperature", COMPLETION, {"prompt": "a", "temperature": "hot"}),
    ("max_tokens", COMPLETION, {"prompt": "a", "max_tokens": -1}),
    ("n", CHAT, {"messages": SAID, "n": 1_000_000}),
    ("model", CHAT, {"messages": SAID, "model": "nobody"}),
    ("messages", CHAT, {"messages": 5}),
    ("role", CHAT, {"messages": [{"role": "king", "content": "a"}]}),
    ("no prompt", COMPLETION, {"prompt": []}),
    ("token ids", COMPLETION, {"prompt": [-1]}),
    ("large ids", COMPLETION, {"prompt": [1 << 40]}),
    ("long", COMPLETION, {"prompt": [5] * 20_000}),
    ("very long", COMPLETION, {"prompt": "a" * 3_000_000}),
    ("prompts", COMPLETION, {"prompt": ["a"] * 2_000}),
    ("schema", CHAT, {"messages": SAID, "response_format": {"type": "hiccup"}}),
    ("stop", CHAT, {"messages": SAID, "stop": [""] * 9}),
    ("route", "/v1/nothing", {}),
]


def bad(url: str, model: str, draw: Random) -> tuple[str, str | None]:
    """A request that must get a 4xx with a JSON error."""
    name, path, body = draw.choice(BAD)
    if name == "route" and draw.random() < 0.5:
        return malformed(url, draw)
    if isinstance(body, dict) and "model" not in body:
        body = body | {"model": model}
    if isinstance(body, dict) and draw.random() < 0.5:
        body = body | {"stream": True}
    status, data = ask(url, path, body)
    if not 400 <= status < 500:
        return name, f"{status} {data[:200]!r}"
    if not json.loads(data).get("error"):
        return name, f"{status} without an error: {data[:200]!r}"
    return name, None


def malformed(url: str, draw: Random) -> tuple[str, str | None]:
    """What is no HTTP: the server may say so, or just close."""
    data = draw.choice((
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    ))  # fmt: skip
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=WAIT) as client:
        try:
            client.sendall(data)
            with suppress(OSError):  # ENOTCONN, where the server has already closed it
                client.shutdown(socket.SHUT_WR)
            answer = client.recv(4096)
        except ConnectionError:
            return "malformed", None
    return "malformed", None if answer[:10] in (b"", b"HTTP/1.1 4", b"HTTP/1.0 4") else f"{answer[:100]!r}"
