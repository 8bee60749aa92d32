"""A live `jaxserve serve`: what it prints, and what becomes of it when processes are signalled or killed.

The engine's process has a stub in the place of a model; launcher, web processes and link are as they are.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from scripts import tiny_checkpoint
from tests.fake_engine import TEMPLATE, tokenizer
from tests.waiting import soon

DEADLINE = 120  # seconds; the machine may be busy
PROMPT = [1000, 2, 3]  # the stub goes on with 1000, 1001 and so on: tokens that are text
ROOT = Path(__file__).parents[2]


class Served:
    """A server in processes of its own."""

    def __init__(self, process, port, log, folder):
        self.process, self.port, self.log, self.folder = process, port, log, folder

    @property
    def said(self):
        return self.log.read_text(encoding="utf-8")

    def processes(self, name=""):
        """The living children, of one kind: engine, http (the master) or web."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in child.name() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.NoSuchProcess:
                pass
        return found

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def health(self):
        try:
            return self.request("GET", "/health")[0]
        except OSError:
            return None

    def complete(self, tokens=5):
        return self.request("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True})

    def stream(self, tokens=50):
        return Stream(self.port, tokens)

    def running(self):
        (line,) = [
            line
            for line in self.request("GET", "/metrics")[2].decode().splitlines()
            if line.startswith("jaxserve:num_requests_running")
        ]
        return float(line.split()[-1])

    def wait(self):
        return self.process.wait(DEADLINE)


class Stream:
    """A completion on its way."""

    def __init__(self, port, tokens):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.pieces = []

    def read(self, count):
        while len(self.pieces) < count:
            line = self.answer.readline()
            assert line, f"the stream ended: {self.pieces}"
            if line.startswith(b"data: "):
                self.pieces.append(line[6:].strip())

    def rest(self):
        """What is left of it; None where it was cut."""
        try:
            while line := self.answer.readline():
                if line.startswith(b"data: "):
                    self.pieces.append(line[6:].strip())
        except (http.client.IncompleteRead, ConnectionResetError):
            return None
        finally:
            self.connection.close()
        return self.pieces

    @property
    def whole(self):
        """Whether it has come to its regular end, with so many tokens."""
        pieces = self.rest() or [b""]
        return pieces[-1] == b"[DONE]" and json.loads(pieces[-2])["usage"]["completion_tokens"]


@contextmanager
def launched(folder, *command, ready=True):
    """A server under a folder of its own for temporary files; nothing of it is left behind."""
    log = folder / "log"
    temporary = Path(tempfile.mkdtemp(prefix="js-"))  # short: the path of a Unix socket has 107 bytes
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            env=environment,
            cwd=ROOT,
        )
    port = None
    try:
        if ready:
            soon(lambda: process.poll() is not None or log.read_text().count("HINT") == 3, 3 * DEADLINE)
            assert process.poll() is None, log.read_text()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)\S*/docs", log.read_text())[1])
        yield Served(process, port, log, temporary)
    finally:
        family = []
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=DEADLINE)
        assert not alive
        soon(lambda: not list(temporary.iterdir()))
        temporary.rmdir()


