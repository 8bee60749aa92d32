"""The HTTP API on the real engine, with a tiny random model: it answers what the Python API answers."""

import json

import numpy as np
import pytest

from jaxserve import EngineConfig, GenerationConfig, pipeline
from jaxserve.serve.door import Door
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Service
from scripts import tiny_checkpoint
from tests import fake_engine
from tests.serve.local import Server

PROMPTS = ["Hi", "a longer prompt, of several words", "x" * 70, "é🙂"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_checkpoint.write(
        folder,
        tiny_checkpoint.config("LlamaForCausalLM", vocab_size=258, eos_token_id=257, max_position_embeddings=1024),
    )
    fake_engine.tokenizer().core.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": fake_engine.END, "chat_template": fake_engine.TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = EngineConfig(max_batch_size=4, cache_max_entry_count=160, cache_block_seq_len=16)
    with pipeline(str(folder), config) as made:
        yield made


@pytest.fixture(scope="module")
def server(pipe):
    service = Service(Door(pipe.engine), pipe.tokenizer, pipe.template, model_names=["tiny"], tool_format="hermes")
    return Server(service, pipe.engine, ServerOptions())


def test_chats_answer_as_the_pipeline_does(server, pipe):
    for prompt in PROMPTS:
        expected = pipe(prompt, GenerationConfig(max_new_tokens=12))
        choice = server.chat(prompt, max_tokens=12)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected.text, expected.finish_reason)
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 12}
        chunks = server.chunks("/v1/chat/completions", body)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text


def test_seeds_are_the_pipelines(server, pipe):
    config = GenerationConfig(n=3, do_sample=True, top_k=0, temperature=1.0, random_seed=4, max_new_tokens=12)
    expected = [response.text for response in pipe("Hi", config)]
    answer = server.chat(n=3, temperature=1.0, seed=4, max_tokens=12, messages=[{"role": "user", "content": "Hi"}])
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected


def test_scores_of_prompts_are_those_of_the_logits(server, pipe):
    """What lm-eval's local-completions asks for."""
    tokens = list(b"some text to score")
    body = {"prompt": [tokens], "echo": True, "logprobs": 3, "max_tokens": 1, "temperature": 0}
    (choice,) = server.complete(**body)["choices"]
    logits = pipe.get_logits(tokens)[0].astype(np.float64)
    chances = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(tokens) + 1
    expected = chances[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(told["token_logprobs"][1:-1], expected, atol=1e-5)
    for row, alternatives in zip(chances, told["top_logprobs"][1:-1], strict=False):
        assert max(alternatives.values()) == pytest.approx(row.max(), abs=1e-5)
    assert told["token_logprobs"][-1] == pytest.approx(chances[-1].max(), abs=1e-5)
    assert choice["text"].startswith("some text to score")


def test_a_prompt_and_its_repetition_hits_the_cache(server):
    prompt = "a prompt that is long enough for some pages of the cache, and is sent twice"
    first, second = (server.complete(prompt, max_tokens=2) for _ in range(2))
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


def test_penalties_and_biases_have_effect(server):
    plain = server.complete("abc", max_tokens=8, return_token_ids=True)["choices"][0]["token_ids"]
    biased = server.complete("abc", max_tokens=8, return_token_ids=True, logit_bias={"65": 100})
    assert biased["choices"][0]["token_ids"] == [65] * 8
    banned = server.complete("abc", max_tokens=8, return_token_ids=True, logit_bias={str(plain[0]): -100})
    assert banned["choices"][0]["token_ids"][0] != plain[0]
    never = server.complete("abc", max_tokens=30, min_tokens=30, logit_bias={"257": 100})
    assert never["usage"]["completion_tokens"] == 30
    penalized = server.complete("abc", max_tokens=8, return_token_ids=True, logit_bias={"65": 4}, presence_penalty=2)
    assert penalized["choices"][0]["token_ids"]


SHAPES = [
    ({"type": "json_object"}, None),
    (
        {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        },
        {"a"},
    ),
]


@pytest.mark.parametrize("shape, keys", SHAPES, ids=["object", "schema"])
def test_answers_have_the_shape_that_was_asked_for(server, shape, keys):
    choice = server.chat(response_format=shape, max_tokens=200, temperature=1, seed=3)["choices"][0]
    if choice["finish_reason"] == "stop":
        parsed = json.loads(choice["message"]["content"])
        assert isinstance(parsed, dict) and (keys is None or set(parsed) == keys)
    else:
        assert choice["message"]["content"].startswith("{")


def test_a_choice(server):
    for seed in range(3):
        choice = server.complete(guided_choice=["yes", "no"], temperature=1, seed=seed)["choices"][0]
        assert choice["text"] in ("yes", "no") and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_are_required_come(server, stream):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("add", "mul")]
    body = {"messages": [{"role": "user", "content": "1"}], "tools": tools, "temperature": 1, "seed": 1}
    forced = {"type": "function", "function": {"name": "mul"}}
    if stream:
        chunks = server.chunks("/v1/chat/completions", body | {"tool_choice": forced, "parallel_tool_calls": False})
        parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", ())]
        name, arguments = parts[0]["function"]["name"], "".join(part["function"]["arguments"] for part in parts)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = server.chat(**body, tool_choice=forced, parallel_tool_calls=False)["choices"]
        ((call,), finish) = choice["message"]["tool_calls"], choice["finish_reason"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
    assert (name, finish) == ("mul", "tool_calls") and json.loads(arguments)["n"] in (1, 2)
