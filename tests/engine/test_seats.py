import numpy as np
import pytest

from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.seats import Seats
from jaxserve.engine.sizes import MOST


@pytest.fixture
def seats():
    return Seats(lanes=2, pages=5, vocab=32, session_len=40)


def request(pages, **params):
    made = Request([1, 2, 3], 8, SamplingParams(**params))
    made.lane, made.pages = 1, pages
    return made


def test_a_lane_is_taken_when_the_step_starts(seats):
    one = request([4], temperature=0.5)
    seat = seats.note(one)
    assert seat == (1, (one, 0), None) and seats.taken == [None, None]
    assert (seats.prompt[1], seats.full[1], seats.filled[1]) == (3, True, 1)
    seats.taken[1] = seat[1]
    assert seats.note(one) is None
    one.preemptions += 1
    assert seats.note(one) == (1, (one, 1), None)
    seats.leave()
    assert seats.note(one) is not None


def test_only_new_pages_are_written(seats):
    one = request([4, 5, 6])
    seats.taken[1] = seats.note(one)[1]
    assert seats.pages[1].tolist() == [4, 5, 6, 0, 0]
    one.pages = [4, 5, 7]  # the last one went with a plan that was taken back
    seats.note(one)
    assert seats.pages[1].tolist() == [4, 5, 7, 0, 0] and seats.filled.tolist() == [0, 3]


def test_pages_of_a_burst_that_was_taken_back():
    seats = Seats(lanes=2, pages=12, vocab=32, session_len=40)
    one = request([4, 5])
    seats.taken[1] = seats.note(one)[1]
    for more in ([*range(10, 10 + MOST)], [*range(20, 20 + MOST)], [30]):
        one.pages = [4, 5, *more]
        seats.note(one)
        assert seats.pages[1, : len(one.pages)].tolist() == one.pages and seats.filled[1] == len(one.pages)


def test_tables_of_those_that_need_them(seats):
    lane, ids, prompt, length, *_ = seats.note(request([4], presence_penalty=1.0))[2]
    assert (lane, prompt, length) == (1, 3, 3) and ids[:4].tolist() == [1, 2, 3, 0]
    assert [np.shape(x) for x in seats.tables()] == [np.shape(x) for x in seats.tables(request([4]))]
