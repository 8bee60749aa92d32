"""APIClient against the whole app, and `jaxserve client` as a person and as a pipe meet it."""

import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from jaxserve.serve.client import APIClient, ServerError, address
from tests.screen import Screen
from tests.serve import scripted
from tests.waiting import soon

COMMAND = [sys.executable, "-m", "jaxserve", "client"]
HOME = Path(__file__).parents[2]


@pytest.fixture
def served():
    """served(...) -> the address of a server, whose engine is served.engine; options: of scripted.app."""
    closing_ = []

    def start(*, keys=(), **settings):
        start.engine = scripted.Engine(**settings)
        app = scripted.app(engine=start.engine, keys=keys)
        server = scripted.serving(app.__enter__())
        closing_.extend([app, server])
        return server.__enter__()

    yield start
    for context in reversed(closing_):
        context.__exit__(None, None, None)


@pytest.fixture
def client(served):
    with APIClient(served()) as made:
        yield made


@pytest.mark.parametrize(
    "text", ["http://h:1", "http://h:1/", "h:1", "h:1/v1", "http://h:1/v1/"], ids=lambda text: text.replace("/", "_")
)
def test_addresses(text):
    assert address(text) == "http://h:1"


def test_models(client):
    assert client.available_models == ["fake-1b", "other-name"]
    assert client.models[0]["max_model_len"] == 256


MESSAGES = [{"role": "user", "content": "hello"}]


def test_chat_completions(client):
    (answer,) = client.chat_completions_v1(model="fake-1b", messages=MESSAGES)
    assert answer["choices"][0]["message"]["content"] == "answer 1: hello"
    pieces = list(client.chat_completions_v1(model="fake-1b", messages=MESSAGES, stream=True, max_tokens=6))
    assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == "answer"
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_completions(client):
    (answer,) = client.completions_v1("fake-1b", "hello", max_tokens=8)
    assert answer["choices"][0]["text"] == "answer 0"
    pieces = list(client.completions_v1("fake-1b", "hello", stream=True, max_tokens=8))
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == "answer 0"


def test_a_kept_conversation(client):
    ask = {"session_id": 3, "interactive_mode": True, "temperature": 0}
    (first,) = client.chat_interactive_v1("one", **ask)
    assert (first["text"], first["history_tokens"]) == ("answer 1: one", 0)
    pieces = list(client.chat_interactive_v1("two", **ask, stream=True))
    assert "".join(piece["text"] for piece in pieces) == "answer 2: two" and pieces[-1]["history_tokens"] > 0
    texts = list(client.chat("three", 3, stream=True, temperature=0))
    assert "".join(text for text, _, _ in texts) == "answer 3: three" and texts[-1][2] == "stop"
    client.end_session(3)
    (again,) = client.chat_interactive_v1("four", **ask)
    assert again["text"] == "answer 1: four"


def test_encode(client):
    assert client.encode("hello", add_bos=False) == ([104, 101, 108, 108, 111], 5)
    assert client.encode(["a", "bc"]) == ([[97], [98, 99]], [1, 2])


def test_texts_with_other_ends_of_lines(served):
    odd = "a\u2028b\u2029c\x85d\x0be"
    with APIClient(served(say=lambda text: odd)) as client:
        pieces = client.chat_completions_v1(model="fake-1b", messages=MESSAGES, stream=True)
        assert "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces) == odd


def test_closing_a_stream_ends_the_request(served):
    with APIClient(served(say=lambda text: "x" * 200, delay=0.02)) as client:
        with closing(client.chat_completions_v1(model="fake-1b", messages=MESSAGES, stream=True)) as pieces:
            next(pieces)
            next(pieces)
        soon(lambda: served.engine.aborted)


def test_what_the_server_has_against_a_request(client):
    with pytest.raises(ServerError, match="temperature") as caught:
        list(client.chat_completions_v1(model="fake-1b", messages=MESSAGES, temperature=-1))
    assert caught.value.status == 400
    with pytest.raises(ServerError, match="no-such"):
        list(client.chat_completions_v1(model="no-such", messages=MESSAGES, stream=True))


def test_an_error_within_a_stream(client):
    with pytest.raises(ServerError, match="failed"):
        list(client.chat_completions_v1(model="fake-1b", messages=[{"role": "user", "content": "\x01"}], stream=True))
    with pytest.raises(ServerError, match="failed"):
        list(client.chat_interactive_v1("\x01", stream=True))


