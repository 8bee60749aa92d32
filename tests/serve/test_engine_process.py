"""The engine's process, on a thread: what it tells the launcher and what it does when it is told to."""

import os
import queue
import socket
import threading
from contextlib import contextmanager

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.link import Link
from jaxserve.engine.request import Request
from jaxserve.serve import engine_process
from jaxserve.serve.children import Line
from jaxserve.serve.engine_process import Failure
from jaxserve.serve.options import ServerOptions
from tests.serve.stub import StubEngine

DEADLINE = 30


class Launcher:
    """The other end of the line."""

    def __init__(self, sock, thread, path):
        self.line, self.thread, self.path, self.left, self.status = Line(sock), thread, path, [], None

    def hear(self, event):
        """The next message of that kind."""
        while True:
            while self.left:
                if (message := self.left.pop(0))["event"] == event:
                    return message
            messages = self.line.hear()
            assert messages is not None
            self.left += messages


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts a process whose model is what `load` returns."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(engine_process, "BEAT", 0.02)
    monkeypatch.setattr(engine_process.logs, "configure", lambda *_: None)
    gone = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: gone.set())

    @contextmanager
    def start(load):
        monkeypatch.setattr(engine_process, "load", load)
        ours, theirs = socket.socketpair()
        ours.settimeout(DEADLINE)
        path = tmp_path / "engine"
        given = (Line(theirs), path, None, EngineConfig(), ServerOptions())
        result = []
        thread = threading.Thread(target=lambda: result.append(engine_process.main(*given)))
        thread.start()
        launcher = Launcher(ours, thread, path)
        yield launcher
        thread.join(DEADLINE)
        (launcher.status,) = result
        ours.close()
        assert gone.wait(DEADLINE)  # it noticed that the launcher is gone
        assert not tmp_path.exists()
        theirs.close()

    return start


def test_from_ready_to_stop(started):
    with started(lambda *_: StubEngine(rate=100)) as launcher:
        assert launcher.hear("ready")["info"]["path"] == "/models/stub"
        assert launcher.hear("beat") == {"event": "beat", "inside": 0, "idle": True}
        with Link(launcher.path) as link:
            box = queue.SimpleQueue()
            assert link.info["vocab"]
            link.submit(Request([1], 100_000, outbox=box))
            box.get(timeout=DEADLINE)
            while launcher.hear("beat")["idle"]:
                pass
            launcher.line.tell(say="drain")
            while link.state != "draining":
                assert not launcher.hear("beat")["idle"]
            launcher.line.tell(say="stop")
            while not (output := box.get(timeout=DEADLINE)).finish:
                pass
            assert output.finish in ("abort", "error")
    assert launcher.status == 0


def test_a_model_that_cannot_be_loaded(started):
    def load(*_):
        raise Failure(3, "no such model")

    with started(load) as launcher:
        assert launcher.hear("failed") == {"event": "failed", "status": 3, "message": "no such model"}
    assert launcher.status == 3


def test_a_dead_engine_ends_the_process(started):
    engines = []
    with started(lambda *_: engines.append(StubEngine()) or engines[0]) as launcher:
        launcher.hear("ready")
        engines[0].kill("out of memory")
    assert launcher.status == 1


@pytest.mark.parametrize(
    "status, error, found, text",
    [
        (3, ValueError("a\n  b"), 3, "a b"),
        (4, MemoryError(), 4, "MemoryError"),
        (4, RuntimeError("x" * 1000), 4, "x" * 600 + " ..."),
        (4, OSError(28, "disk full"), 4, "[Errno 28] disk full"),
    ],
)
def test_what_goes_wrong_is_one_line(status, error, found, text):
    with pytest.raises(Failure) as failure, engine_process._failing(status):
        raise error
    assert failure.value.status == found and str(failure.value) == text


def test_a_checkpoint_is_at_fault_whenever_it_shows():
    from jaxserve.checkpoint import CheckpointError

    with pytest.raises(Failure) as failure, engine_process._failing(4):
        raise CheckpointError("a tensor is missing")
    assert failure.value.status == 3


def test_a_bug_is_not_hidden():
    with pytest.raises(KeyError), engine_process._failing(4):
        raise KeyError("x")
