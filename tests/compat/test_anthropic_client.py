"""The official client of Anthropic."""

import pytest

from tests.compat.conftest import MODEL

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: scripts/compat installs it")

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0}}  # the client has no such parameter
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=300) as made:
        yield made


def test_a_message(client):
    answer = client.messages.create(messages=FRANCE, **GREEDY)
    (block,) = answer.content
    assert block.type == "text" and "Paris" in block.text
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.role == "assistant"
    assert 0 < answer.usage.output_tokens <= 24


def test_a_streamed_message(client):
    whole = client.messages.create(messages=FRANCE, system="You are brief.", **GREEDY)
    with client.messages.stream(messages=FRANCE, system="You are brief.", **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_stop_sequences(client):
    text = client.messages.create(messages=FRANCE, **GREEDY).content[0].text
    word = text.split()[2]
    answer = client.messages.create(messages=FRANCE, stop_sequences=[word], **GREEDY)
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == word
    assert word not in answer.content[0].text


def test_calls(client):
    options = GREEDY | {"max_tokens": 200}
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        choice["disable_parallel_tool_use"] = True
        answer = client.messages.create(messages=FRANCE, tools=[WEATHER], tool_choice=choice, **options)
        assert answer.stop_reason == "tool_use"
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        assert call.name == "get_weather" and call.input.keys() == {"city"}
    with client.messages.stream(messages=FRANCE, tools=[WEATHER], tool_choice=choice, **options) as stream:
        streamed = stream.get_final_message().content[-1]
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 20 degrees."}
    messages = [*FRANCE, {"role": "assistant", "content": [call.to_dict()]}, {"role": "user", "content": [result]}]
    assert client.messages.create(messages=messages, tools=[WEATHER], tool_choice={"type": "none"}, **GREEDY).content


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model=MODEL, messages=FRANCE, system="You are brief.").input_tokens
    usage = client.messages.create(messages=FRANCE, system="You are brief.", **GREEDY).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(messages=FRANCE, **(GREEDY | {"model": "claude-opus-4"}))
    with pytest.raises(anthropic.BadRequestError, match="top_k"):
        client.messages.create(messages=FRANCE, **(GREEDY | {"extra_body": {"top_k": -1}}))
