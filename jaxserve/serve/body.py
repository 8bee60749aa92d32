"""JSON in and JSON out: bodies are parsed strictly, by one function for all routes."""

import json
import logging
import math
import secrets
from collections.abc import Mapping
from typing import Any

import orjson
from flask import Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from jaxserve.bodies import ParamError
from jaxserve.serve.errors import ApiError

log = logging.getLogger("jaxserve")

JSON_TYPES = ("application/json", "text/json", "application/x-ndjson", "application/octet-stream")
FORM = "application/x-www-form-urlencoded"
DIAGNOSED = 1 << 20  # bytes of a bad body that are looked at a second time, to name the parameter


def read() -> dict:
    """The body of the current request, an object.  ApiError 400, 413 or 415, or ParamError, if it is none."""
    kind = request.mimetype
    if kind and kind not in JSON_TYPES and not kind.endswith("+json"):
        hint = "; curl -d sends a form unless told: -H 'Content-Type: application/json'" if kind == FORM else ""
        raise ApiError(415, f"the body of a request is JSON (Content-Type: application/json), not {kind:.80}{hint}")
    if not kind and "Origin" in request.headers:  # a web page's request that no preflight has asked for
        raise ApiError(415, "the body of a request is JSON: send Content-Type: application/json")
    data = _received()
    if not data.strip():
        raise ApiError(400, "the body is empty; it must be a JSON object")
    try:
        body = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _bad(data, error) from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_NAMES.get(type(body), 'a number')}")
    return body


def _received() -> bytes:
    try:
        data = request.get_data(cache=False)
    except HTTPException:
        raise
    except Exception as error:  # the web server's own, where what should be chunks are none
        log.info("a body cannot be read: %s", error)
        raise ApiError(400, "the body of the request cannot be read: its chunks have no size, or no end") from None
    most = request.max_content_length
    if most is not None and request.content_length is None and len(data) >= most:  # sent in chunks, and cut off there
        raise RequestEntityTooLarge
    return data


_NAMES = {list: "a list", str: "a text", type(None): "null", bool: "a truth value"}


def _bad(data: bytes, error: orjson.JSONDecodeError) -> Exception:
    """Names the parameter that holds NaN or infinity, which JSON has not but Python's json writes."""
    if len(data) <= DIAGNOSED:
        try:
            loose = json.loads(data)
        except (ValueError, RecursionError):
            loose = None
        for name, value in loose.items() if isinstance(loose, dict) else ():
            if not _finite(value):
                return ParamError(name, f"{name:.80}: JSON has no such number as {value!r:.40}")
    return ApiError(400, f"the body is not valid JSON: {error.msg:.120} (line {error.lineno}, column {error.colno})")


def _finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def request_id(given: str | None) -> str:
    """A request's id: the client's, as far as it can stand in a header and a log, else a new one."""
    letters = given or ""
    if 0 < len(letters) <= 128 and all(one.isascii() and (one.isalnum() or one in "-_.:") for one in letters):
        return letters
    return secrets.token_hex(16)


def send(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer of JSON."""
    return Response(orjson.dumps(body), status, headers, mimetype="application/json")
