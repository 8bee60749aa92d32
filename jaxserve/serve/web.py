"""The web processes: gunicorn with gevent workers, each with the application and its own link to the engine.

`main` runs in a process that the launcher forks; nothing here is imported by the launcher itself.
"""

import logging
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
from gevent import monkey
from gunicorn import glogging
from gunicorn.app.base import BaseApplication
from gunicorn.workers.ggevent import GeventWorker

from jaxserve.config import EngineConfig
from jaxserve.serve import logs
from jaxserve.serve.children import die_with_parent, name_process
from jaxserve.serve.options import ServerOptions

CONNECTIONS = 4096  # of one web process
STUCK = 120  # seconds without a turn of a web process's loop, after which gunicorn replaces it
IDLE = 60  # seconds that a client may neither send the body of its request nor read its answer
KEEP_ALIVE = 75  # seconds that a connection may be idle, and that a client may take for a request's head
TAIL = 5  # seconds that answers get to reach their clients after the engine has ended them
LINE, FIELDS, FIELD = 8190, 100, 8190  # bytes of a request line, headers, bytes of a header

log = logging.getLogger("jaxserve")


def main(
    listening: int,
    up: int,
    path: Path,
    info: dict,
    names: list[str],
    config: EngineConfig,
    options: ServerOptions,
    parent: int,
) -> None:
    """gunicorn's master; ends by SystemExit.

    listening: descriptor of the bound socket.  up: descriptor to which each web process writes a byte when it serves.
    path: the engine's socket.  names: of the model.  parent: the launcher's process id.
    """
    die_with_parent(parent)
    logs.configure(options.log_level, options.log_format)
    Web(_settings(listening, up, options), lambda: application(path, info, names, config, options)).run()


def application(path: Path, info: dict, names: list[str], config: EngineConfig, options: ServerOptions) -> Callable:
    """The WSGI application of one web process."""
    from jaxserve import checkpoint
    from jaxserve.engine.link import Link
    from jaxserve.serve import metrics
    from jaxserve.serve.app import create_app
    from jaxserve.serve.service import Service
    from jaxserve.text import reasoning, tools
    from jaxserve.text.chat import ChatTemplate
    from jaxserve.text.tokenizer import Tokenizer

    with checkpoint.open(info["path"]) as source:
        tokenizer, its_config = Tokenizer.load(source), source.config
    template = ChatTemplate.for_model(
        its_config, tokenizer, options.chat_template, options.meta_instruction, options.capability
    )
    described = (its_config, template.tool_style.source, tokenizer)
    service = Service(
        Link(path, info, metrics.render),
        tokenizer,
        template,
        model_names=names,
        tool_format=options.tool_call_parser or tools.detect(*described),
        reasoning_format=options.reasoning_parser or reasoning.detect(*described),
        seed=config.seed,
        generation_config=options.sampling_defaults(),
    )
    _ = service.author.table  # made now: it takes up to a second, which the first grammar would cost all requests
    app = create_app(service, options)
    return below(options.root_path, app) if options.root_path else app


def below(prefix: str, app: Callable) -> Callable:
    """The application under a path, whether the proxy before it leaves that path on or takes it off."""

    def prefixed(environ: dict, start_response: Callable) -> Any:
        whole = environ.get("PATH_INFO", "")
        if whole == prefix or whole.startswith(prefix + "/"):
            environ["PATH_INFO"] = whole[len(prefix) :] or "/"
        environ["SCRIPT_NAME"] = prefix
        return app(environ, start_response)

    return prefixed


class Worker(GeventWorker):
    """Ends as soon as the requests it has are answered: connections on which nothing happens are closed."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self._quiet: set[socket.socket] = set()

    def run(self):
        gevent.get_hub().NOT_ERROR += (ssl.SSLError,)  # who speaks no TLS needs no traceback
        super().run()

    def handle(self, listener, client, addr):
        self._quiet.add(client)
        try:
            super().handle(listener, client, addr)
        finally:
            self._quiet.discard(client)

    def handle_request(self, listener_name, req, sock, addr):
        self._quiet.discard(sock)
        sock.settimeout(IDLE)  # a stream then sets its own
        try:
            return super().handle_request(listener_name, req, sock, addr)
        except TimeoutError:
            log.info("a client neither sends its request nor reads its answer: the connection is closed")
            raise StopIteration from None
        finally:
            sock.settimeout(None)
            self._quiet.add(sock)
            if not self.alive:
                hang_up(sock)

    def handle_exit(self, sig, frame):
        super().handle_exit(sig, frame)
        for client in list(self._quiet):
            hang_up(client)


def hang_up(sock: socket.socket) -> None:
    """Whoever reads the next request from it finds none.

    (gevent's own `shutdown` would end the reading with an error.)
    """
    try:
        with monkey.get_original("socket", "socket")(fileno=os.dup(sock.fileno())) as plain:
            plain.shutdown(socket.SHUT_RD)
    except OSError:
        pass


class Logger(glogging.Logger):
    """gunicorn's log, as a part of ours."""

    def setup(self, cfg):
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
        quiet = log.getEffectiveLevel() > logging.DEBUG  # who boots and listens is the launcher's to tell
        self.error_log.setLevel(logging.WARNING if quiet else logging.INFO)


class Web(BaseApplication):
    """gunicorn, with settings in the place of a configuration file."""

    def __init__(self, settings: dict[str, Any], make: Callable[[], Callable]):
        self.settings, self.make = settings, make
        super().__init__()

    def load_config(self):
        for name, value in self.settings.items():
            self.cfg.set(name, value)

    def load(self):
        return self.make()


def _settings(listening: int, up: int, options: ServerOptions) -> dict[str, Any]:
    def forked(arbiter, worker):
        die_with_parent(arbiter.pid)
        name_process("jaxserve-web")

    def serves(worker):
        os.write(up, b"+")

    settings = {
        "bind": f"fd://{listening}",
        "workers": options.http_workers,
        "worker_class": Worker,
        "worker_connections": CONNECTIONS,
        "timeout": STUCK,
        "graceful_timeout": TAIL,
        "keepalive": KEEP_ALIVE,
        "limit_request_line": LINE,
        "limit_request_fields": FIELDS,
        "limit_request_field_size": FIELD,
        "control_socket_disable": True,
        "logger_class": Logger,
        "proc_name": "jaxserve",
        "post_fork": forked,
        "post_worker_init": serves,
    }
    if options.ssl:
        settings |= {"keyfile": os.environ["SSL_KEYFILE"], "certfile": os.environ["SSL_CERTFILE"]}
    return settings
