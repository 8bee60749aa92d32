"""Embeddings, tokenizer routes, LMDeploy's routes and health, through Flask's test client and OpenAI's own."""

import base64
import json
import threading

import numpy as np
import pytest

from jaxserve import __version__
from jaxserve.serve import health
from tests.serve import scripted
from tests.serve.live import connect
from tests.waiting import soon

INTERACTIVE = "/v1/chat/interactive"


@pytest.fixture
def app():
    with scripted.app() as flask:
        yield flask


@pytest.fixture
def client(app):
    return app.test_client()


def refused(response, param, status=400):
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.json["error"]["param"] == param


# Embeddings. ----------------------------------------------------------------------------------------------------------


def embedded(client, input, **options):
    response = client.post("/v1/embeddings", json={"model": scripted.MODEL, "input": input} | options)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.json


def test_embeddings(client):
    body = embedded(client, "abc")
    assert body["object"] == "list" and body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    (one,) = body["data"]
    vector = np.asarray(one["embedding"])
    assert vector.shape == (scripted.WIDTH,) and abs(np.linalg.norm(vector) - 1) < 1e-6
    many = embedded(client, ["abc", "b", "abc"])["data"]
    assert [row["index"] for row in many] == [0, 1, 2]
    assert many[0]["embedding"] == many[2]["embedding"] == one["embedding"] != many[1]["embedding"]
    assert embedded(client, list(b"abc"))["data"] == body["data"]
    assert embedded(client, [list(b"abc"), list(b"b")])["data"] == many[:2]
    short = np.asarray(embedded(client, "abc", dimensions=5)["data"][0]["embedding"])
    np.testing.assert_allclose(short, vector[:5] / np.linalg.norm(vector[:5]), atol=1e-6)
    coded = embedded(client, "abc", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(coded), "<f4"), vector, atol=1e-7)
    assert len(embedded(client, ["x"] * 300)["data"]) == 300