def test_keys(served):
    url = served(keys=["secret"])
    for key in (None, "wrong"):
        with APIClient(url, key) as client, pytest.raises(ServerError) as caught:
            list(client.models)
        assert caught.value.status == 401
    with APIClient(url, "secret") as client:
        assert client.available_models[0] == "fake-1b"


@pytest.fixture
def nobody():
    """An address that is taken, and nobody listens at it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_no_server(nobody):
    with APIClient(nobody) as client, pytest.raises(ServerError, match="no server answers at"):
        list(client.models)
    for bad in ("ftp://h", "http://", "http://[", "http://h:99999"):
        with APIClient(bad) as client, pytest.raises(ServerError, match="is no address"):
            list(client.models)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(served, monkeypatch, nobody):
    monkeypatch.setenv("HTTP_PROXY", f"http://{nobody}")
    with APIClient(served()) as client:
        assert client.available_models


# `jaxserve client` ----------------------------------------------------------------------------------------------------


def piped(text, *arguments, **environment):
    done = subprocess.run(
        [*COMMAND, *arguments], input=text, capture_output=True, text=True, cwd=HOME, env=os.environ | environment
    )
    return done.returncode, re.sub(r" \(seed \d+\)", "", done.stdout), done.stderr  # that is said where it samples


def test_piped_input_prints_the_answers_alone(served):
    status, out, err = piped("one\n\nand\ntwo\n\nend\n\nthree\n\nexit\n\n", served())
    assert (status, out) == (0, "answer 1: one\nanswer 2: and\ntwo\nanswer 1: three\n")
    assert "fake-1b at 127.0.0.1:" in err and ", session 1" in err
    assert len(re.findall(r"\[\d+ tokens(, [\d.]+ tokens/s)?, first after [\d.]+ s, session \d+/256\]", err)) == 3


def test_what_was_said_is_forgotten_at_the_end(served):
    url = served()
    assert piped("one\n\n", url)[1] == "answer 1: one\n"
    _, out, err = piped("two\n\n", url, "--session-id", "1")
    assert out == "answer 1: two\n" and "goes on" not in err


def test_a_conversation_that_was_kept(served):
    url = served()
    with APIClient(url) as client:
        list(client.chat("one", 7))
    _, out, err = piped("two\n\n", url, "--session-id", "7")
    assert out == "answer 2: two\n" and "goes on with what the server kept" in err


def test_a_full_session(served):
    _, _, err = piped("x" * 150 + "\n\n", served())
    assert "WARNING: exceed session max length. Please end the session." in err


def test_errors(served, nobody):
    url = served(keys=["secret"])
    status, out, err = piped("", url)
    assert (status, out) == (1, "") and "asks for a key: --api-key or $JAXSERVE_API_KEY" in err
    assert "refused the key" in piped("", url, "--api-key", "wrong")[2]
    assert piped("hi\n\n", url, JAXSERVE_API_KEY="secret")[1] == "answer 1: hi\n"
    status, out, err = piped("", "localhost:99999")
    assert status == 1 and "is no address" in err and "Port out of range" in err and "serve MODEL" not in err
    status, out, err = piped("", nobody)
    assert status == 1 and "no server answers at" in err and "jaxserve serve MODEL" in err and "Traceback" not in err


def test_a_failed_turn(served):
    _, out, err = piped("\x01\n\nthen\n\n", served())
    assert out == "answer 1: then\n" and "error:" in err


def test_control_c_stops_a_reply(served):
    screen = Screen([*COMMAND, served(delay=0.05)])
    try:
        screen.ask("x" * 60)
        screen.wait_for("answer 1: xx")
        screen.type("\x03")
        screen.wait_for("stopped; the server keeps nothing of this turn")
        screen.ask("y")
        screen.wait_for("answer 1: y")
        screen.ask("exit")
        assert screen.status() == 0
    finally:
        screen.close()
    assert served.engine.aborted


def test_lmdeploys_spelling(served):
    done = subprocess.run(
        [sys.executable, "-m", "jaxserve", "serve", "api_client", served()],
        **{"input": "hi\n\n", "capture_output": True, "text": True, "cwd": HOME},
    )
    assert done.stdout.startswith("answer 1: hi")
