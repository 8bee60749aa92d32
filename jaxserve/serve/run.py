"""The launcher: starts the engine's process and the web processes, watches over them, and ends them in order.

    launcher ── engine process     the model; Engine, Door, Listener
             └─ gunicorn's master ─ web processes     the application and a Link each

One thread, one loop, three things to wait for: signals, the engine's words, children that end.  Imports no jax.
Exit statuses: 0 after a stop that was asked for, 2 options, 3 the model, 4 the device, 5 the port, 1 anything else,
128 + the signal where it ended the server at once.
"""

import logging
import os
import selectors
import shutil
import signal
import socket
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import EngineConfig
from jaxserve.options import INTERRUPTED
from jaxserve.serve import engine_process, logs
from jaxserve.serve.address import Failed, address, bind, private_folder
from jaxserve.serve.children import Line, ended, fork, kill_group, more_descriptors, name_process
from jaxserve.serve.engine_process import USAGE, model_names
from jaxserve.serve.options import ServerOptions

log = logging.getLogger("jaxserve")

RESTARTS, WINDOW = 3, 600  # so many times in so many seconds is a child started again
SILENCE = 5  # seconds without a word from the engine's process that are worth a word
LAST_WORDS = 10  # seconds that a child gets to end
HINT = "HINT:    Please open {}/docs in a browser for detailed api usage!!!"


def run(model: str | None, config: EngineConfig, options: ServerOptions) -> int:
    """Serves until a signal ends it.  Returns the exit status, or raises Failed with it."""
    try:
        options.keys()
        options.sampling_defaults()
    except ValueError as error:
        raise Failed(str(error), USAGE) from error
    _check_tls(options)
    logs.configure(options.log_level, options.log_format)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is not there
    listening = bind(options.server_name, options.server_port)
    try:
        folder = private_folder()
    except OSError as error:
        listening.close()
        raise Failed(f"no folder for the engine's socket: {error}", 1) from error
    try:
        return Launcher(listening, folder, model, config, options).run()
    finally:
        listening.close()
        shutil.rmtree(folder, ignore_errors=True)


def _check_tls(options: ServerOptions) -> None:
    for name in ("SSL_KEYFILE", "SSL_CERTFILE") if options.ssl else ():
        if not Path(os.environ.get(name, "")).is_file():
            raise Failed(f"--ssl needs the environment variable {name} to name a file", USAGE)


@dataclass
class Engine:
    """The engine's process, as the launcher knows it."""

    pid: int
    line: Line
    began: float
    heard: float = 0.0  # when it was heard of last
    info: dict | None = None  # None: it is not ready
    failure: tuple[int, str] | None = None  # what it says of why it ends
    silent: bool = False  # and this has been told
    inside: int = 0  # requests