@pytest.mark.parametrize(
    "body, param",
    [
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [3, True]}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [9999]}, "input"),
        ({"input": "x" * 300}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"encoding_format": "binary"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded(client, body, param):
    refused(client.post("/v1/embeddings", json={"input": "a"} | body), param)


def test_embeddings_of_another_model(client):
    refused(client.post("/v1/embeddings", json={"input": "a", "model": "ada"}), "model", 404)
    refused(client.post("/v1/embeddings", json={}), "input")


def test_no_embedding_is_divided_by_nothing():
    from jaxserve.serve.native import unit

    assert unit(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    assert unit(np.full(4, 1e30, np.float32)).tolist() == [0.5] * 4


# Tokens. --------------------------------------------------------------------------------------------------------------


def test_tokenize(client):
    body = client.post("/tokenize", json={"prompt": "ab<|end|>", "return_token_strs": True}).json
    assert body == {"count": 3, "max_model_len": 256, "tokens": [97, 98, 257], "token_strs": ["a", "b", "<|end|>"]}
    assert client.post("/tokenize", json={"prompt": ""}).json["tokens"] == []
    assert client.post("/tokenize", json={"prompt": "x" * 1000}).json["count"] == 1000
    hi = {"messages": [{"role": "user", "content": "hi"}]}
    chat = client.post("/tokenize", json=hi).json
    assert chat["count"] == 7 and chat["token_strs"] is None
    assert client.post("/tokenize", json=hi | {"add_generation_prompt": False}).json["tokens"] == chat["tokens"][:-1]
    begun = {"messages": [*hi["messages"], {"role": "assistant", "content": "so"}]}
    text = client.post("/tokenize", json=begun | {"continue_final_message": True, "add_generation_prompt": False}).json
    prompt = client.post("/detokenize", json={"tokens": text["tokens"]}).json["prompt"]
    assert prompt == "<|user|>u:hi<|end|><|user|>a:so"


def test_detokenize(client):
    assert client.post("/detokenize", json={"tokens": [97, 257]}).json == {"prompt": "a<|end|>"}
    assert client.post("/detokenize", json={"tokens": []}).json == {"prompt": ""}
    for tokens in ([-1], [258], [2**40], ["a"], None):
        response = client.post("/detokenize", json={"tokens": tokens})
        assert response.status_code == 400 and response.json["error"]["param"].startswith("tokens")


def test_what_cannot_be_tokenized(client):
    refused(client.post("/tokenize", json={}), "prompt")
    refused(client.post("/tokenize", json={"prompt": "a", "messages": []}), "prompt")
    refused(client.post("/tokenize", json={"prompt": 3}), "prompt")
    refused(client.post("/tokenize", json={"messages": [{"role": "user"}]}), "messages")
    refused(client.post("/tokenize", json={"prompt": "x" * 4_000_001}), "prompt")
    refused(client.post("/tokenize", json={"prompt": "x", "model": "m"}), "model", 404)
    both = {
        "messages": [{"role": "user", "content": "x"}],
        "continue_final_message": True,
        "add_generation_prompt": True,
    }
    refused(client.post("/tokenize", json=both), "continue_final_message")


def test_tokenizer_info(client):
    body = client.get("/tokenizer_info").json
    assert body["eos_token"] == "<|end|>" and body["bos_token"] is None and body["tokenizer_class"]
    assert "add_generation_prompt" in body["chat_template"]


def test_encode(client):
    assert client.post("/v1/encode", json={"input": "ab"}).json == {"input_ids": [97, 98], "length": 2}
    assert client.post("/v1/encode", json={"input": ["a", "bc"]}).json == {
        "input_ids": [[97], [98, 99]],
        "length": [1, 2],
    }
    assert client.post("/v1/encode", json={"input": "hi", "do_preprocess": True}).json["length"] == 7
    refused(client.post("/v1/encode", json={"input": 3}), "input")


def test_perplexity(client):
    assert client.post("/get_ppl", json={"input": [1, 2, 4]}).json == {"ppl": 3.0}
    assert client.post("/get_ppl", json={"input": "ab"}).json == {"ppl": 98.0}
    for input in ("", "a", [], [1], [1, 999], "x" * 300, None):
        refused(client.post("/get_ppl", json={"input": input}), "input")


# /generate. -----------------------------------------------------------------------------------------------------------


def test_generate(client):
    body = client.post("/generate", json={"prompt": "hi"}).json
    assert body["text"] == "answer 0: hi" and bytes(body["output_ids"]) == b"answer 0: hi"
    counts = {"prompt_tokens": 2, "completion_tokens": 12, "output_token_logprobs": None}
    assert body["meta_info"] == {"finish_reason": {"type": "stop"}} | counts
    assert client.post("/generate", json={"input_ids": list(b"hi")}).json == body
    cut = client.post("/generate", json={"prompt": "hi", "max_tokens": 2, "return_logprob": True}).json
    assert cut["meta_info"]["finish_reason"] == {"type": "length"}
    assert cut["meta_info"]["output_token_logprobs"] == [[-0.5, 97], [-0.5, 110]]
    assert client.post("/generate", json={"prompt": "hi", "stop": "er"}).json["text"] == "answ"


def test_a_stream_of_generate(client):
    events = scripted.events(client.post("/generate", json={"prompt": "hi", "stream": True}))
    assert events[-1][1] == "[DONE]"
    pieces = [json.loads(data) for _, data in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == "answer 0: hi"
    assert pieces[-1]["meta_info"]["finish_reason"] == {"type": "stop"}
    assert all(piece["meta_info"]["finish_reason"] is None for piece in pieces[:-1])
    failed = scripted.events(client.post("/generate", json={"prompt": "\x01", "stream": True}))
    assert "error" in json.loads(failed[-1][1])


def test_what_cannot_be_generated(client):
    refused(client.post("/generate", json={}), "prompt")
    refused(client.post("/generate", json={"prompt": "a", "input_ids": [1]}), "prompt")
    refused(client.post("/generate", json={"prompt": ""}), "prompt")
    refused(client.post("/generate", json={"input_ids": [999]}), "input_ids")
    refused(client.post("/generate", json={"prompt": "a", "temperature": 9}), "temperature")
    refused(client.post("/generate", json={"prompt": "a", "image_data": "x"}), "image_data")


# /v1/chat/interactive. ------------------------------------------------------------------------------------------------

PLAIN = {"top_k": 1, "request_output_len": 100}


def turn(client, prompt, **options):
    response = client.post(INTERACTIVE, json=PLAIN | {"prompt": prompt} | options)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.json


def test_one_turn(client):
    body = turn(client, "hi")
    assert body == {
        "text": "answer 1: hi",
        "tokens": 12,
        "input_tokens": 7,
        "history_tokens": 0,
        "finish_reason": "stop",
    }
    assert turn(client, [{"role": "user", "content": "hi"}]) == body
    assert turn(client, "hi", request_output_len=3)["finish_reason"] == "length"
    sampled = client.post(INTERACTIVE, json={"prompt": "hi", "seed": 7}).json  # LMDeploy's defaults: it samples
    assert sampled["text"].endswith("(seed 7)")


def test_a_session(client):
    first = turn(client, "a", session_id=5, interactive_mode=True)
    second = turn(client, "b", session_id=5, interactive_mode=True)
    assert second["text"] == "answer 2: b" and second["history_tokens"] == first["input_tokens"] + first["tokens"]
    assert turn(client, "c", session_id=6, interactive_mode=True)["text"] == "answer 1: c"
    last = turn(client, "d", session_id=5)  # no interactive_mode: the last turn
    assert last["text"] == "answer 3: d"
    assert turn(client, "e", session_id=5, interactive_mode=True)["text"] == "answer 1: e"
    assert turn(client, "", session_id=5)["tokens"] == 0  # as api_client's "end"
    assert turn(client, "f", session_id=5, interactive_mode=True)["text"] == "answer 1: f"


def test_a_session_is_told_what_was_said(client):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    told = turn(client, said, session_id=5, interactive_mode=True, request_output_len=0)
    assert (told["text"], told["tokens"]) == ("", 0)
    assert turn(client, "c", session_id=5, interactive_mode=True)["text"] == "answer 2: c"


def test_a_session_that_is_full(client):
    turn(client, "x" * 100, session_id=5, interactive_mode=True)
    full = turn(client, "y" * 100, session_id=5, interactive_mode=True)
    assert full["finish_reason"] == "length" and full["text"] == ""
    assert turn(client, "z", session_id=5, interactive_mode=True)["text"] == "answer 2: z"


def test_a_stream_of_lines(client):
    response = client.post(
        INTERACTIVE, json=PLAIN | {"prompt": "hi", "stream": True, "session_id": 1, "interactive_mode": True}
    )
    lines = [json.loads(line) for line in response.get_data().splitlines() if line]
    assert "".join(line["text"] for line in lines) == "answer 1: hi"
    assert [line["finish_reason"] for line in lines] == [None] * (len(lines) - 1) + ["stop"]
    assert lines[-1]["tokens"] == 12
    assert turn(client, "b", session_id=1)["history_tokens"] == 19
    failed = client.post(INTERACTIVE, json=PLAIN | {"prompt": "\x01", "stream": True})
    assert "error" in json.loads(failed.get_data().splitlines()[-1])


def test_cancelled():
    with scripted.app(delay=0.02) as flask:
        client, found = flask.test_client(), []
        turn(client, "a", session_id=5, interactive_mode=True, request_output_len=1)

        def run():
            found.append(
                client.post(INTERACTIVE, json=PLAIN | {"prompt": "b", "session_id": 5, "interactive_mode": True})
            )

        thread = threading.Thread(target=run)
        thread.start()
        soon(lambda: len(flask.service.engine.engine.submitted) == 2)
        ended = flask.test_client().post(INTERACTIVE, json={"session_id": 5, "cancel": True})
        assert ended.json == {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": None}
        thread.join(10)
        assert found[0].status_code == 499
        again = turn(flask.test_client(), "c", session_id=5, interactive_mode=True, request_output_len=5)
        assert again["history_tokens"] == 0
        refused(client.post(INTERACTIVE, json={"cancel": True}), "session_id")


def test_other_keys_have_other_sessions():
    with scripted.app(keys=["one", "two"]) as flask:
        client = flask.test_client()
        said = PLAIN | {"prompt": "a", "session_id": 1, "interactive_mode": True}

        def texts(key):
            response = client.post(INTERACTIVE, json=said, headers={"Authorization": f"Bearer {key}"})
            return response.json["text"]

        assert [texts(key) for key in ("one", "two", "one")] == ["answer 1: a", "answer 1: a", "answer 2: a"]


def test_a_client_that_leaves():
    with scripted.app(delay=0.02) as flask, scripted.serving(flask) as url:
        engine = flask.service.engine.engine
        body = PLAIN | {"prompt": "a", "session_id": 1, "interactive_mode": True}
        for path, more in ((INTERACTIVE, body), ("/generate", {"prompt": "x" * 30})):
            for streamed in (True, False):
                before = len(engine.aborted)
                client = connect(url, path, json.dumps(more | {"stream": streamed}).encode())
                soon(lambda: flask.test_client().get("/load").json["running"])
                client.close()
                soon(lambda count=before: len(engine.aborted) > count)
        assert turn(flask.test_client(), "b", session_id=1)["history_tokens"] == 0


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": "x" * 5_000_000}, "prompt"),
        ({"session_id": "x"}, "session_id"),
        ({"session_id": -2}, "session_id"),
        ({"temperature": -1}, "temperature"),
        ({"request_output_len": -1}, "request_output_len"),
        ({"image_url": "http://x"}, "image_url"),
        ({"adapter_name": "a"}, "adapter_name"),
    ],
)
def test_what_a_turn_cannot_be(client, body, param):
    refused(client.post(INTERACTIVE, json={"prompt": "a"} | body), param)


# Health. --------------------------------------------------------------------------------------------------------------


def test_health(app, client):
    for path in ("/health", "/ready"):
        response = client.get(path)
        assert (response.status_code, response.json) == (200, {"status": "ready"})
    assert client.get("/version").json == {"version": __version__}
    assert client.get("/load").json == {"server_load": 0, "running": 0, "waiting": 0}
    metrics = client.get("/metrics")
    assert metrics.mimetype == "text/plain" and b"jaxserve:" in metrics.data
    app.service.engine.drain()
    for path in ("/health", "/ready"):
        response = client.get(path)
        assert (response.status_code, response.json) == (503, {"status": "draining"})
    app.service.engine.close()
    assert client.get("/health").json == {"status": "dead"}


def test_an_engine_that_hangs(app, client, monkeypatch):
    engine = app.service.engine
    monkeypatch.setattr(engine, "stats", lambda: {"running": 1, "steps": 5})
    assert client.get("/health").status_code == 200
    monkeypatch.setattr(health, "STALL", -1.0)
    assert (client.get("/health").status_code, client.get("/health").json) == (503, {"status": "stalled"})


def test_only_health_is_open():
    with scripted.app(keys=["secret"]) as flask:
        client = flask.test_client()
        assert client.get("/health").status_code == 200
        for path in ("/ready", "/version", "/load", "/metrics", "/tokenizer_info"):
            assert client.get(path).status_code == 401
        for path in ("/tokenize", "/generate", "/v1/embeddings", "/get_ppl", INTERACTIVE, "/v1/responses"):
            assert client.post(path, json={}).status_code == 401


# With the clients that use them. --------------------------------------------------------------------------------------


def test_the_openai_client_embeds(app):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    with scripted.serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
        made = client.embeddings.create(model=scripted.MODEL, input=["abc", "d"])  # asks for base64
        assert len(made.data) == 2 and abs(np.linalg.norm(made.data[0].embedding) - 1) < 1e-6
        plain = client.embeddings.create(model=scripted.MODEL, input="abc", encoding_format="float")
        np.testing.assert_allclose(plain.data[0].embedding, made.data[0].embedding, atol=1e-6)


def test_the_document_knows_the_routes(client):
    document = client.get("/openapi.json").json
    for path in (
        "/v1/embeddings",
        "/tokenize",
        "/generate",
        INTERACTIVE,
        "/health",
        "/v1/messages",
        "/v1/responses/{id}",
    ):
        assert path in document["paths"]
    message = document["components"]["schemas"]["Message"]
    assert "role" in message["properties"]  # a chat's: no other schema has taken its name
    assert all("." not in name for name in document["components"]["schemas"])
