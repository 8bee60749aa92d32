"""The OpenAPI document: made from the Structs that bodies are parsed by, and Structs of the answers.

Every module with routes lists them in OPERATIONS; `document` joins the lists.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson
from flask import Blueprint, Response
from msgspec import Struct

from jaxserve import __version__
from jaxserve.serve import schemas

STATUSES = {
    400: "A parameter cannot be used; the error names it",
    401: "An API key is missing or wrong",
    403: "The server does not answer under this host name",
    404: "There is no such thing",
    413: "The body is larger than this server takes",
    415: "The body is not JSON",
    500: "The server failed",
    503: "The server is full, starting or shutting down; Retry-After says when to try again",
    504: "The time limit of a request was met",
}
ALWAYS = (401, 403, 500)
OF_BODIES = (400, 413, 415, 503, 504)
BRACES = str.maketrans("", "", "{}")
REF = "#/components/schemas/{name}"


@dataclass(frozen=True)
class Operation:
    """One route.  path: as OpenAPI writes it, {name} for a part that varies.

    body, answer: Structs (or other types that msgspec knows); answer None: a text of `kind`.  streams: the answer may
    also be a stream of events: True, or the Struct of their data.  errors: statuses beside 401, 403, 500 and, with a
    body, 400, 413, 415, 503 and 504.  error: the Struct of their bodies.  parameters: those of the path and the query,
    in OpenAPI's form.  public: no API key is needed.
    """

    method: str  # in lower case
    path: str
    summary: str
    tag: str
    body: Any = None
    answer: Any = None
    kind: str = "application/json"
    streams: Any = False
    errors: tuple[int, ...] = ()
    error: type[Struct] = schemas.Error
    parameters: tuple[dict, ...] = ()
    public: bool = False
    status: int = 200


def path_parameter(name: str, description: str, schema: dict | None = None) -> dict:
    """A part of a path that varies, in OpenAPI's form."""
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema or {"type": "string", "minLength": 1},
    }


OPERATIONS = (Operation("get", "/openapi.json", "This document", "server", answer=dict, public=True),)


def document(operations: Iterable[Operation], *, title: str, server: str = "", keys: bool = False) -> dict:
    """The OpenAPI document of these routes.  server: the path before them; keys: whether they ask for an API key."""
    operations = list(operations)
    kinds: list[Any] = []
    for operation in operations:
        given = (operation.body, operation.answer, operation.error, operation.streams)
        kinds += [kind for kind in given if kind not in (None, True, False)]
    kinds += [schemas.Message, schemas.AssistantMessage]
    found, components = msgspec.json.schema_components(kinds, ref_template=REF)
    schema_of = {id(kind): schema for kind, schema in zip(kinds, found, strict=True)}
    paths: dict[str, dict] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schema_of, keys)
    security = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": __version__,
            "description": "A language model behind OpenAI's, Anthropic's and LMDeploy's APIs.",
        },
        "servers": [{"url": server or "/"}],
        "paths": paths,
        "components": {"schemas": components, **security},
    }


def _operation(operation: Operation, schema_of: dict, keys: bool) -> dict:
    success: dict[str, Any] = {"description": "The answer"}
    if operation.answer is not None:
        success["content"] = {operation.kind: {"schema": schema_of[id(operation.answer)]}}
    elif operation.kind:
        success["content"] = {operation.kind: {"schema": {"type": "string"}}}
    if operation.streams:
        data: dict[str, Any] = {"type": "string"}
        if operation.streams is not True:
            either = [schema_of[id(operation.streams)], schema_of[id(operation.error)]]
            told = {"contentMediaType": "application/json", "contentSchema": {"anyOf": either}}
            data = {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}
        event = {"type": "object", "properties": {"data": data, "event": {"type": "string"}}, "required": ["data"]}
        success["content"]["text/event-stream"] = {"schema": event}
    made: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}_{operation.path.strip('/').replace('/', '_').translate(BRACES) or 'page'}",
        "tags": [operation.tag],
        "responses": {str(operation.status): success},
    }
    if operation.parameters:
        made["parameters"] = list(operation.parameters)
    if operation.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[id(operation.body)]}},
        }
    if keys and not operation.public:
        made["security"] = [{"key": []}]
    statuses = {*ALWAYS, *operation.errors, *(OF_BODIES if operation.body is not None else ())}
    for status in sorted(statuses):
        made["responses"][str(status)] = {
            "description": STATUSES[status],
            "content": {"application/json": {"schema": schema_of[id(operation.error)]}},
        }
    return made


def blueprint(text: dict) -> Blueprint:
    """The route of the document."""
    routes = Blueprint("openapi", __name__)
    data = orjson.dumps(text)

    @routes.get("/openapi.json")
    def openapi_document():
        return Response(data, mimetype="application/json")

    return routes
