"""The Flask application: which routes there are, who may call them, and how errors are told."""

import hashlib
import hmac
import logging
import time
from typing import Any

from flask import Flask, Response, g, request

from jaxserve.serve import anthropic, body, errors, native, openai, openapi, pages, responses
from jaxserve.serve.errors import MISSING, ApiError
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Service

log = logging.getLogger("jaxserve")
access = logging.getLogger("jaxserve.access")

OPEN = {"/health", "/openapi.json"}  # beside the pages: routes that hold no data, and need no key
LOCAL = ("localhost", "127.0.0.1", "[::1]")
METHODS = "GET, POST, DELETE, OPTIONS"
PREFLIGHT_KEPT = "600"  # seconds that a browser remembers what a page may do


def create_app(service: Service, options: ServerOptions | None = None) -> Flask:
    """The application over one model."""
    options = options or ServerOptions()
    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = int(options.max_body_size * 2**20)
    app.url_map.merge_slashes = False
    keys = list(map(_digest, options.keys()))
    public = _add_routes(app, service, options, bool(keys))
    hosts = {
        host.lower() for host in options.allowed_hosts or ((*LOCAL, options.server_name) if options.loopback else ())
    }

    @app.before_request
    def admit() -> Response | None:
        g.began, g.request_id = time.perf_counter(), body.request_id(request.headers.get("X-Request-Id"))
        rule = request.url_rule.rule if request.url_rule else None
        if hosts and not _host_is_known(hosts):
            raise ApiError(403, "this server does not answer under that host name; see --allowed-hosts", param="Host")
        if "Access-Control-Request-Method" in request.headers and _allowed_origin(options):
            return Response(status=204)  # a browser asks first, and without a key
        if keys and rule not in public:
            _check_key(keys)
        if options.disable_metrics and rule == "/metrics":
            raise ApiError(404, "this server tells no metrics", MISSING)
        return None

    @app.after_request
    def label(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.get("request_id") or body.request_id(None)
        if origin := _allowed_origin(options):
            _share(response, origin, options)
        response.call_on_close(_Access(response))
        return response

    app.register_error_handler(Exception, lambda error: errors.of(error).response())
    return app


def _add_routes(app: Flask, service: Service, options: ServerOptions, keys: bool) -> set[str]:
    """Adds all routes; returns the rules of those that anybody may call."""
    modules: tuple[Any, ...] = (openai, responses, anthropic, native)
    for module in modules:
        app.register_blueprint(module.blueprint(service))
    if options.disable_fastapi_docs:
        return set(OPEN)
    app.register_blueprint(pages.blueprint(service))
    operations = [*openapi.OPERATIONS, *(one for module in modules for one in module.OPERATIONS)]
    text = openapi.document(operations, title=service.model, server=options.root_path, keys=keys)
    app.register_blueprint(openapi.blueprint(text))
    return OPEN | pages.PATHS


class _Access:
    """Writes the line of the access log, once an answer has been sent."""

    def __init__(self, response: Response):
        self.began = g.get("began", time.perf_counter())
        self.line = (request.remote_addr, request.method, request.path, response.status_code)
        self.id = response.headers["X-Request-Id"]

    def __call__(self):
        client, method, path, status = self.line
        took = 1e3 * (time.perf_counter() - self.began)
        told = {"client": client, "method": method, "path": ascii(path)[1:-1], "status": status}
        told |= {"milliseconds": round(took, 1), "request_id": self.id}
        access.info("%s %s %s %d %.0f ms %s", *told.values(), extra=told)


def _host_is_known(hosts: set[str]) -> bool:
    """A page whose name was made to point at this machine sends its own name: DNS rebinding."""
    given = request.environ.get("HTTP_HOST", "").lower()
    name, _, port = given.rpartition(":")
    return not given or (name if port.isdecimal() else given) in hosts


def _digest(key: str) -> bytes:
    """What keys are compared by: it tells nothing of their length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _check_key(keys: list[bytes]) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("x-api-key", "")
    digest = _digest(given.strip())
    if not sum(hmac.compare_digest(digest, key) for key in keys):
        raise ApiError(
            401, "an API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key"
        )


def _allowed_origin(options: ServerOptions) -> str | None:
    """The web page's origin, if it may call the server; "*" where any may."""
    origin = request.headers.get("Origin")
    if not origin or not options.allow_origins:
        return None
    if "*" in options.allow_origins:
        return "*"
    return origin if origin in options.allow_origins else None


def _share(response: Response, origin: str, options: ServerOptions) -> None:
    headers = response.headers
    headers["Access-Control-Allow-Origin"] = origin
    headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
    headers.add("Vary", "Origin")
    if options.allow_credentials:
        headers["Access-Control-Allow-Credentials"] = "true"
    if "Access-Control-Request-Method" in request.headers:
        asked = request.headers.get("Access-Control-Request-Headers", "")
        methods, names = options.allow_methods or ["*"], options.allow_headers or ["*"]
        headers["Access-Control-Allow-Methods"] = METHODS if "*" in methods else ", ".join(methods)
        headers["Access-Control-Allow-Headers"] = asked if "*" in names else ", ".join(names)
        headers["Access-Control-Max-Age"] = PREFLIGHT_KEPT
