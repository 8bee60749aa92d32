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
