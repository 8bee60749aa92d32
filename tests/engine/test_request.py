import pytest

from jaxserve.engine.request import Output, Request, SamplingParams


@pytest.mark.parametrize(
    "fields, plain, tables",
    [
        ({}, True, False),
        ({"temperature": 0.8, "top_k": 1}, True, False),  # one candidate is a greedy choice
        ({"temperature": 0.8}, False, False),
        ({"top_p": 0.5, "min_p": 0.1, "top_k": 40, "seed": 7}, True, False),  # of no use to the greedy
        ({"logprobs": 0}, False, False),
        ({"repetition_penalty": 1.1}, False, True),
        ({"presence_penalty": -0.5}, False, True),
        ({"frequency_penalty": 0.5}, False, True),
        ({"logit_bias": ((5, -100.0),)}, False, True),
        ({"bad_words": ((1, 2), (3,))}, False, True),
        ({"min_new_tokens": 3}, False, True),
    ],
)
def test_which_program_serves_it(fields, plain, tables):
    params = SamplingParams(**fields)
    assert (params.plain, params.tables) == (plain, tables)
    assert params == SamplingParams(**fields) and hash(params) == hash(SamplingParams(**fields))


@pytest.mark.parametrize("fields", [{"temperature": -1}, {"top_p": 0}, {"logprobs": 21}, {"bad_words": ((1,) * 6,)}])
def test_impossible_params(fields):
    with pytest.raises(AssertionError):
        SamplingParams(**fields)


def test_lengths():
    request = Request([1, 2, 3], 2)
    assert (request.prompt_len, request.length, request.limit, request.output) == (3, 3, 4, [])
    assert request.ready
    request.computed, request.in_flight = 3, 1
    assert request.length == 4 and request.ready  # the token in flight is fed at position 3
    request.tokens.append(9)
    request.in_flight = 0
    assert request.output == [9] and request.ready
    request.computed, request.in_flight = 4, 1
    assert not request.ready  # the second token is the last, and is not fed back


def test_requests_are_told_apart_by_identity():
    assert Request([1], 1) != Request([1], 1)
    assert Output(1, None) == Output(1)
    assert "tokens" not in repr(Request([1] * 1000, 1)).replace("max_new_tokens", "").replace("min_new_tokens", "")