def serve(folder, *options, rate=50):
    given = [part for option in ("server_port=0", *options) for part in ("--option", option)]
    return launched(folder, "-m", "tests.serve.stub", "--rate", str(rate), *given)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for the tests that leave it alive."""
    with serve(tmp_path_factory.mktemp("server"), "graceful_timeout=5") as served:
        yield served


def test_it_says_where_it_is(server):
    hint = f"HINT:    Please open http://127.0.0.1:{server.port}/docs in a browser for detailed api usage!!!\n"
    assert server.said.count(hint) == 3
    assert "SmolLM2-135M-Instruct: context of 4,096 tokens" in server.said
    assert f"listening at http://127.0.0.1:{server.port} (the API under /v1), 2 web processes" in server.said
    assert "no key is asked for; only this machine can reach the server" in server.said
    assert server.request("GET", "/docs")[0] == 200
    assert server.request("GET", "/v1/models")[0] == 200
    soon(lambda: re.search(r"INFO .*GET /v1/models 200", server.said))


def test_processes(server):
    assert [len(server.processes(name)) for name in ("engine", "http", "web")] == [1, 1, 2]
    (folder,) = server.folder.glob("jaxserve-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "engine").stat().st_mode & 0o777 == 0o600
    for child in (psutil.Process(server.process.pid), *server.processes("web"), *server.processes("http")):
        maps = {Path(entry.path).name for entry in child.memory_maps()}
        assert not [name for name in maps if "jaxlib" in name or "libtorch" in name]


def test_a_stream(server):
    before = server.said.count("POST /v1/completions 200")
    assert server.stream(20).whole == 20
    soon(lambda: server.said.count("POST /v1/completions 200") > before)
    soon(lambda: server.running() == 0)


def test_large_headers_are_refused_and_others_served(server):
    assert server.request("GET", "/health", headers={"X-Long": "x" * 70_000})[0] in (400, 431)
    assert server.request("GET", "/health", headers={f"X-{number}": "1" for number in range(1000)})[0] in (400, 431)
    assert server.request("GET", "/" + "x" * 70_000)[0] in (400, 414)
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        assert server.health() == 200


def test_a_stopped_engine_is_reported_and_recovers(server):
    stream = server.stream(400)
    stream.read(3)
    (engine,) = server.processes("engine")
    engine.suspend()
    try:
        assert soon(lambda: server.health() == 503) < 50
        status, _, body = server.complete()
        assert status == 503 and "has not answered" in json.loads(body)["error"]["message"]
        soon(lambda: "has not answered for" in server.said)
    finally:
        engine.resume()
    assert soon(lambda: server.health() == 200) < 50
    assert stream.whole == 400
    assert "answers again" in server.said
    soon(lambda: server.complete()[0] == 200)


def test_a_killed_web_process_takes_only_its_own_streams(server):
    streams = [server.stream(300) for _ in range(8)]
    for stream in streams:
        stream.read(3)
    soon(lambda: server.running() == 8)
    owner = {}
    for child in server.processes("web"):
        for connection in child.net_connections("tcp"):
            if connection.raddr:
                owner[connection.raddr.port] = child.pid
    mine = [owner[stream.connection.sock.getsockname()[1]] for stream in streams]
    victim = max(set(mine), key=mine.count)
    os.kill(victim, signal.SIGKILL)
    lost = mine.count(victim)
    soon(lambda: server.running() == 8 - lost)
    for stream, pid in zip(streams, mine):
        assert stream.whole == (300 if pid != victim else False)
    soon(lambda: len(server.processes("web")) == 2)
    assert server.complete()[0] == 200


def test_a_killed_master_is_replaced(server):
    (master,) = server.processes("http")
    old = {child.pid for child in server.processes("web")}
    master.kill()
    soon(lambda: len(server.processes("web")) == 2 and not old & {child.pid for child in server.processes("web")})
    soon(lambda: server.health() == 200)
    assert server.complete()[0] == 200 and "was killed by SIGKILL; it is started again" in server.said


def test_a_killed_engine_comes_back(server):
    stream = server.stream(1000)
    stream.read(3)
    server.processes("engine")[0].kill()
    soon(lambda: server.health() == 503 or "is back" in server.said, 50)
    pieces = stream.rest()
    assert "the engine" in json.loads(pieces[-1])["error"]["message"]
    soon(lambda: server.complete()[0] == 200)  # each web process connects by itself
    assert "was killed by SIGKILL; it is started again (1 of 3" in server.said


def test_an_engine_that_dies_too_often_ends_the_server(tmp_path):
    with serve(tmp_path) as served:
        for _ in range(4):
            soon(lambda: served.process.poll() is not None or served.health() == 200)
            (engine,) = served.processes("engine")
            engine.kill()
            engine.wait(DEADLINE)
        assert served.wait() == 1
        assert "once too often" in served.said.splitlines()[-1]


def test_a_signal_lets_streams_end(tmp_path):
    with serve(tmp_path, rate=20) as served:
        idle = http.client.HTTPConnection("127.0.0.1", served.port)  # which must not hold the end up
        idle.request("GET", "/v1/models")
        idle.getresponse().read()
        streams = [served.stream(60) for _ in range(32)]
        for stream in streams:
            stream.read(2)
        children = served.processes()
        served.process.terminate()
        assert soon(lambda: served.health() == 503) < 10
        status, headers, body = served.complete()
        assert status == 503 and int(headers["Retry-After"]) >= 1 and b"shutting down" in body
        assert [stream.whole for stream in streams] == [60] * 32
        began = time.monotonic()
        assert served.wait() == 0
        assert time.monotonic() - began < 40
        assert not psutil.wait_procs(children, timeout=DEADLINE)[1]
        assert "Traceback" not in served.said
        idle.close()


def test_streams_get_so_much_time_and_no_more(tmp_path):
    with serve(tmp_path, "graceful_timeout=1") as served:
        stream = served.stream(4000)
        stream.read(2)
        served.process.terminate()
        pieces = stream.rest()
        assert pieces[-1] != b"[DONE]" and "error" in json.loads(pieces[-1])
        assert served.wait() == 0


def test_a_second_signal_stops_at_once(tmp_path):
    with serve(tmp_path) as served:
        stream = served.stream(4000)
        stream.read(2)
        children = served.processes()
        served.process.terminate()
        soon(lambda: served.health() == 503)
        served.process.send_signal(signal.SIGINT)
        assert served.wait() == 130
        assert not psutil.wait_procs(children, timeout=DEADLINE)[1]
        stream.connection.close()


def test_a_killed_launcher_leaves_nobody(tmp_path):
    with serve(tmp_path) as served:
        stream = served.stream(4000)
        stream.read(2)
        children = served.processes()
        assert len(children) == 4
        served.process.kill()
        assert not psutil.wait_procs(children, timeout=DEADLINE)[1]
        stream.connection.close()


def test_logs_in_json(tmp_path):
    with serve(tmp_path, "log_format=json") as served:
        assert served.complete()[0] == 200
        served.process.send_signal(signal.SIGINT)
        assert served.wait() == 0
        records = [json.loads(line) for line in served.said.splitlines() if not line.startswith("HINT")]
        assert any("POST /v1/completions 200" in record["message"] for record in records)
        assert {record["level"] for record in records} <= {"info", "warning"}


def test_behind_a_proxy_with_a_path(tmp_path):
    with serve(tmp_path, "root_path=/llm", "http_workers=1") as served:
        assert served.request("GET", "/llm/v1/models")[0] == 200
        assert served.request("GET", "/v1/models")[0] == 200
        assert f"http://127.0.0.1:{served.port}/llm/docs" in served.said


def failing(*arguments, environment=None):
    """(exit status, what it says, seconds) of a command that must end by itself."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE,
        env=os.environ | (environment or {}),
    )
    return done.returncode, done.stderr, time.monotonic() - began


