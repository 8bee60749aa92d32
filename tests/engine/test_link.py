"""The link between the engine's process and the web processes: both ends in one process, with threads."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from jaxserve.engine import frames, link
from jaxserve.engine.frames import Abort, Hello, Submit, Tokens, Unframer, frame
from jaxserve.engine.link import Link, Listener
from jaxserve.engine.request import EngineDead, Output, Overloaded, Request, SamplingParams
from tests.serve.stub import StubEngine, token
from tests.waiting import soon

DEADLINE = 20  # seconds; the machine may be busy


class Quiet:
    """An engine that answers when the test says so."""

    def __init__(self):
        self.on_turn, self.submitted, self.aborted, self.kept = [], [], [], {}
        self.alive, self.state, self.error = True, "ready", None
        self.info = {"path": "/models/quiet", "vocab": 100, "session_len": 64, "max_batch_size": 4}
        self.scores = []

    def submit(self, request):
        if self.error is not None:
            raise self.error
        self.submitted.append(request)

    def abort(self, request):
        self.aborted.append(request)
        if not request.finish:
            request.finish = "abort"
            request.outbox.put(Output(None, "abort"))

    def score_async(self, tokens, want):
        from concurrent.futures import Future

        self.scores.append((tokens, want, future := Future()))
        return future

    def stats(self):
        return {"running": len(self.submitted), "busy_s": 0.5}

    def snapshot(self):
        return {"a": [1, 2.5]}

    def metrics(self):
        return "jaxserve:requests 1\n"

    def drain(self):
        self.state = "draining"

    def keep(self, kind, key, value):
        self.kept[kind, key] = value

    def recall(self, kind, key):
        return self.kept.get((kind, key))

    def forget(self, kind, key):
        self.kept.pop((kind, key), None)

    def turn(self, *outputs):
        """One token each for the first requests, then the end of the turn."""
        for request, output in zip(self.submitted, outputs):
            request.finish = output.finish
            request.outbox.put(output)
        for call in self.on_turn:
            call()


class Box(queue.SimpleQueue):
    def ask(self, tokens=(1, 2, 3), count=5, **fields):
        return Request(list(tokens), count, fields.pop("params", SamplingParams()), outbox=self, **fields)

    def wait(self, count=1):
        return [self.get(timeout=DEADLINE) for _ in range(count)]


def failing(kind, call):
    """A thread whose call is to fail, and the list that its exception comes into."""
    failures = []

    def run():
        try:
            call()
        except kind as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return failures, thread


@contextmanager
def linked(engine, folder, **settings):
    folder.chmod(0o700)
    listener = Listener(engine, folder / "engine", **settings)
    try:
        with Link(folder / "engine") as web:
            soon(lambda: web.alive)
            yield SimpleNamespace(link=web, listener=listener, engine=engine, path=folder / "engine")
    finally:
        listener.close()


@pytest.fixture
def quiet(tmp_path):
    with linked(Quiet(), tmp_path) as both:
        yield both


def test_a_request_arrives_whole(quiet):
    params = SamplingParams(
        temperature=0.5, seed=2**32 - 1, logit_bias=((7, -1.5),), bad_words=((1, 2), (3,)), min_new_tokens=2, logprobs=3
    )
    assert params.tables and not params.plain  # computed once, and not sent
    box = Box()
    request = box.ask(
        [5, 99, 0], 9, params=params, stop_ids=frozenset({2, 50}), id="r1", salt="tenant", grammar='{"grammars": []}'
    )
    quiet.link.submit(request)
    (there,) = quiet.engine.submitted
    assert (there.tokens, there.max_new_tokens, there.params) == ([5, 99, 0], 9, params)
    assert (there.stop_ids, there.id, there.salt, there.grammar) == ({2, 50}, "r1", "tenant", '{"grammars": []}')
    assert there.group is None and there.prompt_len == 3


def test_tokens_come_back_in_order(quiet):
    box = Box()
    request = box.ask()
    quiet.link.submit(request)
    quiet.engine.submitted[0].cached = 2
    outputs = [Output(7), Output(8), Output(9, None, -0.25, ((9, -0.25), (4, -2.0))), Output(10), Output(11, "length")]
    for output in outputs:
        quiet.engine.turn(output)
    assert box.wait(5) == outputs
    assert request.output == [7, 8, 9, 10, 11] and request.finish == "length" and request.cached == 2


def test_several_tokens_of_a_turn_are_one_frame(quiet, monkeypatch):
    box = Box()
    for _ in range(4):
        quiet.link.submit(box.ask())
    sent = []
    monkeypatch.setattr("jaxserve.engine.listener.frame", lambda message: sent.append(message) or frame(message))
    quiet.engine.turn(*(Output(i) for i in range(4)))
    assert sorted(output.token for output in box.wait(4)) == [0, 1, 2, 3]
    assert len(sent) == 1


def test_an_error_without_a_turn_arrives(quiet):
    box = Box()
    quiet.link.submit(box.ask())
    quiet.engine.submitted[0].outbox.put(Output(None, "error", error="the step failed"))
    assert box.wait() == [Output(None, "error", error="the step failed")]


@pytest.mark.parametrize(
    "error, kind",
    [
        (ValueError("it never fits"), ValueError),
        (Overloaded("the queue is full", 7), Overloaded),
        (EngineDead("the engine has stopped: x"), EngineDead),
        (KeyError("a bug"), RuntimeError),
    ],
)
def test_refusals(quiet, error, kind):
    quiet.engine.error = error
    box = Box()
    request = box.ask()
    with pytest.raises(kind) as caught:
        quiet.link.submit(request)
    assert type(caught.value) is kind and (str(error) in str(caught.value) or kind is RuntimeError)
    if kind is Overloaded:
        assert caught.value.retry_after == 7
    quiet.engine.error = None
    quiet.link.abort(request)  # it was never let in
    quiet.link.submit(box.ask())  # and the connection is as it was
    assert not quiet.engine.aborted and box.empty()


@pytest.mark.parametrize("tokens", [[100], [-1], [2**31 - 1]])
def test_token_ids_are_of_the_vocabulary(quiet, tokens):
    with pytest.raises(ValueError, match="0 to 99"):
        quiet.link.submit(Box().ask(tokens))
    with pytest.raises(ValueError, match=r"below 2\*\*31"):
        quiet.link.submit(Box().ask([2**31]))


def test_abort(quiet):
    box = Box()
    request, other = box.ask(), box.ask()
    quiet.link.submit(request)
    quiet.link.submit(other)
    for _ in range(3):
        quiet.link.abort(request)
    assert box.wait() == [Output(None, "abort")] and request.finish == "abort"
    assert quiet.engine.aborted == quiet.engine.submitted[:1]
    quiet.link.abort(request)
    assert quiet.link.stats()["running"] == 2 and box.empty()  # later than the abort on the same wire


def test_siblings_share_a_group_and_others_do_not(quiet, tmp_path):
    group, box = object(), Box()
    with Link(quiet.path) as other:
        soon(lambda: other.alive)
        for web in (quiet.link, quiet.link, other):
            web.submit(box.ask(group=group))
        quiet.link.submit(box.ask(group=object()))
    first, second, third, fourth = (request.group for request in quiet.engine.submitted)
    assert first == second and len({first, third, fourth}) == 3


def test_salts(quiet):
    box = Box()
    with Link(quiet.path) as other:
        soon(lambda: other.alive)
        for web in (quiet.link, other):
            for salt in (None, "a", 7, ("a", 7)):
                web.submit(box.ask(salt=salt))
    mine, theirs = quiet.engine.submitted[:4], quiet.engine.submitted[4:]
    assert [request.salt for request in mine[:3]] == [request.salt for request in theirs[:3]] == [None, "a", 7]
    assert mine[3].salt != theirs[3].salt and mine[3].salt is not None
    quiet.link.submit(box.ask(salt=("a", 7)))
    assert quiet.engine.submitted[-1].salt == mine[3].salt


@pytest.mark.parametrize("several", [False, True])
def test_score(quiet, several):
    answers = []
    asking = threading.Thread(target=lambda: answers.append(quiet.link.score([1, 2, 3], "alternatives")))
    asking.start()
    soon(lambda: quiet.engine.scores)
    tokens, want, future = quiet.engine.scores[0]
    assert (tokens, want) == ([1, 2, 3], "alternatives")
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    future.set_result((value, value.astype(np.int32).T) if several else value)
    asking.join()
    got = answers[0] if several else (answers[0],)
    np.testing.assert_array_equal(got[0], value)
    assert got[0].dtype == np.float32
    if several:
        np.testing.assert_array_equal(got[1], value.T)
        assert got[1].dtype == np.int32


def test_score_fails(quiet):
    with pytest.raises(ValueError, match="0 to 99"):
        quiet.link.score([1, 1000])
    with pytest.raises(RuntimeError):
        quiet.link.score([1], "everything")


def test_a_caller_of_score_that_leaves_cancels_it(quiet, monkeypatch):
    class Left(BaseException):
        pass

    def leave(*_):
        soon(lambda: quiet.engine.scores)
        raise Left

    monkeypatch.setattr(link, "Waiter", lambda: SimpleNamespace(answered=SimpleNamespace(wait=leave), error=None))
    with pytest.raises(Left):
        quiet.link.score([1, 2])
    soon(quiet.engine.scores[0][2].cancelled)


def test_calls(quiet):
    web = quiet.link
    assert web.stats() == {"running": 0, "busy_s": 0.5}
    assert web.metrics() == "jaxserve:requests 1\n"
    assert web.snapshot() == {"a": [1, 2.5]}
    web.keep("session", "k", b"\0\xff")
    assert web.recall("session", "k") == b"\0\xff"
    web.forget("session", "k")
    assert web.recall("session", "k") is None
    assert web.info == quiet.engine.info
    with Link(quiet.path, render=lambda snapshot: str(snapshot["a"])) as other:
        soon(lambda: other.alive)
        assert other.metrics() == "[1, 2.5]"


def test_everybody_hears_of_a_drain(quiet):
    with Link(quiet.path) as other:
        soon(lambda: other.alive)
        quiet.link.drain()
        assert quiet.link.state == "draining" and quiet.link.alive
        soon(lambda: other.state == "draining")


def test_a_connection_that_ends_takes_its_requests_with_it(quiet):
    box, mine = Box(), Box()
    quiet.link.submit(mine.ask())
    with Link(quiet.path) as other:
        soon(lambda: other.alive)
        requests = [box.ask() for _ in range(3)]
        for request in requests:
            other.submit(request)
        failures, scoring = failing(EngineDead, lambda: other.score([1, 2]))
        soon(lambda: quiet.engine.scores)
    soon(lambda: len(quiet.engine.aborted) == 3)
    assert quiet.engine.aborted == quiet.engine.submitted[1:]
    soon(quiet.engine.scores[0][2].cancelled)
    scoring.join()
    assert failures
    assert all(output.finish == "error" for output in box.wait(3)) and mine.empty()
    assert {request.finish for request in requests} == {"error"}


def test_the_engine_goes_and_comes_back(tmp_path):
    tmp_path.chmod(0o700)
    path, box = tmp_path / "engine", Box()
    first = Listener(Quiet(), path)
    with Link(path) as web:
        soon(lambda: web.alive)
        web.submit(box.ask())
        failures, asking = failing(EngineDead, lambda: web.score([1, 2]))
        soon(lambda: first.engine.scores)
        first.close()
        (output,) = box.wait()
        assert output.finish == "error" and output.error.startswith("the engine has stopped")
        asking.join()
        assert failures
        assert web.state == "dead" and not web.alive
        began = time.monotonic()
        for call in (web.stats, lambda: web.submit(box.ask()), lambda: web.score([1]), web.metrics):
            with pytest.raises(EngineDead, match="the engine has stopped"):
                call()
        assert time.monotonic() - began < 1
        web.abort(box.ask())
        second = Listener(Quiet(), path)
        soon(lambda: web.state == "ready")
        web.submit(box.ask())
        second.engine.turn(Output(3, "stop"))
        assert box.wait() == [Output(3, "stop")]
        second.close()


def test_without_an_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "PATIENCE", 0.01)
    with Link(tmp_path / "nothing") as web:
        with pytest.raises(EngineDead, match="nothing answers"):
            _ = web.info
        assert web.state == "dead"
    with Link(tmp_path / "nothing", info={"path": "x"}) as web:
        assert web.info == {"path": "x"}


def test_what_is_sent_is_bound_when_nobody_reads(tmp_path):
    """A web process that stops reading costs the engine so much memory, no time, and then its requests are aborted."""
    tmp_path.chmod(0o700)
    engine = Quiet()
    with Listener(engine, tmp_path / "engine", most_unsent=200_000) as listener:
        sock = connect(tmp_path / "engine")
        sock.sendall(submit_frame(1))
        soon(lambda: engine.submitted)
        (connection,) = listener._connections
        longest = most = 0
        rich = Output(1, None, -1.0, tuple((i, -float(i)) for i in range(20)))
        for _ in range(20_000):
            began = time.perf_counter()
            engine.turn(rich)
            longest = max(longest, time.perf_counter() - began)
            most = max(most, connection.unsent_bytes)
            if engine.aborted:
                break
        soon(lambda: engine.aborted)
        assert 100_000 < most < 250_000 and longest < 1
        assert not connection.unsent_bytes and not listener._connections
        sock.close()


def test_a_slow_reader_gets_everything(tmp_path):
    tmp_path.chmod(0o700)
    engine = Quiet()
    with Listener(engine, tmp_path / "engine"):
        sock = connect(tmp_path / "engine")
        sock.sendall(submit_frame(1))
        soon(lambda: engine.submitted)
        for i in range(100_000):
            engine.turn(Output(i))
        engine.turn(Output(None, "abort"))
        got, unframer = [], Unframer()
        while not got or got[-1] is not None:
            for body in unframer.feed(sock.recv(1 << 16)):
                message = frames.FROM_ENGINE.decode(body)
                if isinstance(message, Tokens):
                    got += [what if isinstance(what, int) else what[0] for what in message.entries[1::2]]
        assert got == [*range(100_000), None]
        sock.close()


def connect(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def submit_frame(number):
    tokens, params = np.array([1, 2], np.int32).tobytes(), msgspec.Raw(msgspec.msgpack.encode(SamplingParams()))
    return frame(Submit(number, tokens, 5, params, [], "", None, None, None, None))


MALFORMED = {
    "noise": os.urandom(64),
    "a length beyond all bounds": b"\xff\xff\xff\xff",
    "no message": frame(Hello(1, {}, "ready")),
    "nesting": (100_000).to_bytes(4, "little") + b"\x91" * 100_000,
    "cut msgpack": b"\x02\0\0\0\x93\x01",
    "a number twice": submit_frame(1) * 2,
    "an unknown call": b"\x0a\0\0\0" + msgspec.msgpack.encode([4, 1, "close", []]),
    "a wrong type": b"\x04\0\0\0" + msgspec.msgpack.encode([2, "a"]),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_frames_close_the_connection_and_no_other(quiet, data):
    if data == MALFORMED["noise"]:
        data = b"\xff" * 4 + data
    box = Box()
    quiet.link.submit(box.ask())
    sock = connect(quiet.path)
    sock.settimeout(DEADLINE)
    sock.sendall(data)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    sock.close()
    quiet.engine.turn(Output(3, "stop"))
    assert box.wait() == [Output(3, "stop")] and quiet.link.alive


def test_parameters_that_cannot_be_concern_one_request(quiet):
    sock = connect(quiet.path)
    sock.settimeout(DEADLINE)
    bad = msgspec.Raw(msgspec.msgpack.encode({"top_p": 0.0}))
    message = Submit(1, np.array([1], np.int32).tobytes(), 5, bad, [], "", None, None, None, None)
    sock.sendall(frame(message) + submit_frame(2))
    soon(lambda: len(quiet.engine.submitted) == 1)
    sock.close()


def test_random_bytes_never_end_the_listener(quiet):
    random = np.random.default_rng(3)
    for _ in range(200):
        sock = connect(quiet.path)
        good = submit_frame(1)
        if random.random() < 0.5:  # a good frame with a few wrong bytes
            bytes_ = bytearray(good)
            for _ in range(3):
                bytes_[random.integers(4, len(bytes_))] = random.integers(256)
            good = bytes(bytes_)
        else:
            good = random.bytes(int(random.integers(1, 100)))
        try:
            sock.sendall(good)
        except OSError:
            pass
        sock.close()
    assert quiet.link.stats()


def test_the_socket_is_private(quiet, tmp_path):
    assert quiet.path.stat().st_mode & 0o777 == 0o600
    tmp_path.chmod(0o755)
    with pytest.raises(ValueError, match="0700"):
        Listener(Quiet(), tmp_path / "other")


def test_another_user_is_turned_away(quiet, monkeypatch):
    monkeypatch.setattr(frames, "peer_uid", lambda sock: os.getuid() + 1)
    sock = connect(quiet.path)
    sock.settimeout(DEADLINE)
    assert sock.recv(10) == b""
    sock.close()
    monkeypatch.undo()
    assert quiet.link.stats()


def test_unframing_byte_by_byte():
    data = b"".join(frame(Abort(number)) for number in (1, 300, 70_000))
    unframer = Unframer()
    bodies = [body for i in range(len(data)) for body in unframer.feed(data[i : i + 1])]
    assert [frames.FROM_WEB.decode(body).number for body in bodies] == [1, 300, 70_000]
    assert [*unframer.feed(data)] == bodies


def test_messages_have_a_largest_size(monkeypatch, quiet):
    monkeypatch.setattr(frames, "MOST", 10_000)
    with pytest.raises(ValueError, match="too much"):
        quiet.link.keep("a", "b", b"x" * 20_000)
    assert quiet.link.recall("a", "b") is None


def test_many_requests_from_many_threads(tmp_path):
    """Every token arrives, of requests that live as long as they want, and of those that are aborted in between."""
    with StubEngine(rate=0, lanes=64) as engine, linked(engine, tmp_path) as both:
        failures = []

        def client(start):
            try:
                for i in range(20):
                    box = Box()
                    request = box.ask([start * 100 + i], 50)
                    both.link.submit(request)
                    got = []
                    while not got or not got[-1].finish:
                        got += box.wait()
                        if i % 4 == 0 and len(got) == 3:
                            both.link.abort(request)
                    made = [output.token for output in got if output.token is not None]
                    expected = [token(SimpleNamespace(tokens=[start * 100 + i]), k) for k in range(50)]
                    assert made == expected[: len(made)] and (len(made) == 50 or got[-1].finish == "abort")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        soon(lambda: not engine.running and not engine.waiting)
        (connection,) = both.listener._connections
        assert not connection.live and not both.link._live and not both.link._number_of and not both.link._waiters


ENGINE_PROCESS = """
import sys, time
from jaxserve.engine.link import Listener
from tests.serve.stub import StubEngine
with StubEngine(rate=50) as engine:
    listener = Listener(engine, sys.argv[1])
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def engine_process(path):
    path.parent.chmod(0o700)
    command = [sys.executable, "-c", ENGINE_PROCESS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_an_engine_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(link, "STALL", 2)
    with engine_process(tmp_path / "engine") as process, Link(tmp_path / "engine") as web:
        soon(lambda: web.alive)
        box = Box()
        web.submit(box.ask([1], 1000))
        box.wait(3)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)  # until every thread stands; one could still answer
        with pytest.raises(EngineDead, match="has not answered"):
            web.stats()
        assert web.state == "stalled" and not web.alive
        began = time.monotonic()
        with pytest.raises(EngineDead, match="has not answered"):
            web.submit(box.ask())
        assert time.monotonic() - began < 1
        process.send_signal(signal.SIGCONT)
        soon(lambda: web.state == "ready")
        box.wait(50)  # what ran goes on
        process.kill()
        while not (output := box.get(timeout=DEADLINE)).finish:
            pass
        assert output.finish == "error"


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent, sys, time
from jaxserve.engine.link import Link
from jaxserve.engine.request import Request
import queue

