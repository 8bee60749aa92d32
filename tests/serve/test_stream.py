"""Clients that leave, at every point of a request, and those that do not read."""

import json
import socket

import pytest

from tests.serve.live import connect, live
from tests.serve.local import MODEL
from tests.waiting import soon

CHAT = "/v1/chat/completions"
LIMIT = 1.0  # ten times what is promised


def body(**more):
    given = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "max_tokens": 200}
    return json.dumps(given | more).encode()


@pytest.fixture(scope="module")
def slow():
    with live(delay=0.05, max_batch_size=2) as made:
        yield made


def idle(server):
    return server.service.engine.idle and not server.engine.stats()["running"]


@pytest.mark.parametrize("n", [1, 3], ids=["alone", "several"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves(slow, stream, n):
    server, url = slow
    client = connect(url, CHAT, body(stream=stream, n=n))
    soon(lambda: server.engine.stats()["running"] == n)
    if stream:
        assert client.recv(1000)
    client.close()
    soon(lambda: idle(server), LIMIT)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_while_it_is_queued(slow, stream):
    server, url = slow
    first = connect(url, CHAT, body(stream=True, n=2))
    soon(lambda: server.engine.stats()["running"] == 2)
    second = connect(url, CHAT, body(stream=stream))
    soon(lambda: server.engine.stats()["running"] == 3)
    second.close()
    soon(lambda: server.engine.stats()["running"] == 2, LIMIT)
    first.close()
    soon(lambda: idle(server), LIMIT)


def test_a_reset_connection(slow):
    server, url = slow
    client = connect(url, CHAT, body())
    soon(lambda: server.engine.stats()["running"] == 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # close with a reset
    client.close()
    soon(lambda: idle(server), LIMIT)


def test_leaving_between_requests_is_no_fault(slow):
    server, url = slow
    client = connect(url, CHAT, body(max_tokens=1))
    assert b"200 OK" in client.recv(4000)
    client.close()
    assert server.chat(max_tokens=2)["choices"]


def test_a_client_that_does_not_read():
    with live(limits={"slow_reader": 0.3}, session_len=200_000, say=lambda _: "x" * 19) as (server, url):
        client = connect(url, CHAT, body(stream=True, max_tokens=190_000, logprobs=True, top_logprobs=20))
        try:
            soon(lambda: server.engine.stats()["running"] == 1)
            soon(lambda: idle(server), 60)  # its connection was given up
            data = b""
            while part := _rest(client):
                data += part
            assert b"[DONE]" not in data and len(data) < 50 << 20
        finally:
            client.close()


def _rest(client):
    """What is on its way; b"" at the end, whether the connection was closed or reset."""
    try:
        return client.recv(1 << 20)
    except ConnectionResetError:
        return b""
