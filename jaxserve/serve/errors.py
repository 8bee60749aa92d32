"""Errors as clients see them: one builder for every route, whatever went wrong.

A message says what the client sent and what is possible; it never holds a path, an address or another library's words.
"""

import logging
from collections.abc import Iterable

import orjson
from flask import Response
from werkzeug.exceptions import HTTPException

from jaxserve import answers
from jaxserve.bodies import ParamError
from jaxserve.engine import link
from jaxserve.engine.request import EngineDead, Overloaded

log = logging.getLogger("jaxserve")

LONGEST = 300  # characters of a message
RESTARTING = 5  # seconds that a client should wait for an engine that is started again
GONE = "the engine has stopped; it is being started again"
STUCK = "the answer cannot follow its grammar"
NO_MASK = f"{STUCK}: no mask could be made"
CLIENT_GONE = 499  # nobody reads it; it is for the log

INVALID, DENIED, MISSING = "invalid_request_error", "authentication_error", "not_found_error"
FAILED, BUSY = "server_error", "overloaded_error"
TYPES = {401: DENIED, 403: "permission_error", 404: MISSING, 429: "rate_limit_error", 503: BUSY}


class ApiError(Exception):
    """What goes wrong with a request, ready to be sent.

    retry_after: seconds; None says of a 5xx that the same request would fail again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        message = message if len(message) <= LONGEST else message[: LONGEST - 3] + "..."
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES.get(status, INVALID if status < 500 else FAILED)
        self.retry_after = retry_after
        self.allow: Iterable[str] = ()  # with 405: the methods that the route has

    def body(self) -> dict:
        """OpenAI's envelope."""
        return answers.error(self.message, type=self.type, param=self.param, code=self.code)

    def headers(self) -> dict[str, str]:
        """What tells clients whether, and when, to try again, or how."""
        if self.allow:
            return {"Allow": ", ".join(sorted(self.allow))}
        if self.retry_after is not None:
            return {"Retry-After": str(max(1, round(self.retry_after)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}

    def response(self, body: dict | None = None) -> Response:
        """The whole answer; body: in the place of OpenAI's envelope."""
        return Response(orjson.dumps(body or self.body()), self.status, self.headers(), mimetype="application/json")


def of(error: BaseException) -> ApiError:
    """The ApiError for anything that a route may raise.  What nobody foresaw is logged, and told without details."""
    match error:
        case ApiError():
            return error
        case ParamError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case Overloaded():
            return ApiError(503, str(error), code="overloaded", retry_after=error.retry_after)
        case EngineDead():
            why = str(error) if str(error) == link.STUCK else GONE
            return ApiError(503, why, FAILED, retry_after=RESTARTING)
        case RecursionError():
            return ApiError(400, "the request is nested too deeply")
        case HTTPException():
            return _http(error)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log says why")


def of_finish(message: str | None, status: int | None = None) -> ApiError:
    """The ApiError for an answer that ended in finish "error"; message: the engine's."""
    message = message or "the answer could not be computed"
    if status == 400:
        return ApiError(400, message)
    if message.startswith("timeout"):
        return ApiError(504, message, "timeout_error")
    if message.startswith("the engine has stopped"):
        return ApiError(503, GONE, FAILED, retry_after=RESTARTING)
    if message.startswith("overloaded"):
        return ApiError(503, "the device ran out of memory; try again", retry_after=RESTARTING)
    if message.startswith(("the step failed", "the request could not be computed", NO_MASK)):
        return ApiError(500, "a step of the computation failed; the server's log says why")  # not a library's words
    if message.startswith((STUCK, "no token was left")):
        return ApiError(400, message)  # the request contradicts itself, which shows on the way only
    return ApiError(500, message)


def _http(error: HTTPException) -> ApiError:
    status = error.code or 500
    words = {
        404: "there is no such route; /openapi.json lists them",
        405: "this route does not answer that method",
        408: "the request did not arrive in time",
        413: "the request's body is larger than this server takes",
        415: "the body of a request is JSON: send Content-Type: application/json",
    }
    made = ApiError(status, words.get(status, error.name))
    made.allow = getattr(error, "valid_methods", None) or ()
    return made
