"""OpenAI's Responses API, through Flask's test client and through OpenAI's own."""

import json
import time

import pytest

from tests.serve import scripted
from tests.waiting import soon

HI = {"model": scripted.MODEL, "input": "hi"}
RESPONSES = "/v1/responses"


@pytest.fixture
def app():
    with scripted.app() as flask:
        yield flask


@pytest.fixture
def client(app):
    return app.test_client()


def said(response):
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def test_a_response(client):
    answer = client.post(RESPONSES, json=HI | {"metadata": {"a": "b"}, "instructions": ""})
    assert answer.status_code == 200
    body = answer.json
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", scripted.MODEL)
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert said(body) == "answer 1: hi" and body["id"].startswith("resp_") and item["id"].startswith("msg_")
    assert body["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 12,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 19,
    }
    assert body["completed_at"] >= body["created_at"] and body["metadata"] == {"a": "b"}


def streamed(client, **body):
    response = client.post(RESPONSES, json=HI | {"stream": True} | body)
    assert response.mimetype == "text/event-stream"
    events = scripted.events(response)
    assert events[-1] == (None, "[DONE]")
    made = [(name, json.loads(data)) for name, data in events[:-1]]
    assert all(name == data["type"] for name, data in made)
    assert [data["sequence_number"] for _, data in made] == list(range(len(made)))
    return made


