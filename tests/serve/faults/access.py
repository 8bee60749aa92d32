"""Rows 40 to 46: keys and ways around them, and HTTP that is not what it should be."""

import re
import socket
import time
from collections.abc import Iterator

from tests.serve.faults.row import Row, fault
from tests.serve.faults.target import CHAT, Reply, Target

ROUTES = (
    *(("GET", path) for path in ("/v1/models", "/v1/models/x", "/metrics", "/version", "/ready", "/tokenizer_info")),
    *(
        ("POST", path)
        for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize")
    ),
    *(("POST", path) for path in ("/detokenize", "/v1/encode", "/generate", "/v1/chat/interactive", "/get_ppl")),
)
# Other spellings: nothing may be told, whether or not there is such a route.
SPELLINGS = (
    *("//v1/models", "/V1/models", "/%2e/v1/models", "/v1/%6dodels", "/./v1/models", "/x/../v1/models", "/v1/models/"),
    *("/health/../v1/models", "/docs/../v1/models", "/static/../v1/models", "/health/%2e%2e/v1/models", "/v1;x/models"),
    *("/v1/models?x=/health", "/v1/models%00", "/v1/models#/health", "/health;/../v1/models", "/%76%31/models"),
)
NONE: dict[str, str] = {"Authorization": ""}


def wrong_keys(key: str) -> list[dict[str, str]]:
    """Headers that do not open anything."""
    keys = ("", "wrong", key + "x", key[:-1], key.swapcase(), "Bearer", key + "\t" + key)
    return [NONE, *({"Authorization": f"Bearer {wrong}"} for wrong in keys), {"Authorization": key}]


def routes(target: Target) -> list[tuple[str, str]]:
    """Those of the table, as far as the server has them with a key, and all of its own document."""
    found = [route for route in ROUTES if target.get(route[1], route[0]).status not in (404, 405)]
    document = target.get("/openapi.json").json()
    for path, methods in (document or {}).get("paths", {}).items():
        if path not in OPEN and "{" not in path:
            found += [(method.upper(), path) for method in methods if method in ("get", "post", "delete")]
    return list(dict.fromkeys(found))


OPEN = ("/health", "/ping", "/docs", "/redoc", "/openapi.json", "/")


def keys(target: Target) -> Iterator[str | None]:
    assert target.key is not None
    for method, path in routes(target):
        for headers in wrong_keys(target.key):
            reply = target.get(path, method, **headers)
            yield fault(target, f"{method} {path} {headers}", reply, 401)
    for path in SPELLINGS:
        reply = target.get(path, **NONE)
        if reply.status in range(200, 400):
            yield f"GET {path} without a key: {reply}"


def hosts(target: Target) -> Iterator[str | None]:
    """The path that is guarded is the one that is answered, whatever else names one."""
    for host in ("x/?", "x/health?", "localhost/health#", "x", "[::1", "a@b"):
        reply = target.get("/v1/models", Host=host, **NONE)
        if reply.status in range(200, 400):
            yield f"Host: {host}: {reply}"
    for line in (
        "http://x/health",
        f"http://{target.host}/v1/models",
        "http://x/v1/models",
        "http://x/?/v1/models",
        "http://health/v1/models",
    ):
        reply = target.get(line, **NONE)
        if reply.status in range(200, 400) and b'"data"' in reply.data:
            yield f"GET {line}: {reply}"


def preflight(target: Target) -> Iterator[str | None]:
    for path in (CHAT, "/v1/models"):
        headers = {"Origin": "https://evil.example", "Access_Control_Request_Method": "POST"}
        for reply in (target.get(path, "OPTIONS", **headers), target.get(path, Origin=headers["Origin"])):
            if allowed := reply.headers.get("access-control-allow-origin"):
                yield f"{path}: pages of {allowed} may call"


SLOW = 200  # connections
REFUSED = range(400, 500)


def _refused(what: str, reply: Reply, *others: int) -> str | None:
    """Closing is as good as a 4xx: what came is no request."""
    return None if reply.status in (0, *REFUSED, *others) else f"{what}: {reply}"


def heads(target: Target) -> Iterator[str | None]:
    yield _refused("64 KB in a header", target.get("/v1/models", X_Long="x" * 65_536))
    yield _refused("1000 headers", target.get("/v1/models", **{f"X-{i}": "1" for i in range(1000)}))
    yield _refused("a line of 64 KB", target.get("/" + "x" * 65_536))
    slow = []
    try:
        for number in range(SLOW):
            client = socket.create_connection(target.address, timeout=10)
            slow.append(client)
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"[: 20 + number % 60])
        for _ in range(3):
            if wrong := target.alive():
                yield f"beside {SLOW} slow connections: {wrong}"
            for client in slow:
                client.sendall(b"X")
            time.sleep(0.2)
    except OSError as error:
        yield f"connection {len(slow)}: {type(error).__name__}"
    finally:
        for client in slow:
            client.close()


