"""OpenAI's chat completions, completions and models: answers, streams, parameters."""

import threading
import time

import pytest

from jaxserve.serve import schemas
from tests.serve.local import MODEL, exact, serving
from tests.waiting import soon

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server():
    with serving() as made:
        yield made


def messages(content="hi"):
    return {"messages": [{"role": "user", "content": content}]}


# Chats. ---------------------------------------------------------------------------------------------------------------


def test_a_chat(server):
    answer = server.chat()
    exact(answer, schemas.Chat)
    assert answer.pop("id").startswith("chatcmpl-") and abs(answer.pop("created") - time.time()) < 60
    assert answer.pop("system_fingerprint").startswith("jaxserve-")
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "answer 1: hi", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 12,
            "total_tokens": 19,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_streamed_chat_chunk_by_chunk(server):
    chunks = server.chunks(CHAT, messages("é"))
    for chunk in chunks:
        exact(chunk, schemas.ChatChunk)
        assert "usage" not in chunk
    heads = {
        tuple(chunk[name] for name in ("id", "object", "created", "model", "system_fingerprint")) for chunk in chunks
    }
    assert len(heads) == 1 and next(iter(heads))[1] == "chat.completion.chunk"
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert last == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    for choice in middle:
        assert set(choice["delta"]) == {"content"} and choice["delta"]["content"] and choice["finish_reason"] is None
    assert "".join(choice["delta"]["content"] for choice in middle) == "answer 1: é"  # whole characters only