def test_a_port_in_use(server):
    for host in ("127.0.0.1", "0.0.0.0"):
        status, said, seconds = failing("--server-port", str(server.port), "--server-name", host)
        assert status == 5 and seconds < 100
        assert said.splitlines() == [
            f"jaxserve: port {server.port} of {host} is in use: stop what listens there, or give another --server-port"
        ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint.write(folder, tiny_checkpoint.config("LlamaForCausalLM", vocab_size=258, eos_token_id=257))
    tokenizer().core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return folder


@pytest.mark.parametrize(
    "arguments, environment, status, said",
    [
        (["--tp", "99"], {}, 4, "tp=99 needs 99 devices"),
        ([], {"JAX_PLATFORMS": "cuda"}, 4, "cuda"),
        (["--chat-template", "nowhere.json"], {}, 2, "nowhere.json"),
        (["--tool-call-parser", "morse"], {}, 2, "morse"),
        (["--reasoning-parser", "none"], {}, 2, "'none'"),
        (["--generation-config", "/no/such/folder"], {}, 2, "/no/such/folder"),
        (["--api-key-file", "/no/such/file"], {}, 2, "/no/such/file"),
        (["--ssl"], {"SSL_KEYFILE": ""}, 2, "SSL_KEYFILE"),
        (["--server-name", "no.such.host.invalid"], {}, 5, "no.such.host.invalid"),
        (["--max-queued-requests", "0"], {}, 2, "max-queued-requests"),
        (["--cache-max-entry-count", "1"], {}, 4, "cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_served_is_one_line(tiny, arguments, environment, status, said):
    found, text, seconds = failing(
        str(tiny), "--server-port", "0", "--log-level", "error", *arguments, environment=environment
    )
    assert found == status and seconds < 100
    assert len(text.splitlines()) == 1 and "jaxserve" in text.split(":")[0] and said in text


def test_what_is_no_model(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    tiny_checkpoint.write(bare, tiny_checkpoint.config("LlamaForCausalLM"))
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in tiny.iterdir():
        (odd / file.name).write_bytes(file.read_bytes())
    (odd / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "x"}))
    for model, said in (
        (tmp_path / "empty", "empty"),
        (bare, "tokenizer"),
        (odd, "NoSuchModel"),
        ("/no/such", "/no/such"),
    ):
        status, text, _ = failing(str(model), "--server-port", "0", "--log-level", "error")
        assert status == 3 and len(text.splitlines()) == 1 and said in text, text


def test_a_model(tiny, tmp_path):
    """The whole of it, with a random model; a signal while it loads, too."""
    options = ("--server-port", "0", "--cache-max-entry-count", "60", "--max-batch-size", "2", "--session-len", "100")
    command = ("-m", "jaxserve", "serve", "api_server", str(tiny), *options, "--num-tokens-per-iter", "16")
    (tmp_path / "first").mkdir()
    with launched(tmp_path / "first", *command, ready=False) as loading:
        soon(lambda: "KV cache" in loading.said)
        loading.process.terminate()
        assert loading.wait() == 143
    with launched(tmp_path, *command, "--model-name", "tiny", "--tool-call-parser", "mistral") as served:
        assert "--tool-call-parser mistral: the chat template knows no tools" in served.said
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
        answers = [served.request("POST", "/v1/chat/completions", body) for _ in range(2)]
        (status, _, first), (_, _, second) = answers
        assert status == 200, first
        first, second = json.loads(first), json.loads(second)
        assert first["choices"] == second["choices"] and first["usage"]["completion_tokens"] <= 5
        assert served.request("POST", "/v1/chat/completions", body | {"model": "other"})[0] == 404
        assert b'jaxserve:num_requests_running{model_name="tiny"} 0.0' in served.request("GET", "/metrics")[2]
        served.process.terminate()
        assert served.wait() == 0