class Launcher:
    """All that is known between the start and the end."""

    def __init__(self, listening: socket.socket, folder: Path, model: str | None, config, options):
        self.listening, self.path = listening, folder / "engine"
        self.model, self.config, self.options = model, config, options
        self.names = model_names(model, config)
        self.selector = selectors.DefaultSelector()
        self.bell, self.ring = socket.socketpair()
        self.up_read, self.up_write = os.pipe()
        self.ups = 0  # web processes that have begun to serve
        self.engine: Engine | None = None
        self.info: dict = {}  # the engine's, once it is ready
        self.web: int | None = None  # process id of gunicorn's master
        self.final: int | None = None  # exit status, once the end has begun
        self.why = ""  # with a final status that is not 0
        self.grace: float | None = None  # until when requests may go on, while the server drains
        self.kill_engine_at: float | None = None
        self.kill_web_at: float | None = None
        self.deaths: dict[str, deque[float]] = {"engine": deque(), "web": deque()}

    def run(self) -> int:
        name_process("jaxserve")
        more_descriptors()
        self._take_signals()
        os.set_blocking(self.up_read, False)
        os.set_blocking(self.up_write, False)
        self.selector.register(self.up_read, selectors.EVENT_READ, self._up)
        try:
            self._start_engine()
            while self.final is None or self.engine or self.web:
                for key, _ in self.selector.select(0.5):
                    key.data()
                self._reap()
                self._look()
        finally:
            self._kill()
        if self.why:
            raise Failed(self.why, self.final or 1)
        log.info("stopped")
        return self.final

    # Signals --------------------------------------------------------------------------------------------------------

    def _take_signals(self):
        self.ring.setblocking(False)
        self.bell.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self.ring.fileno(), warn_on_full_buffer=False)
        self.selector.register(self.bell, selectors.EVENT_READ, self._signalled)

    def _signalled(self):
        for number in self.bell.recv(4096):
            if number != signal.SIGCHLD:
                self._asked_to_stop(number)

    def _asked_to_stop(self, number):
        """The first time lets running requests end; the second time, or while nothing serves, is the end."""
        if self.final is not None or self.web is None:
            log.warning("stopped at once by %s", signal.Signals(number).name)
            self._kill()
            self.final = INTERRUPTED if number == signal.SIGINT else 128 + number
            return
        self.final = 0
        if self.engine is None or self.engine.info is None:
            self._stop_web()
            return
        seconds = self.options.graceful_timeout  # how many requests run is known as of a while ago: not told
        log.warning("stopping: what runs has %g s, new requests are refused; a second signal stops at once", seconds)
        self.engine.line.tell(say="drain")
        self.grace = time.monotonic() + seconds

    # The engine's process -------------------------------------------------------------------------------------------

    def _start_engine(self):
        again = self.web is not None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(True)

        def main():
            self._forget_all()
            ours.close()
            self.listening.close()
            return engine_process.main(Line(theirs), self.path, self.model, self.config, self.options, again)

        pid = fork("jaxserve-engine", main)
        theirs.close()
        self.engine = Engine(pid, Line(ours), time.monotonic())
        self.kill_engine_at = None
        self.selector.register(ours, selectors.EVENT_READ, self._hear)

    def _hear(self):
        """Whatever the engine's process has said.  False when it says nothing more."""
        engine = self.engine
        assert engine is not None
        messages = engine.line.hear()
        if messages is None:
            self.selector.unregister(engine.line.socket)
            return False
        engine.heard = time.monotonic()
        if engine.silent:
            engine.silent = False
            log.warning("the engine's process answers again")
        for message in messages:
            if message["event"] == "failed":
                engine.failure = (message["status"], message["message"])
            elif message["event"] == "ready":
                self._engine_ready(engine, message["info"])
            elif message["event"] == "beat":
                engine.inside = message["inside"]
                if self.grace is not None and message["idle"]:
                    self.grace = None
                    self._stop_web()
        return True

    def _engine_ready(self, engine, info):
        engine.info = self.info = info
        if self.final is not None:
            self._stop_engine()
        elif self.web is None:
            self._start_web()
        else:
            log.warning("the engine is back after %.0f seconds", time.monotonic() - engine.began)

    def _stop_engine(self):
        if self.engine is not None and self.kill_engine_at is None:
            self.engine.line.tell(say="stop")
            patience = LAST_WORDS if self.engine.info is not None else 0  # one that still loads does not listen
            self.kill_engine_at = time.monotonic() + patience

    def _engine_ended(self, status):
        engine = self.engine
        assert engine is not None
        while engine.line.socket in self.selector.get_map() and self._hear():
            pass  # its last words
        self.engine = self.kill_engine_at = self.grace = None
        self._drop(engine.line)
        if self.final is not None:
            self._stop_web()
        elif engine.info is None:
            self._give_up(*(engine.failure or (1, f"the engine's process {ended(status)} while it loaded the model")))
        elif self._again("engine"):
            log.error(
                "the engine's process %s; it is started again (%d of %d times in %d minutes)",
                ended(status),
                len(self.deaths["engine"]),
                RESTARTS,
                WINDOW // 60,
            )
            self._start_engine()
        else:
            self._give_up(
                1,
                f"the engine's process {ended(status)}, once too often: {RESTARTS} restarts in {WINDOW // 60} minutes",
            )

    # The web processes ----------------------------------------------------------------------------------------------

    def _start_web(self):
        launcher = os.getpid()

        def main():
            from jaxserve.serve import web

            self._forget_all(but=self.up_write)
            if self.engine is not None:
                self.engine.line.close()
            web.main(
                self.listening.fileno(),
                self.up_write,
                self.path,
                self.info,
                self.names,
                self.config,
                self.options,
                launcher,
            )

        self.web = fork("jaxserve-http", main)
        self.kill_web_at = None

    def _up(self):
        before, self.ups = self.ups, self.ups + len(os.read(self.up_read, 4096))
        if before < self.options.http_workers <= self.ups and self.final is None:
            self._announce()

    def _stop_web(self):
        if self.web is None:
            self._stop_engine()
        elif self.kill_web_at is None:
            os.kill(self.web, signal.SIGTERM)
            self.kill_web_at = time.monotonic() + LAST_WORDS

    def _web_ended(self, status):
        self.web, self.kill_web_at = None, None
        if self.final is not None:
            self._stop_engine()
        elif os.WIFSIGNALED(status) and self._again("web"):
            log.error("the web processes' master %s; it is started again", ended(status))
            self._start_web()
        else:
            self._give_up(1, f"the web processes' master {ended(status)}")

    # Both -----------------------------------------------------------------------------------------------------------

    def _reap(self):
        while self.engine or self.web:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if self.engine and pid == self.engine.pid:
                self._engine_ended(status)
            elif pid == self.web:
                self._web_ended(status)

    def _look(self):
        """What time brings."""
        now = time.monotonic()
        engine = self.engine
        speaks = engine and engine.info is not None and self.kill_engine_at is None
        if engine and speaks and not engine.silent and now - engine.heard > SILENCE:
            engine.silent = True
            log.error("the engine's process has not answered for %d seconds; /health says so", SILENCE)
        if self.grace is not None and now > self.grace:
            log.warning("time is up: %s cut short", count(engine.inside if engine else 0, "request"))
            self.grace = None
            self._stop_engine()  # its requests end, and the web processes can tell their clients
            self._stop_web()
        if engine and self.kill_engine_at is not None and now > self.kill_engine_at:
            kill_group(engine.pid)
        if self.web and self.kill_web_at is not None and now > self.kill_web_at:
            kill_group(self.web)

    def _again(self, what) -> bool:
        """Notes that a child died.  Whether it may be started again."""
        deaths, now = self.deaths[what], time.monotonic()
        deaths.append(now)
        while deaths[0] < now - WINDOW:
            deaths.popleft()
        return len(deaths) <= RESTARTS

    def _give_up(self, status, why):
        self.final, self.why = status, why
        self._stop_web()

    def _kill(self):
        """Leaves no process behind."""
        for pid in (self.web, self.engine.pid if self.engine else None):
            if pid is not None:
                kill_group(pid)
                os.waitpid(pid, 0)
        if self.engine:
            self._drop(self.engine.line)
        self.web = self.engine = None

    def _drop(self, line):
        try:
            self.selector.unregister(line.socket)
        except KeyError:
            pass
        line.close()

    def _forget_all(self, but=None):
        """In a child: what is the launcher's is closed, else its end would not be seen."""
        self.selector.close()
        self.bell.close()
        self.ring.close()
        for descriptor in {self.up_read, self.up_write} - {but}:
            os.close(descriptor)

    def _announce(self):
        """Where the server is and what it holds, for people; the addresses on standard output."""
        info, options = self.info, self.options
        url = address(self.listening, options)
        log.info(
            "%s: context of %s tokens, KV cache of %s, %s at once",
            self.names[0],
            f"{info['session_len']:,}",
            f"{info['cache_tokens']:,}",
            count(info["max_batch_size"], "request"),
        )
        log.info("listening at %s (the API under /v1), %s", url, count(options.http_workers, "web process", "es"))
        if not options.keys():
            if options.loopback:
                log.info("no key is asked for; only this machine can reach the server")
            else:
                log.warning(
                    "anybody who can reach %s can use this server: no key is asked for (--api-key-file)",
                    options.server_name,
                )
        try:
            for _ in range(0 if options.disable_fastapi_docs else 3):
                print(HINT.format(url), flush=True)
        except OSError as error:
            log.warning("standard output cannot be written: %s", error.strerror)


def count(number: int, thing: str, plural: str = "s") -> str:
    """1 request, 2 requests."""
    return f"{number:,} {thing}{plural * (number != 1)}"