def test_usage_in_a_stream(server):
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 12,
        "total_tokens": 19,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    *chunks, last = server.chunks(CHAT, messages() | {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"] == usage
    exact(last, schemas.ChatChunk)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = server.chunks(CHAT, messages() | {"stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12 and last["usage"] == usage


def test_n_answers(server):
    answer = server.chat(n=3, temperature=1, seed=5)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [f"answer 1: hi (seed {seed})" for seed in (5, 6, 7)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 7 and answer["usage"]["completion_tokens"] == 3 * 21
    streamed = {}
    finished = set()
    for chunk in server.chunks(CHAT, messages() | {"n": 3, "temperature": 1, "seed": 5}):
        (choice,) = chunk["choices"]
        assert choice["index"] not in finished
        streamed[choice["index"]] = streamed.get(choice["index"], "") + choice["delta"].get("content", "")
        if choice["finish_reason"]:
            finished.add(choice["index"])
    assert streamed == dict(enumerate(texts))


@pytest.mark.parametrize("seed, used", [(7, 7), (2**32 + 7, 7), (-1, 2**32 - 1), (2**63 - 1, 2**32 - 1)])
def test_seeds_are_reduced(server, seed, used):
    assert server.chat(temperature=1, seed=seed)["choices"][0]["message"]["content"].endswith(f"(seed {used})")


def test_logprobs_of_a_chat(server):
    answer = server.chat("é", logprobs=True, top_logprobs=2, seed=1)
    exact(answer, schemas.Chat)
    content = answer["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    whole = bytes(byte for token in content for byte in token["bytes"])
    assert whole.decode() == answer["choices"][0]["message"]["content"]
    chunks = server.chunks(CHAT, messages("é") | {"logprobs": True, "top_logprobs": 2, "seed": 1})
    told = [token for chunk in chunks if (part := chunk["choices"][0]["logprobs"]) for token in part["content"]]
    assert told == content
    assert server.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("stop", ["er 1", ["zzz", "er 1"]])
def test_stop_strings(server, stop):
    choice = server.chat(stop=stop)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("answ", "stop")
    kept = server.chat(stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["message"]["content"] == "answer 1"
    chunks = server.chunks(CHAT, messages() | {"stop": stop})
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "answ"


def test_a_beginning_of_a_stop_string_is_flushed(server):
    assert server.chat(stop="hiho")["choices"][0]["message"]["content"] == "answer 1: hi"


def test_lengths(server):
    choice = server.chat(max_tokens=3)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ans", "length")
    assert server.chat(max_tokens=99, max_completion_tokens=2)["choices"][0]["message"]["content"] == "an"
    assert server.complete(max_completion_tokens=2)["usage"]["completion_tokens"] == 2  # as in LMDeploy
    assert server.chat(max_tokens=2**63 - 1)["choices"][0]["finish_reason"] == "stop"
    ignoring = server.chat(ignore_eos=True)
    assert ignoring["usage"]["total_tokens"] == 256 and ignoring["choices"][0]["finish_reason"] == "length"


def test_stop_token_ids(server):
    assert server.chat(stop_token_ids=[ord("w")])["choices"][0]["message"]["content"] == "ans"


def test_a_text_as_messages_is_a_whole_prompt(server):
    answer = server.post(CHAT, {"messages": "raw"})[1]
    assert answer["choices"][0]["message"]["content"] == "answer 0: raw"
    assert answer["usage"]["prompt_tokens"] == 3


def test_token_ids_are_returned(server):
    answer = server.chat(return_token_ids=True)
    exact(answer, schemas.Chat)
    assert answer["choices"][0]["token_ids"] == list(b"answer 1: hi") and len(answer["prompt_token_ids"]) == 7
    chunks = server.chunks(CHAT, messages() | {"return_token_ids": True})
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    ids = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", ())]
    assert ids == list(b"answer 1: hi")


def test_what_clients_send_beside_is_ignored(server):
    body = messages() | {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "session_id": 7,
        "unheard_of": {"deep": [1]},
        "temperature": None,
        "stop": None,
        "tools": None,
        "functions": [],
    }
    assert server.post(CHAT, body)[0] == 200


def test_model_names(server):
    for name in (MODEL, ""):
        assert server.chat(model=name)["model"] == MODEL
    assert server.complete(model=None)["model"] == MODEL
    status, param, message = server.refused(CHAT, messages() | {"model": None})  # as OpenAI and LMDeploy do
    assert (status, param) == (400, "model") and MODEL in message
    assert server.refused(CHAT, messages() | {"model": "other"})[:2] == (404, "model")
    with serving(service={"model_names": ["a", "b/c"]}) as two:
        assert two.chat(model="b/c")["model"] == "b/c" and two.chat()["model"] == "a"
        listed = two.client.get("/v1/models").json
        exact(listed, schemas.Models)
        assert [model["id"] for model in listed["data"]] == ["a", "b/c"]
        exact(two.client.get("/v1/models/b/c").json, schemas.Model)
        assert two.client.get("/v1/models/c").status_code == 404


# Completions. ---------------------------------------------------------------------------------------------------------


def test_a_completion(server):
    answer = server.complete("ab", max_tokens=99)
    exact(answer, schemas.Completion)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "answer 0: ab", "logprobs": None, "finish_reason": "stop"}]
    assert len(server.complete("x" * 50)["choices"][0]["text"]) == 16


@pytest.mark.parametrize("prompt", ["ab", list(b"ab"), ["ab"], [list(b"ab")]], ids=str)
def test_kinds_of_prompts(server, prompt):
    assert server.complete(prompt, max_tokens=99)["choices"][0]["text"] == "answer 0: ab"


def test_lists_of_prompts(server):
    answer = server.complete(["ab", "cd"], n=2, max_tokens=99)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["answer 0: ab"] * 2 + ["answer 0: cd"] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 48
    streamed = [""] * 4
    for chunk in server.chunks(COMPLETION, {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 99}):
        exact(chunk, schemas.Completion)
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_more_prompts_than_a_window():
    with serving(limits={"window": 3}, max_batch_size=1) as server:
        prompts = [f"p{number}" for number in range(40)]
        answer = server.complete(prompts, max_tokens=20)
        assert [choice["text"] for choice in answer["choices"]] == [f"answer 0: {prompt}" for prompt in prompts]
        assert server.engine.most <= 3


def test_a_list_of_prompts_goes_on_when_the_engine_was_full():
    with serving(limits={"window": 4}, max_batch_size=1, door={"max_queued": 3}, delay=0.001) as server:
        answer = server.complete([f"p{number}" for number in range(20)], max_tokens=20)
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 20


def test_logprobs_of_a_completion(server):
    answer = server.complete("x", logprobs=2, max_tokens=2)
    exact(answer, schemas.Completion)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "n"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"n": -0.5, "o": -1.5}],
        "text_offset": [0, 1],
    }
    chunks = server.chunks(COMPLETION, {"prompt": "x", "logprobs": 2, "max_tokens": 2})
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    whole = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    assert whole == answer["choices"][0]["logprobs"]


def test_echo_with_logprobs(server):
    answer = server.complete("ab", echo=True, logprobs=1, max_tokens=1)
    exact(answer, schemas.Completion)
    (choice,) = answer["choices"]
    assert choice["text"] == "aba"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "a"],
        "token_logprobs": [None, -98.0, -0.5],
        "top_logprobs": [None, {"b": -98.0}, {"a": -0.5}],
        "text_offset": [0, 1, 2],
    }
    (same,) = server.complete([list(b"ab")], echo=True, logprobs=1, max_tokens=1)["choices"]
    assert same == choice
    chunks = server.chunks(COMPLETION, {"prompt": "ab", "echo": True, "logprobs": 1, "max_tokens": 1})
    assert [chunk["choices"][0] for chunk in chunks] == [choice]


def test_echoes_of_several_prompts_are_scored_together(server, monkeypatch):
    both, score = threading.Barrier(2), server.engine.score

    def scored(tokens, want):
        both.wait(20)
        return score(tokens, want)

    monkeypatch.setattr(server.engine, "score", scored)
    choices = server.complete(["ab", "c", "de"], echo=True, logprobs=1, max_tokens=1)["choices"]
    assert [choice["text"] for choice in choices] == ["aba", "ca", "dea"]
    told = [choice["logprobs"]["token_logprobs"] for choice in choices]
    assert told == [[None, -98.0, -0.5], [None, -0.5], [None, -101.0, -0.5]]