link, ticks, lost = Link(sys.argv[1]), [], []
assert link.info["path"] == "/models/stub"

def client(number):
    box = queue.SimpleQueue()
    request = Request([number], 20, outbox=box)
    link.submit(request)
    got = [box.get(timeout=20) for _ in range(20)]
    if [o.token for o in got] != list(range(number, number + 20)) or got[-1].finish != "length":
        lost.append((number, got))

def clock():
    while True:
        ticks.append(time.perf_counter())
        time.sleep(0.01)

gevent.spawn(clock)
gevent.joinall([gevent.spawn(client, number) for number in range(100)], raise_error=True)
leaver = gevent.spawn(link.score, [1, 2], "logprobs")
gevent.kill(leaver)
assert link.score([1, 2, 3], "logprobs").tolist() == [-1, -1]
assert not lost and len(ticks) > 3, (lost, len(ticks))  # had the clients kept the thread, the clock would not have run
assert link.stats()["running"] == 0
link.close()
print("fine")
"""


def test_greenlets(tmp_path):
    with engine_process(tmp_path / "engine"):
        command = [sys.executable, "-c", GREENLETS, str(tmp_path / "engine")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stdout == "fine\n", done.stderr


def test_no_jax():
    code = "import sys, jaxserve.engine.link; assert not {'jax', 'transformers', 'flask'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
