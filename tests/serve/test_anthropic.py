"""Anthropic's routes, through Flask's test client and through Anthropic's own."""

import json

import pytest

from tests.serve import scripted
from tests.serve.live import connect
from tests.waiting import soon

HI = {"model": scripted.MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def app():
    with scripted.app() as flask:
        yield flask


@pytest.fixture
def client(app):
    return app.test_client()


def test_a_message(client):
    response = client.post("/v1/messages", json=HI)
    assert response.status_code == 200
    body = response.json
    assert body.pop("id").startswith("msg_")
    usage = body.pop("usage")
    assert (usage["input_tokens"], usage["output_tokens"], usage["cache_read_input_tokens"]) == (7, 12, 0)
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": scripted.MODEL,
        "content": [{"type": "text", "text": "answer 1: hi", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
    }


def test_a_stream(client):
    response = client.post("/v1/messages", json=HI | {"stream": True})
    assert response.mimetype == "text/event-stream"
    events = [(name, json.loads(data)) for name, data in scripted.events(response)]
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta") == "answer 1: hi"
    assert events[0][1]["message"]["content"] == [] and events[0][1]["message"]["usage"]["input_tokens"] == 7
    assert events[-2][1]["delta"]["stop_reason"] == "end_turn" and events[-2][1]["usage"]["output_tokens"] == 12


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "options, expected, text",
    [
        ({"max_tokens": 5}, ("max_tokens", None), "answe"),
        ({"stop_sequences": ["zz", "er 1"]}, ("stop_sequence", "er 1"), "answ"),
        ({"stop_sequences": ["zz"]}, ("end_turn", None), "answer 1: hi"),
    ],
)
def test_how_it_stopped(client, streamed, options, expected, text):
    response = client.post("/v1/messages", json=HI | options | {"stream": streamed})
    if streamed:
        found = [json.loads(data) for _, data in scripted.events(response)]
        end = next(event["delta"] for event in found if event["type"] == "message_delta")
        said = "".join(event["delta"].get("text", "") for event in found if event["type"] == "content_block_delta")
    else:
        end, said = response.json, response.json["content"][0]["text"]
    assert (end["stop_reason"], end["stop_sequence"]) == expected and said == text


def test_no_room(client):
    body = HI | {"messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 200}
    assert client.post("/v1/messages", json=body).json["stop_reason"] == "model_context_window_exceeded"


def test_counted_tokens(client):
    asked = {name: HI[name] for name in ("model", "messages")}
    assert client.post("/v1/messages/count_tokens", json=asked).json == {"input_tokens": 7}
    longer = asked | {"messages": [{"role": "user", "content": "x" * 1000}], "system": "s"}
    assert client.post("/v1/messages/count_tokens", json=longer).json == {"input_tokens": 1010}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    "body, status, kind, said",
    [
        ({"messages": None}, 400, "invalid_request_error", "messages"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "images"),
        ({"model": "claude"}, 404, "not_found_error", "claude"),
        ({"tools": [{"name": "x"}]}, 400, "invalid_request_error", "tools.0.input_schema"),
    ],
)
def test_errors_are_in_anthropics_envelope(client, path, body, status, kind, said):
    response = client.post(path, json=HI | body, headers={"X-Request-Id": "req-1"})
    assert response.status_code == status
    told = response.json
    assert told["type"] == "error" and told["error"]["type"] == kind and said in told["error"]["message"]
    assert told["request_id"] == "req-1"


def test_more_errors(client):
    missing = {name: HI[name] for name in ("model", "messages")}
    response = client.post("/v1/messages", json=missing)
    assert response.status_code == 400 and "max_tokens" in response.json["error"]["message"]
    response = client.post("/v1/messages", json=HI | {"stop_sequences": ["x" * 2000]})
    assert response.status_code == 400 and "stop_sequences" in response.json["error"]["message"]
    response = client.post("/v1/messages", data="{", content_type="application/json")
    assert response.json["error"]["type"] == "invalid_request_error"
    response = client.post("/v1/messages", json=HI | {"messages": [{"role": "user", "content": "\x01"}]})
    assert response.status_code == 500 and response.json["error"]["type"] == "api_error"
    long = HI | {"messages": [{"role": "user", "content": "x" * 300}]}
    assert client.post("/v1/messages", json=long).status_code == 400


def test_a_body_that_is_deep(client):
    deep = {}
    for _ in range(400):
        deep = {"a": deep}
    for body in (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": deep}]}]},
        {"tools": [{"name": "x", "input_schema": deep}]},
        {"metadata": deep},
    ):
        response = client.post("/v1/messages", json=HI | body)
        assert response.status_code == 400 and "nested too deeply" in response.json["error"]["message"]


def test_a_client_that_leaves():
    with scripted.app(delay=0.02) as flask, scripted.serving(flask) as url:
        engine = flask.service.engine.engine
        for streamed in (True, False):
            before = len(engine.aborted)
            client = connect(url, "/v1/messages", json.dumps(HI | {"stream": streamed}).encode())
            soon(lambda: flask.test_client().get("/load").json["running"])
            client.close()
            soon(lambda count=before: len(engine.aborted) > count)


def test_an_error_after_the_first_event(client):
    body = HI | {"messages": [{"role": "user", "content": "\x01"}], "stream": True}
    events = scripted.events(client.post("/v1/messages", json=body))
    assert events[-1][0] == "error" and json.loads(events[-1][1])["error"]["type"] == "api_error"


def test_a_silent_engine_is_pinged_for():
    with scripted.app(delay=0.05, heartbeat=0.01) as flask:
        events = scripted.events(flask.test_client().post("/v1/messages", json=HI | {"stream": True, "max_tokens": 2}))
    assert sum(name == "ping" for name, _ in events) > 2


def test_keys():
    with scripted.app(keys=["secret"]) as flask:
        client = flask.test_client()
        refused = client.post("/v1/messages", json=HI)
        assert (refused.status_code, refused.json["error"]["type"]) == (401, "authentication_error")
        assert client.post("/v1/messages", json=HI, headers={"x-api-key": "wrong"}).status_code == 401
        for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            assert client.post("/v1/messages", json=HI, headers=headers).status_code == 200


def test_a_continued_answer(client):
    body = HI | {"messages": [*HI["messages"], {"role": "assistant", "content": "well, "}]}
    assert client.post("/v1/messages", json=body).status_code == 200


# With Anthropic's own client. -----------------------------------------------------------------------------------------


@pytest.fixture
def anthropic(app):
    anthropic = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    with scripted.serving(app) as url, anthropic.Anthropic(base_url=url, api_key="k", max_retries=0) as client:
        yield client


def test_the_client_creates(anthropic):
    message = anthropic.messages.create(**HI)
    assert message.content[0].text == "answer 1: hi" and message.stop_reason == "end_turn"
    assert message.usage.input_tokens == 7


def test_the_client_streams(anthropic):
    with anthropic.messages.stream(**HI) as stream:
        assert "".join(stream.text_stream) == "answer 1: hi"
        final = stream.get_final_message()
    assert (
        final.stop_reason == "end_turn" and final.usage.output_tokens == 12 and final.content[0].text == "answer 1: hi"
    )


def test_the_client_counts(anthropic):
    assert anthropic.messages.count_tokens(model=scripted.MODEL, messages=HI["messages"]).input_tokens == 7


def test_the_client_reads_errors(anthropic):
    import anthropic as package

    with pytest.raises(package.BadRequestError, match="images are not supported"):
        anthropic.messages.create(**HI | {"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    with pytest.raises(package.NotFoundError):
        anthropic.messages.create(**HI | {"model": "claude"})
    with (
        pytest.raises(package.APIStatusError),
        anthropic.messages.stream(**HI | {"messages": [{"role": "user", "content": "\x01"}]}) as stream,
    ):
        stream.until_done()


# Tools and thoughts. --------------------------------------------------------------------------------------------------

CALLS = '{"name": "add", "arguments": {"a": 3, "b": 5}}', '{"name": "add", "arguments": {"a": 1, "b": 2}}'
SAYS = "<think>\nI add.\n</think>\n\nLet me see.\n" + "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in CALLS)
TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}
ADD = {
    "model": scripted.MODEL,
    "max_tokens": 1000,
    "tools": [TOOL],
    "messages": [{"role": "user", "content": "3+5, 1+2"}],
}


@pytest.fixture
def thinker():
    with scripted.app(lambda prompt: SAYS, tool_format="hermes", reasoning_format="think", session_len=4096) as flask:
        yield flask


def test_the_client_calls_tools(thinker):
    package = pytest.importorskip("anthropic", reason="the anthropic package is not installed")
    with (
        scripted.serving(thinker) as url,
        package.Anthropic(base_url=url, api_key="k", max_retries=0) as client,
    ):
        whole = client.messages.create(**ADD)
        with client.messages.stream(**ADD) as stream:
            names = [event.type for event in stream]
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
            thinking, text, first, second = message.content
            assert thinking.thinking.strip() == "I add." and thinking.signature
            assert text.text.strip() == "Let me see." and message.stop_reason == "tool_use"
            assert (first.name, first.input, second.input) == ("add", {"a": 3, "b": 5}, {"a": 1, "b": 2})
            assert first.id != second.id
        assert names.count("content_block_stop") == 4
        results = [{"type": "tool_result", "tool_use_id": block.id, "content": "8"} for block in whole.content[2:]]
        answered = [{"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
        assert client.messages.create(**ADD | {"messages": ADD["messages"] + answered}).stop_reason == "tool_use"


def test_thoughts_are_left_out_if_asked(thinker):
    body = ADD | {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}}
    blocks = thinker.test_client().post("/v1/messages", json=body).json["content"]
    assert blocks[0]["type"] == "thinking" and blocks[0]["thinking"] == ""


def test_tools_count(client):
    asked = {name: ADD[name] for name in ("model", "messages")}
    plain = client.post("/v1/messages/count_tokens", json=asked).json["input_tokens"]
    assert client.post("/v1/messages/count_tokens", json=asked | {"tools": [TOOL]}).json["input_tokens"] > plain