def test_a_stream(client):
    events = streamed(client)
    names = [name.removeprefix("response.") for name, _ in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(data["delta"] for name, data in events if name == "response.output_text.delta") == "answer 1: hi"
    final = events[-1][1]["response"]
    assert said(final) == "answer 1: hi" and final["usage"]["output_tokens"] == 12
    assert client.get(f"{RESPONSES}/{final['id']}").json == final


def test_an_answer_that_was_cut(client):
    assert streamed(client, max_output_tokens=3)[-1][0] == "response.incomplete"
    body = client.post(RESPONSES, json=HI | {"max_output_tokens": 3}).json
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert said(body) == "ans"


def test_what_is_stored(client):
    first = client.post(RESPONSES, json=HI).json
    path = f"{RESPONSES}/{first['id']}"
    assert client.get(path).json == first
    second = client.post(RESPONSES, json=HI | {"input": "more", "previous_response_id": first["id"]}).json
    assert said(second) == "answer 2: more" and second["previous_response_id"] == first["id"]
    third = client.post(RESPONSES, json=HI | {"previous_response_id": second["id"], "instructions": "be kind"}).json
    assert said(third) == "answer 3: hi" and third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    listed = client.get(f"{RESPONSES}/{second['id']}/input_items?order=asc").json
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["hi", "answer 1: hi", "more"] and not listed["has_more"]
    newest = client.get(f"{RESPONSES}/{second['id']}/input_items?limit=1").json
    assert newest["data"][0]["content"][0]["text"] == "more" and newest["has_more"]
    after = client.get(f"{RESPONSES}/{second['id']}/input_items?after={newest['last_id']}").json
    assert len(after["data"]) == 2
    assert client.delete(path).json == {"id": first["id"], "object": "response", "deleted": True}
    assert client.get(path).status_code == 404 == client.delete(path).status_code
    gone = client.post(RESPONSES, json=HI | {"previous_response_id": first["id"]})
    assert (gone.status_code, gone.json["error"]["param"]) == (404, "previous_response_id")


def test_what_is_not_stored(client):
    body = client.post(RESPONSES, json=HI | {"store": False}).json
    assert body["store"] is False and client.get(f"{RESPONSES}/{body['id']}").status_code == 404
    final = streamed(client, store=False)[-1][1]["response"]
    assert client.get(f"{RESPONSES}/{final['id']}").status_code == 404


def waited(client, id):
    def found():
        return client.get(f"{RESPONSES}/{id}").json

    soon(lambda: found()["status"] not in ("queued", "in_progress"))
    return found()


def test_in_the_background(client):
    begun = client.post(RESPONSES, json=HI | {"background": True}).json
    assert (begun["status"], begun["output"]) == ("queued", [])
    done = waited(client, begun["id"])
    assert done["status"] == "completed" and said(done) == "answer 1: hi" and done["background"] is True
    assert client.post(f"{RESPONSES}/{begun['id']}/cancel").json == done
    failed = client.post(RESPONSES, json=HI | {"background": True, "input": "\x01"}).json
    done = waited(client, failed["id"])
    assert done["status"] == "failed" and done["error"]["code"] == "server_error"


def test_cancelled():
    with scripted.app(delay=0.02) as flask:
        client = flask.test_client()
        begun = client.post(RESPONSES, json=HI | {"background": True, "max_output_tokens": 100}).json
        unready = client.post(RESPONSES, json=HI | {"previous_response_id": begun["id"]})
        assert unready.status_code == 400
        assert client.post(f"{RESPONSES}/{begun['id']}/cancel").json["status"] == "cancelled"
        assert waited(client, begun["id"])["status"] == "cancelled"
        begun = client.post(RESPONSES, json=HI | {"background": True}).json
        assert client.delete(f"{RESPONSES}/{begun['id']}").status_code == 200
        soon(lambda: flask.service.engine.idle)
        time.sleep(0.05)  # it would be stored about now
        assert client.get(f"{RESPONSES}/{begun['id']}").status_code == 404
        done = client.post(RESPONSES, json=HI).json
        assert client.post(f"{RESPONSES}/{done['id']}/cancel").status_code == 400


def test_cancelled_by_another_worker():
    with scripted.app(delay=0.05) as flask:
        from jaxserve.serve.app import create_app

        other = create_app(flask.service).test_client()
        begun = flask.test_client().post(RESPONSES, json=HI | {"background": True}).json
        assert other.post(f"{RESPONSES}/{begun['id']}/cancel").json["status"] == "cancelled"
        assert waited(other, begun["id"])["status"] == "cancelled"


def test_counted_tokens(client):
    asked = client.post(f"{RESPONSES}/input_tokens", json=HI)
    assert asked.json == {"object": "response.input_tokens", "input_tokens": 7}


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({"model": None}, 400, "model"),
        ({"model": "gpt"}, 404, "model"),
        ({"input": None}, 400, "input"),
        ({"input": "x" * 300}, 400, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content[0]"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"top_k": "x"}, 400, "top_k"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
    ],
)
def test_errors(client, body, status, param):
    response = client.post(RESPONSES, json=HI | body)
    assert (response.status_code, response.json["error"]["param"]) == (status, param)
    assert param.partition("[")[0] in response.json["error"]["message"]


def test_other_errors(client):
    missing = client.post(RESPONSES, json={"input": "x"})
    assert (missing.status_code, missing.json["error"]["param"]) == (400, "model")
    assert client.post(f"{RESPONSES}/compact", json={}).status_code == 404
    assert client.get(f"{RESPONSES}/resp_none").status_code == 404
    assert client.get(f"{RESPONSES}/{'x' * 1000}").status_code == 404
    assert client.post(RESPONSES, json=HI | {"input": "\x01"}).status_code == 500
    events = streamed(client, input="\x01")
    assert events[-1][0] == "response.failed" and events[-1][1]["response"]["error"]["code"] == "server_error"
    done = client.post(RESPONSES, json=HI).json
    assert client.get(f"{RESPONSES}/{done['id']}?stream=true").status_code == 400
    assert client.get(f"{RESPONSES}/{done['id']}/input_items?limit=0").status_code == 400


def test_a_body_that_is_deep(client):
    deep = {}
    for _ in range(400):
        deep = {"a": deep}
    tool = {"type": "function", "name": "x", "parameters": deep}
    for body in ({"tools": [tool]}, {"input": [{"role": "user", "content": "x", "more": deep}]}):
        assert client.post(RESPONSES, json=HI | body).status_code == 400