def framing(target: Target) -> Iterator[str | None]:
    post = f"POST {CHAT} HTTP/1.1\r\nHost: {target.host}\r\nContent-Type: application/json\r\n"
    if target.key:
        post += f"Authorization: Bearer {target.key}\r\n"
    inside = "5\r\n{}   \r\n0\r\n\r\n"
    for name, text in {
        "length and chunks": post + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + inside,
        "chunks twice": post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + inside,
        "an encoding that is none": post + "Transfer-Encoding: xchunked\r\n\r\n" + inside,
        "two lengths": post + "Content-Length: 4\r\nContent-Length: 5\r\n\r\n{}   ",
        "a length below nothing": post + "Content-Length: -1\r\n\r\n{}",
        "a length that is none": post + "Content-Length: 0x2\r\n\r\n{}",
        "bare line feeds": post.replace("\r\n", "\n") + "Content-Length: 2\n\n{}",
        "a bad size": post + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        "a negative size": post + "Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
        "a huge size": post + "Transfer-Encoding: chunked\r\n\r\n" + "f" * 40 + "\r\n{}",
        "a space before the colon": post + "Content-Length : 2\r\n\r\n{}",
        "a folded header": post + "Content-Length:\r\n 2\r\n\r\n{}",
        "an unknown version": post.replace("1.1", "9.9", 1) + "\r\n",
        "no HTTP": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    }.items():
        yield _refused(name, _told(target, text.encode("latin-1")), 501)


def _told(target: Target, data: bytes) -> Reply:
    """Sends bytes and says that there are no more."""
    began = time.monotonic()
    received = b""
    try:
        with socket.create_connection(target.address, timeout=20) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                received += piece
    except OSError:
        pass
    reply = Reply(int(received[9:12]) if received[:5] == b"HTTP/" else 0, {}, received, time.monotonic() - began)
    target.seen.append(reply)
    return reply


def traversal(target: Target) -> Iterator[str | None]:
    for path in (
        "/v1/models/../../etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        "/../../../etc/passwd",
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/docs/..%5c..%5cetc%5cpasswd",
        "/docs/../../../../../etc/passwd",
        "/v1/models//etc/passwd",
        "/v1/models/%00",
    ):
        reply = target.get(path)
        if reply.status not in (404, 400, 0) or b"root:" in reply.data:
            yield f"{path}: {reply}"


LEAKS = re.compile(
    r"Traceback|\.py\b|site-packages|line \d+, in |0x[0-9a-f]{5,}|<\w[\w.]* object|<class|"
    r"(?<![\w.:])/(?:home|usr|root|tmp|var|opt|work|proc|models)/|root:x:|(?:Type|Value|Key|Attribute|Runtime)Error|"
    r"\b(?:msgspec|pydantic|orjson|llguidance|jaxlib|torch|gevent|gunicorn|werkzeug|site)\."
)


def leaks(target: Target) -> Iterator[str | None]:
    """Every error body that this server has sent so far, and some more."""
    target.get("/nope")
    target.get(CHAT)
    target.post(CHAT, b"{")
    target.chat(temperature=object.__name__, n=-1)
    target.chat(model="nobody")
    target.post(CHAT, b'{"messages": 5}', Content_Type="text/html")
    target.get("/v1/models", Authorization="Bearer wrong")
    for body in dict.fromkeys(target.errors):
        text = body.decode("utf-8", "replace")
        if found := LEAKS.search(text):
            yield f"an error tells {found[0]!r}: {text[:200]}"
        if target.key and target.key in text:
            yield f"an error tells the key: {text[:200]}"
        if len(text) > 2000:
            yield f"an error of {len(text)} letters: {text[:100]}"


ROWS = [
    Row(40, "no key, a wrong one, one letter more, on every route and spelling", "401 everywhere", keys, "key"),
    Row(41, "Host: `x/?` and an absolute request target", "access unchanged", hosts, "key"),
    Row(42, "OPTIONS preflight from a foreign Origin", "no allow header", preflight),
    Row(43, "64 KB header, 1000 headers, 200 slow connections", "4xx or closed; others served", heads),
    Row(44, "length and chunks at odds, bare LF, chunks of bad size", "400 or closed", framing),
    Row(45, "path traversal in /v1/models/../../etc", "404", traversal),
    Row(46, "error bodies", "no paths, reprs, addresses, keys", leaks),
]
