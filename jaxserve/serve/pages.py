"""What people see of the server: a chat at `/` and the API's documentation at `/docs`, with their files.

The pages hold no data, so they need no key; they ask for one and send it with every request of theirs.  Nothing in them
comes from another server, and the headers forbid it: a model's answer can neither run a script nor load an image.
"""

from functools import partial
from pathlib import Path

import flask_swagger_ui
from flask import Blueprint, Response, request

STATIC = Path(__file__).parent / "static"
SWAGGER = Path(flask_swagger_ui.__file__).parent / "dist"

FILES = {
    "/": STATIC / "index.html",
    "/docs": STATIC / "docs.html",
    **{f"/static/{file.name}": file for file in sorted(STATIC.iterdir()) if file.suffix in (".css", ".js", ".svg")},
    **{f"/docs/{name}": SWAGGER / name for name in ("swagger-ui-bundle.js", "swagger-ui.css")},
}
PATHS = frozenset(FILES)  # these, exactly, are open without a key

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# The pages build nodes and never parse HTML; trusted types hold them to it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
STRICT = f"{POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"
# Swagger UI puts styles and small pictures of its own into the page.
DOCS = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").replace("img-src", "img-src data:")

HEADERS = {
    "Cache-Control": "no-cache",  # asks whether it changed; an update is never half there
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def blueprint(service=None) -> Blueprint:
    """The routes in PATHS.  service: as for every blueprint; the pages ask the API instead."""
    pages = Blueprint("pages", __name__)
    for path, file in FILES.items():
        name = path.strip("/").replace("/", "_").replace(".", "_") or "chat"
        pages.add_url_rule(path, name, partial(_send, file, DOCS if path == "/docs" else STRICT))
    return pages


def _send(file: Path, policy: str) -> Response:
    response = Response(file.read_bytes(), mimetype=TYPES[file.suffix], headers=HEADERS)
    response.headers["Content-Security-Policy"] = policy
    response.add_etag()
    response.make_conditional(request)
    return response
