import pytest

from jaxserve.bench.client import Answer, spoken, text_of

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PARTS = (b"data", b': {"a":1}', b"\n\nd", b"ata:{2}\r\n\r\n: ", b"comment\n\n")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_come_out_whole_however_they_arrive(size):
    """Chunks, events and reads need not have the same borders."""
    answer, events = Answer(), []
    wire = CHUNKED + b"".join(f"{len(part):x};name=x\r\n".encode() + part + b"\r\n" for part in (*PARTS, b""))
    for at in range(0, len(wire), size):
        assert not answer.complete
        events += answer.feed(wire[at : at + size])
    assert events == [b'{"a":1}', b"{2}"] and answer.complete and answer.status == 200


def test_a_body_with_a_length():
    answer = Answer()
    assert answer.feed(b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\ncontent-LENGTH:4\r\n\r\n{") == []
    assert not answer.complete
    assert answer.feed(b" } ") == [] and answer.complete and answer.status == 503 and bytes(answer.body) == b"{ } "


def test_a_stream_without_chunks():
    """It ends where the connection does."""
    answer = Answer()
    assert answer.feed(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\ndata: 2") == [b"1"]
    assert answer.feed(b"3\n\n") == [b"23"] and not answer.complete


@pytest.mark.parametrize(
    "choice, tokens",
    [
        ({"text": "a"}, 1),
        ({"text": ""}, 0),
        ({"text": "", "token_ids": [1, 2, 3]}, 3),
        ({"delta": {"role": "assistant", "content": ""}}, 0),
        ({"delta": {"content": "a"}}, 1),
        ({"delta": {"reasoning_content": "a"}}, 1),
        ({"delta": {"tool_calls": [{}]}}, 1),
        ({"delta": {}}, 0),
    ],
)
def test_tokens_of_a_chunk(choice, tokens):
    assert spoken(choice) == tokens


@pytest.mark.parametrize(
    "error", [{"error": {"message": "why"}}, {"message": "why"}, {"detail": "why"}, "why", {"error": "why"}]
)
def test_messages_of_all_servers(error):
    assert text_of(error) == "why"
