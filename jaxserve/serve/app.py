"""The Flask application: which routes there are, who may call them, and how errors are told."""

import hashlib
import hmac
import importlib
import importlib.util
import logging
import secrets
import time

from flask import Flask, Response, g, request

from jaxserve.serve import errors
from jaxserve.serve.errors import ApiError
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Service

log = logging.getLogger("jaxserve")
access = logging.getLogger("jaxserve.access")

# Routes that anybody may call: they hold no data.
PUBLIC = {"/", "/health", "/docs", "/docs/<path:name>", "/openapi.json", "/static/<path:filename>", "/favicon.ico"}
LOCAL = {"localhost", "127.0.0.1", "[::1]"}
ROUTES = ("openai", "responses", "anthropic", "native", "openapi", "pages")


def create_app(service: Service, options: ServerOptions | None = None) -> Flask:
    """The application over one model."""
    options = options or ServerOptions()
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = int(options.max_body_size * 2**20)
    keys = [hashlib.sha256(key.encode()).digest() for key in options.keys()]
    hosts = {host.lower() for host in options.allowed_hosts or (LOCAL if options.loopback else ())}
    for name in ROUTES:
        if importlib.util.find_spec(f"jaxserve.serve.{name}"):
            app.register_blueprint(importlib.import_module(f"jaxserve.serve.{name}").blueprint(service))

    @app.before_request
    def admit():
        g.began, g.request_id = time.perf_counter(), _request_id()
        if hosts and not _host_is_known(hosts):
            raise ApiError(403, "this server does not answer under that host name; see --allowed-hosts", param="Host")
        if keys and (request.url_rule is None or request.url_rule.rule not in PUBLIC):
            _check_key(keys)

    @app.after_request
    def label(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("request_id") or _request_id()
        response.call_on_close(_Access(response))
        return response

    app.register_error_handler(Exception, lambda error: errors.of(error).response())
    return app


class _Access:
    """Writes the line of the access log, once an answer has been sent."""

    def __init__(self, response: Response):
        self.began = g.get("began", time.perf_counter())
        self.line = (request.remote_addr, request.method, request.path, response.status_code)
        self.id = response.headers["X-Request-Id"]

    def __call__(self):
        client, method, path, status = self.line
        took = 1e3 * (time.perf_counter() - self.began)
        access.info("%s %s %s %d %.0f ms %s", client, method, path, status, took, self.id)


def _request_id() -> str:
    """The client's, as far as it can stand in a header and a log."""
    given = request.headers.get("X-Request-Id", "")
    if 0 < len(given) <= 128 and all(letter.isascii() and (letter.isalnum() or letter in "-_.:") for letter in given):
        return given
    return secrets.token_hex(16)


def _host_is_known(hosts: set[str]) -> bool:
    """A page whose name was made to point at this machine sends its own name: DNS rebinding."""
    given = request.environ.get("HTTP_HOST", "").lower()
    name = given.rpartition(":")[0] if given.rpartition(":")[2].isdecimal() else given
    return not given or name in hosts


def _check_key(keys: list[bytes]) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    digest = hashlib.sha256(given.strip().encode()).digest()
    if not any([hmac.compare_digest(digest, key) for key in keys]):
        raise ApiError(
            401,
            "an API key is missing or wrong: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
        )