def test_echo_alone(server):
    answer = server.complete(["ab", [99]], echo=True, max_tokens=0)
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    scored = server.complete("abc", echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    assert scored["token_logprobs"] == [None, -98.0, -99.0]
    assert server.refused(COMPLETION, {"prompt": "a", "max_tokens": 0})[:2] == (400, "max_tokens")


def test_best_of(server):
    answer = server.complete(["ab", "cd"], best_of=3, n=2, max_tokens=4)
    assert len(answer["choices"]) == 4 and {choice["logprobs"] for choice in answer["choices"]} == {None}
    assert answer["usage"]["completion_tokens"] == 24
    assert server.refused(COMPLETION, {"prompt": "a", "best_of": 3, "stream": True})[:2] == (400, "best_of")
    assert server.refused(COMPLETION, {"prompt": "a", "best_of": 1, "n": 2})[:2] == (400, "best_of")


def test_completions_return_token_ids(server):
    answer = server.complete("ab", max_tokens=2, return_token_ids=True)
    exact(answer, schemas.Completion)
    assert answer["choices"][0]["token_ids"] == list(b"an")
    assert answer["choices"][0]["prompt_token_ids"] == list(b"ab")


def test_a_prompt_that_fills_the_session_exactly(server):
    (choice,) = server.complete("x" * 256)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    status, param, message = server.refused(COMPLETION, {"prompt": "x" * 257})
    assert (status, param) == (400, "prompt") and "257" in message and "256" in message


# What goes wrong after the request was accepted. ----------------------------------------------------------------------


def test_an_engine_that_fails(server):
    status, _, message = server.refused(COMPLETION, {"prompt": "\x01"})
    assert status == 500 and message.startswith("a step of the computation failed")
    response = server.client.post(COMPLETION, json={"prompt": "\x01"})
    assert response.headers["x-should-retry"] == "false"
    *_, last = server.events(COMPLETION, {"prompt": "\x01"})
    assert last.startswith('data: {"error":{"message":"a step of the computation failed')
    assert server.refused(COMPLETION, {"prompt": "\0"})[0] == 400  # it can never be served


def test_an_engine_that_stops():
    with serving() as server:
        *_, last = server.events(COMPLETION, {"prompt": "\x02"})
        assert '"server_error"' in last and "the engine has stopped" in last
        response = server.client.post(COMPLETION, json={"prompt": "x"})
        assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1


def test_a_full_queue():
    with serving(max_batch_size=1, door={"max_concurrent": 2}, delay=0.01) as server:
        stream = server.service.start(server.service.parse(CHAT, messages() | {"n": 5, "ignore_eos": True}))
        response = server.client.post(CHAT, json=messages() | {"model": MODEL})
        assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
        assert response.json["error"]["type"] == "overloaded_error"
        stream.close()
        soon(lambda: server.service.engine.idle)
        assert server.chat()["choices"]


def test_more_answers_than_the_queue_holds():
    with serving(max_batch_size=1, door={"max_concurrent": 2}) as server:
        assert [choice["finish_reason"] for choice in server.chat(n=7)["choices"]] == ["stop"] * 7


def test_silence_is_filled_with_comments():
    with serving(delay=0.05, limits={"heartbeat": 0.01}) as server:
        events = server.events(CHAT, messages() | {"max_tokens": 3})
        assert ": keep-alive" in events and events[-1] == "data: [DONE]"


@pytest.mark.parametrize("param, value", [("stop_token_ids", [10**6]), ("logit_bias", {"1000000": 1})], ids=str)
def test_tokens_that_the_model_has_not(server, param, value):
    for path, body in ((CHAT, messages()), (COMPLETION, {"prompt": "a"})):
        status, named, message = server.refused(path, body | {param: value})
        assert (status, named) == (400, param) and "token ids of this model are 0 to" in message


# The shape of answers. ------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"response_format": {"type": "regex_schema", "regex_schema": "[a-z]+"}},
        {"guided_json": SCHEMA},
        {"guided_regex": "[a-z]+"},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'start: "x"'},
        {"structured_outputs": {"regex": "[a-z]+"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
    ],
    ids=lambda body: str(next(iter(body.values())))[:40],
)
def test_shapes_reach_the_engine(server, body):
    server.chat(**body)
    assert "grammars" in server.engine.submitted[-1].grammar
    server.complete(**body)
    assert "grammars" in server.engine.submitted[-1].grammar
    server.chat(response_format={"type": "text"})
    assert server.engine.submitted[-1].grammar is None


@pytest.mark.parametrize(
    "param, value",
    [
        ("response_format", {"type": "hiccup"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 123}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "hiccup"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x.example/y"}}}),
        ("response_format", {"type": "regex_schema", "regex_schema": "(?=x)"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {}),
        ("guided_json", {"type": "hiccup"}),
        ("guided_regex", "("),
        ("guided_regex", "(?=x)"),
        ("structured_outputs", {"regex": "(?=x)"}),
        ("guided_choice", []),
        ("guided_grammar", "nonsense"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be(server, param, value):
    status, named, message = server.refused(CHAT, messages() | {param: value})
    assert (status, named) == (400, param) and message


def test_two_shapes_at_once(server):
    body = messages() | {"guided_regex": "x", "response_format": {"type": "json_object"}}
    assert server.refused(CHAT, body)[:2] == (400, "guided_regex")