def test_log_probabilities(client):
    body = client.post(RESPONSES, json=HI | {"top_logprobs": 1, "max_output_tokens": 2}).json
    rows = body["output"][0]["content"][0]["logprobs"]
    assert [row["token"] for row in rows] == ["a", "n"] and len(rows[0]["top_logprobs"]) == 1
    deltas = [data for name, data in streamed(client, top_logprobs=1) if name == "response.output_text.delta"]
    assert all(delta["logprobs"] for delta in deltas)


# With OpenAI's own client. --------------------------------------------------------------------------------------------


@pytest.fixture
def openai(app):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with scripted.serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        yield client


def test_the_client_creates(openai):
    response = openai.responses.create(**HI)
    assert response.output_text == "answer 1: hi" and response.status == "completed"
    more = openai.responses.create(model=scripted.MODEL, input="more", previous_response_id=response.id)
    assert more.output_text == "answer 2: more"
    assert openai.responses.retrieve(response.id).output_text == "answer 1: hi"
    assert len(openai.responses.input_items.list(more.id).data) == 3
    openai.responses.delete(response.id)


def test_the_client_streams(openai):
    with openai.responses.stream(**HI) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(texts) == "answer 1: hi" == final.output_text
    kinds = [event.type for event in openai.responses.create(**HI, stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_the_client_reads_errors(openai):
    import openai as package

    with pytest.raises(package.NotFoundError):
        openai.responses.retrieve("resp_none")
    with pytest.raises(package.BadRequestError, match="input"):
        openai.responses.create(model=scripted.MODEL, input=[])


# Tools and thoughts. --------------------------------------------------------------------------------------------------

CALLS = '{"name": "add", "arguments": {"a": 3, "b": 5}}', '{"name": "add", "arguments": {"a": 1, "b": 2}}'
SAYS = "<think>\nI add.\n</think>\n\nLet me see.\n" + "".join(f"<tool_call>\n{call}\n</tool_call>\n" for call in CALLS)
FUNCTION = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": False}


def test_the_client_calls_functions():
    package = pytest.importorskip("openai", reason="the openai package is not installed")
    options = {"tool_format": "hermes", "reasoning_format": "think", "session_len": 4096}
    with (
        scripted.app(lambda prompt: SAYS, **options) as flask,
        scripted.serving(flask) as url,
        package.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        asked = HI | {"tools": [FUNCTION], "input": "3+5, 1+2"}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_response()
        for response in (whole, streamed):
            kept = [item.type for item in response.output]
            assert kept == ["reasoning", "message", "function_call", "function_call"]
            assert response.output[0].content[0].text.strip() == "I add."
            assert response.output_text.strip() == "Let me see." and response.status == "completed"
            assert [json.loads(item.arguments) for item in response.output[2:]] == [{"a": 3, "b": 5}, {"a": 1, "b": 2}]
        assert kinds.count("response.function_call_arguments.done") == 2
        outputs = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "8"} for item in whole.output[2:]
        ]
        more = client.responses.create(**asked | {"input": outputs}, previous_response_id=whole.id)
        assert more.status == "completed"
        again = client.responses.create(**asked | {"input": [*whole.output, *outputs]})
        assert again.status == "completed"


def test_the_client_parses():
    package = pytest.importorskip("openai", reason="the openai package is not installed")
    pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

    class City(pydantic.BaseModel):
        name: str

    with (
        scripted.app(lambda prompt: '{"name": "Paris"}') as flask,
        scripted.serving(flask) as url,
        package.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client,
    ):
        parsed = client.responses.parse(model=scripted.MODEL, input="where?", text_format=City)
        assert parsed.output_parsed == City(name="Paris")
        (request,) = flask.service.engine.engine.submitted
        assert request.grammar and "name" in request.grammar
