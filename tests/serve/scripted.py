"""A server whose engine says what a script says: tests/fake_engine.py behind a Door, a Service and the whole app."""

import threading
from contextlib import contextmanager

import numpy as np
from werkzeug.serving import make_server

from jaxserve.serve.app import create_app
from jaxserve.serve.door import Door
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Limits, Service
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.jinja import Jinja
from tests.fake_engine import TEMPLATE, FakeEngine, echo
from tests.serve.live import Quiet

WIDTH = 8
MODEL = "fake-1b"
TOOLS = "{% if tools %}<|user|>s:{{ tools | tojson }}<|end|>{% endif %}"


class Engine(FakeEngine):
    """FakeEngine with hidden states."""

    def score(self, tokens, want="logprobs"):
        if want == "last":  # the same tokens, the same state; each position of a width counts other tokens
            return np.bincount(np.asarray(tokens) % WIDTH, minlength=WIDTH).astype(np.float32)
        return super().score(tokens, want)

    @property
    def info(self):
        return super().info | {"width": WIDTH}


def service(say=echo, *, engine=None, heartbeat=10.0, door=True, names=(MODEL, "other-name"), **options):
    """A Service over a scripted engine; options: of the engine and of Service."""
    own = {name: options.pop(name) for name in ("tool_format", "reasoning_format") if name in options}
    engine = engine or Engine(say=say, **options)
    template = ChatTemplate(Jinja(TOOLS + TEMPLATE, engine.tokenizer.named), engine.tokenizer)
    return Service(
        Door(engine) if door else engine,
        engine.tokenizer,
        template,
        model_names=list(names),
        limits=Limits(heartbeat=heartbeat),
        **own,
    )


@contextmanager
def app(say=echo, *, keys=(), **options):
    """The Flask app; closes its engine."""
    made = service(say, **options)
    try:
        flask = create_app(made, ServerOptions(api_keys=list(keys)))
        flask.service = made
        yield flask
    finally:
        made.engine.close()


@contextmanager
def serving(flask):
    """Serves an app in threads; gives its address."""
    server = make_server("127.0.0.1", 0, flask, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def events(response):
    """A stream's events: (name, data) each, data as text."""
    found = []
    for block in response.get_data(as_text=True).split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith(":")]
        if lines:
            fields = dict(line.split(": ", 1) for line in lines)
            found.append((fields.get("event"), fields["data"]))
    return found
