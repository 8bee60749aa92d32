"""What a person at a terminal is told about a reply."""

from types import SimpleNamespace

import pytest

from jaxserve import terminal


@pytest.mark.parametrize(
    "pieces, figures",
    [
        ([(10.5, 1), (11.5, 5), (12.5, 9)], ["4.0 tokens/s", "first after 0.50 s"]),
        ([(10.5, 7), (12.5, 9)], ["1.0 tokens/s", "first after 0.50 s"]),  # the seven need not have come at once
        ([(10.5, 9)], ["first after 0.50 s"]),
        ([(10.5, 1), (11.5, 3), (None, 3)], ["2.0 tokens/s", "first after 0.50 s"]),  # an end without a token
        ([(None, 0)], []),
        ([], []),
    ],
)
def test_the_pace_of_a_reply(pieces, figures, monkeypatch):
    times = iter([10.0, *(time for time, _ in pieces if time is not None)])
    monkeypatch.setattr(terminal, "time", SimpleNamespace(perf_counter=times.__next__))
    pace = terminal.Pace()
    for _, tokens in pieces:
        pace.reached(tokens)
    assert pace.figures() == figures


@pytest.mark.parametrize(
    "environment, faint",
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=str,
)
def test_what_is_beside_the_conversation_is_faint_where_a_person_lets_it(environment, faint, monkeypatch):
    for name, value in ({"NO_COLOR": None, "TERM": "xterm"} | environment).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert terminal.dim("10 tokens") == ("\x1b[2m10 tokens\x1b[0m" if faint else "10 tokens")
