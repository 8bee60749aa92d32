"""A server without an engine: it streams what a script says, so that pages and clients can be tested alone."""

import json
import threading
import time
from contextlib import contextmanager

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

from jaxserve.serve import pages


class Standin:
    """say: the text of the last message -> the pieces of an answer; a float among them is a pause in seconds."""

    def __init__(self, say, key=None):
        self.say, self.key = say, key
        self.bodies, self.closed = [], []
        self.sessions = {}
        self.app = Flask(__name__, static_folder=None)
        self.app.register_blueprint(pages.blueprint())
        self.app.before_request(self._guard)
        self.app.get("/v1/models")(self._models)
        self.app.get("/openapi.json")(self._openapi)
        self.app.post("/v1/chat/completions")(self._chat)

    def _guard(self):
        if self.key and request.path not in pages.PATHS:
            if request.headers.get("Authorization") != f"Bearer {self.key}":
                message = "this server asks for a key: send Authorization: Bearer KEY"
                error = {"message": message, "type": "authentication_error", "param": None, "code": "invalid_api_key"}
                return jsonify(error=error), 401
        return None

    def _models(self):
        card = {"id": "scripted-1b", "object": "model", "created": 0, "owned_by": "jaxserve", "max_model_len": 8192}
        return jsonify(object="list", data=[card])

    def _openapi(self):
        path = {"post": {"summary": "Answer a conversation", "responses": {"200": {"description": "the answer"}}}}
        return jsonify(
            openapi="3.1.0", info={"title": "jaxserve", "version": "0"}, paths={"/v1/chat/completions": path}
        )

    def _chat(self):
        body = request.get_json()
        self.bodies.append(body)
        return Response(self._events(self.say(body["messages"][-1]["content"])), mimetype="text/event-stream")

    def _events(self, pieces):
        def chunk(delta, finish=None, **more):
            choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
            about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "scripted-1b"}
            return f"data: {json.dumps(about | {'choices': choices, 'usage': None} | more)}\n\n"

        count = 0
        try:
            yield ": keep-alive\n\n"
            yield chunk({"role": "assistant", "content": ""})
            for piece in pieces:
                if isinstance(piece, float):
                    time.sleep(piece)
                elif isinstance(piece, Exception):
                    yield f"data: {json.dumps({'error': {'message': str(piece), 'type': 'server_error'}})}\n\n"
                    return
                else:
                    count += 1
                    yield chunk(piece if isinstance(piece, dict) else {"content": piece})
            yield chunk({}, "stop")
            usage = {"prompt_tokens": 21, "completion_tokens": count, "total_tokens": 21 + count}
            yield chunk({}, choices=[], usage=usage | {"prompt_tokens_details": {"cached_tokens": 16}})
            yield "data: [DONE]\n\n"
        finally:
            self.closed.append(count)


@contextmanager
def serving(app):
    """Serves a Flask app in a thread; gives its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
