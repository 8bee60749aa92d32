"""The whole Flask application over an engine without a model, in this process."""

from contextlib import contextmanager

import msgspec
import orjson

from jaxserve.serve.app import create_app
from jaxserve.serve.door import Door
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Limits, Service
from jaxserve.text.chat import ChatTemplate
from tests import fake_engine

MODEL = "fake-1b"


@contextmanager
def serving(*, options=None, service=None, door=None, limits=None, template=None, **engine):
    """A Server; `service`, `door` and the rest are arguments of those.  template: the name of a built-in one."""
    made = fake_engine.FakeEngine(**engine)
    entrance = Door(made, **(door or {}))
    template = ChatTemplate.for_model({}, made.tokenizer, template)
    knobs = {"model_names": [MODEL], "limits": Limits(**(limits or {})), **(service or {})}
    application = Service(entrance, made.tokenizer, template, **knobs)
    try:
        yield Server(application, made, ServerOptions(**(options or {})))
    finally:
        entrance.close()


class Server:
    """The application, and a client that calls it without a socket."""

    def __init__(self, service, engine, options):
        self.service, self.engine = service, engine
        self.app = create_app(service, options)
        self.client = self.app.test_client()

    def post(self, path, body=None, **settings):
        """(status, what was answered)."""
        if body is not None:
            body = self._named(path, body)
            settings |= {"data": orjson.dumps(body), "content_type": "application/json"}
        response = self.client.post(path, **settings)
        return response.status_code, orjson.loads(response.data)

    def _named(self, path, body):
        """The body with the model that a chat has to name."""
        return {"model": self.service.model} | body if path == "/v1/chat/completions" else body

    def chat(self, content="hi", **body):
        """The answer to one message; AssertionError unless it is a 200."""
        messages = [{"role": "user", "content": content}]
        status, answer = self.post("/v1/chat/completions", {"messages": messages} | body)
        assert status == 200, answer
        return answer

    def complete(self, prompt="hi", **body):
        status, answer = self.post("/v1/completions", {"prompt": prompt} | body)
        assert status == 200, answer
        return answer

    def refused(self, path, body):
        """(status, parameter, message) of an error."""
        status, answer = self.post(path, body)
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) <= 300
        return status, error["param"], error["message"]

    def events(self, path, body):
        """The events of a stream: each event's lines, as they stand."""
        response = self.client.post(path, json=self._named(path, body) | {"stream": True})
        assert response.status_code == 200, response.data
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache" and response.headers["X-Accel-Buffering"] == "no"
        text = response.get_data(as_text=True)
        assert text.endswith("\n\n")
        return text.removesuffix("\n\n").split("\n\n")

    def chunks(self, path, body):
        """The chunks of a stream that ends well."""
        *events, last = self.events(path, body)
        assert last == "data: [DONE]"
        return [orjson.loads(event.removeprefix("data: ")) for event in events]


def exact(value, kind):
    """Holds an answer against its Struct: no field is missing, and none is there that the document does not know."""
    assert _known(value, msgspec.to_builtins(msgspec.convert(value, kind)), ""), value


def _known(value, told, path):
    if isinstance(value, dict):
        assert value.keys() == told.keys(), f"{path}: {value.keys() ^ told.keys()} is not in the document"
        return all(_known(value[name], told[name], f"{path}.{name}") for name in value)
    if isinstance(value, list):
        return all(_known(*pair, f"{path}[]") for pair in zip(value, told, strict=True))
    return True
