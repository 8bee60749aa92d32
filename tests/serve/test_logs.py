"""The server's log: the line about what runs, and records as JSON."""

import json
import logging

import pytest

from jaxserve.serve.logs import Json, Ticker

QUIET = dict(
    **dict.fromkeys(("steps", "running", "waiting", "prompt_tokens", "cached_tokens", "generated_tokens"), 0),
    **{"pages_used": 0, "pages_cached": 0, "pages_free": 100},
)


class Watched:
    """A Ticker whose time and engine are the test's."""

    def __init__(self, caplog):
        self.time, self.stats, self.caplog = 0.0, dict(QUIET), caplog
        caplog.set_level("INFO", "jaxserve.test")
        self.ticker = Ticker(lambda: dict(self.stats), logging.getLogger("jaxserve.test"), now=lambda: self.time)

    def after(self, seconds, **stats):
        """What is logged when so many seconds have passed, and whether the engine is thought to hang."""
        self.caplog.clear()
        self.stats |= stats
        self.time += seconds
        hangs = self.ticker.look()
        return [record.getMessage() for record in self.caplog.records], hangs


@pytest.fixture
def watched(caplog):
    return Watched(caplog)


def test_a_line_every_ten_seconds_when_something_ran(watched):
    assert watched.after(10) == ([], False)
    running = dict(running=2, waiting=1, steps=50, pages_used=25, pages_cached=25, pages_free=50)
    assert watched.after(5, **running, prompt_tokens=1000, cached_tokens=250, generated_tokens=80) == ([], False)
    assert watched.after(5) == (
        ["requests: 2 running, 1 waiting; tokens/s: 100.0 of prompts, 8.0 generated; KV cache 25 %, prefix hits 25 %"],
        False,
    )
    (line,), _ = watched.after(10, steps=60, running=0, waiting=0, generated_tokens=90)
    assert "0 running" in line and "1.0 generated" in line and "prefix hits 25 %" in line
    assert watched.after(10) == ([], False)


def test_the_numbers_stand_beside_the_line(watched):
    watched.after(10, running=1, steps=5, generated_tokens=100)
    (record,) = watched.caplog.records
    told = json.loads(Json().format(record))
    assert told["running"] == 1 and told["generated_tokens_per_second"] == 10 and told["level"] == "info"


def test_an_engine_hangs_when_no_step_ends(watched):
    assert not watched.after(100)[1]
    assert not watched.after(1, running=1, steps=1)[1]
    assert not watched.after(59)[1]
    assert watched.after(2)[1]
    assert not watched.after(1, steps=2)[1]
    assert not watched.after(1, running=0)[1]
    assert not watched.after(100)[1]


def test_json():
    try:
        raise ValueError("über")
    except ValueError as error:
        record = logging.LogRecord(
            "jaxserve.x", logging.ERROR, "f", 1, "%s failed", ("it",), (type(error), error, None)
        )
    record.path = "/v1"
    told = json.loads(Json().format(record))
    assert told["message"] == "it failed" and told["error"].endswith("ValueError: über")
    assert told["path"] == "/v1" and told["level"] == "error" and told["logger"] == "jaxserve.x"
    assert told["time"].endswith("+00:00") and "\n" not in Json().format(record)
