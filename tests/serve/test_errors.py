"""What clients are told when something fails: enough to act on, and nothing of the machine."""

import pytest

from jaxserve.bodies import ParamError
from jaxserve.engine.request import EngineDead, Overloaded
from jaxserve.serve import errors
from jaxserve.serve.errors import ApiError


@pytest.mark.parametrize(
    "error, status, kind, headers",
    [
        (ParamError("n", "n is 1"), 400, "invalid_request_error", {}),
        (Overloaded("full", 3.4), 503, "overloaded_error", {"Retry-After": "3"}),
        (EngineDead("died at /home/me"), 503, "server_error", {"Retry-After": "5"}),
        (RecursionError(), 400, "invalid_request_error", {}),
        (KeyError("/secret/path"), 500, "server_error", {"x-should-retry": "false"}),
        (ApiError(404, "gone"), 404, "not_found_error", {}),
    ],
    ids=repr,
)
def test_exceptions(error, status, kind, headers):
    made = errors.of(error)
    assert (made.status, made.type, made.headers()) == (status, kind, headers)
    assert "/home" not in made.message and "secret" not in made.message


@pytest.mark.parametrize(
    "message, status, retried",
    [
        ("timeout: no end after 5 s", 504, False),
        ("the engine has stopped: killed", 503, True),
        ("overloaded: the device ran out of memory", 503, True),
        ("the request could not be computed: AttributeError at 0x7f", 500, False),
        ("the answer cannot follow its grammar: no mask could be made: at 0x7f", 500, False),
        ("the answer cannot follow its grammar: too many states", 400, False),
        ("no token was left to choose: the grammar and the biases exclude each other", 400, False),
        ("the step failed: INTERNAL: /usr/lib/x.so", 500, False),
        ("the model's logits were not numbers (NaN)", 500, False),
        (None, 500, False),
    ],
)
def test_answers_that_ended_in_an_error(message, status, retried):
    made = errors.of_finish(message)
    assert made.status == status and ("Retry-After" in made.headers()) == retried
    assert "0x" not in made.message and "/usr" not in made.message and "killed" not in made.message


def test_a_message_is_short():
    assert len(ApiError(400, "x" * 5000).message) == 300
