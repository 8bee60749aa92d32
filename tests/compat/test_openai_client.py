"""The official client of OpenAI."""

import asyncio
import json
import math
import re

import pytest

from tests.compat.conftest import MODEL

openai = pytest.importorskip("openai", reason="openai is not installed: scripts/compat installs it")
pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": MODEL, "temperature": 0, "max_completion_tokens": 24}
CONTINENTS = ["Africa", "Asia", "Europe"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


class City(pydantic.BaseModel):
    """What is asked for in the shape of JSON."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=20)
    capital: bool
    continent: str = pydantic.Field(json_schema_extra={"enum": CONTINENTS})


class GetWeather(pydantic.BaseModel):
    """The weather of a city."""

    city: str = pydantic.Field(max_length=20)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=300) as made:
        yield made


@pytest.fixture(scope="module")
def said(client):
    """The greedy answer to FRANCE."""
    return client.chat.completions.create(messages=FRANCE, **GREEDY).choices[0].message.content


# Models and chats -----------------------------------------------------------------------------------------------------


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such-model")
    assert caught.value.code == "model_not_found"


def test_a_chat(client, said):
    answer = client.chat.completions.create(messages=FRANCE, **GREEDY)
    assert answer.choices[0].message.content == said and "Paris" in said
    assert answer.choices[0].message.role == "assistant" and answer.model == MODEL
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 24


def test_a_streamed_chat(client, said):
    options = {"include_usage": True}
    with client.chat.completions.create(messages=FRANCE, stream=True, stream_options=options, **GREEDY) as stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage.completion_tokens > 1
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_several_at_once_through_the_asynchronous_client(url, said):
    async def ask(client):
        stream = await client.chat.completions.create(messages=FRANCE, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(ask(client) for _ in range(4)))

    assert asyncio.run(all_of_them()) == [said] * 4


def test_a_stream_that_is_left_ends_in_the_server(client, server):
    body = GREEDY | {"max_completion_tokens": 900, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(messages=FRANCE, stream=True, **body) as stream:
        next(iter(stream))
    client.chat.completions.create(messages=FRANCE, **GREEDY)  # answered beside or after it
    assert server.metrics()["jaxserve:num_requests_running"] == 0


def test_several_choices_with_log_probabilities(client):
    options = GREEDY | {"temperature": 0.8, "max_completion_tokens": 6}
    answer = client.chat.completions.create(messages=FRANCE, n=2, seed=3, logprobs=True, top_logprobs=2, **options)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert bytes(byte for token in tokens for byte in token.bytes).decode().startswith(choice.message.content)
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    again = client.chat.completions.create(messages=FRANCE, n=2, seed=3, logprobs=True, top_logprobs=2, **options)
    assert [choice.message for choice in again.choices] == [choice.message for choice in answer.choices]


def test_stop_and_lengths(client, said):
    word = said.split()[2]
    answer = client.chat.completions.create(messages=FRANCE, stop=[word], **GREEDY).choices[0]
    assert answer.finish_reason == "stop"
    assert said.startswith(answer.message.content) and word not in answer.message.content
    short = client.chat.completions.create(messages=FRANCE, **(GREEDY | {"max_completion_tokens": 2}))
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 2


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=FRANCE, **(GREEDY | {"temperature": 3}))
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(messages=FRANCE, **(GREEDY | {"model": "gpt-4o"}))
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[{"role": "user", "content": "word " * 5000}], **GREEDY)
    assert caught.value.param == "messages" and "tokens" in caught.value.message


# Tools ----------------------------------------------------------------------------------------------------------------


def check_weather(call):
    assert call.type == "function" and call.id and call.function.name == "get_weather"
    given = json.loads(call.function.arguments)
    assert given.keys() == {"city", "unit"} and len(given["city"]) <= 20 and given["unit"] in ("C", "F")


def test_a_required_call(client):
    options = GREEDY | {"max_completion_tokens": 200}
    answer = client.chat.completions.create(
        messages=FRANCE, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **options
    ).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls
    check_weather(call)


def test_a_named_call(client):
    options = GREEDY | {"max_completion_tokens": 200}
    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        messages=FRANCE, tools=[TIME, WEATHER], tool_choice=named, parallel_tool_calls=False, **options
    ).choices[0]
    check_weather(answer.message.tool_calls[0])


def test_a_streamed_call(client):
    options = GREEDY | {"max_completion_tokens": 200}
    request = {"messages": FRANCE, "tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    with client.chat.completions.stream(**request, **options) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    (call,) = message.tool_calls
    check_weather(call)


def test_a_call_and_what_it_gave(client):
    """The answer after a tool's result; and no call where none is allowed."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:30"},
    ]
    answer = client.chat.completions.create(messages=messages, tools=[TIME], tool_choice="none", **GREEDY).choices[0]
    assert answer.message.content and not answer.message.tool_calls


def test_parsed_calls(client):
    tools = [openai.pydantic_function_tool(GetWeather)]
    answer = client.chat.completions.parse(
        messages=FRANCE,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        **(GREEDY | {"max_completion_tokens": 200}),
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather)


# Shapes ---------------------------------------------------------------------------------------------------------------


def test_parsed_answers(client):
    options = GREEDY | {"max_completion_tokens": 200}
    city = client.chat.completions.parse(messages=FRANCE, response_format=City, **options).choices[0].message.parsed
    assert isinstance(city, City) and city.continent in CONTINENTS
    with client.chat.completions.stream(messages=FRANCE, response_format=City, **options) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == city


def test_json_objects_and_regular_expressions(client):
    options = GREEDY | {"max_completion_tokens": 300, "extra_body": {"guided_regex": "[0-9]{3}-[a-f]{2}"}}
    answer = client.chat.completions.create(messages=FRANCE, **options).choices[0]
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", answer.message.content) and answer.finish_reason == "stop"
    options = GREEDY | {"max_completion_tokens": 60, "response_format": {"type": "json_object"}}
    answer = client.chat.completions.create(messages=FRANCE, **options).choices[0]
    assert answer.message.content.lstrip().startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


# Completions and embeddings -------------------------------------------------------------------------------------------


def test_completions(client):
    greedy = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    one = client.completions.create(prompt="The capital of France is", **greedy)
    assert one.choices[0].text.startswith(" Paris") and one.choices[0].finish_reason == "length"
    many = client.completions.create(prompt=["The capital of France is", "One, two, three,"], n=1, **greedy)
    assert many.choices[0].text == one.choices[0].text and many.choices[1].text.startswith(" four")
    with client.completions.create(prompt="The capital of France is", stream=True, **greedy) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text


def test_echo_with_log_probabilities(client):
    prompt, options = "The capital of France is Paris", {"model": MODEL, "logprobs": 2, "echo": True, "temperature": 0}
    answer = client.completions.create(prompt=prompt, max_tokens=1, **options).choices[0]
    told = answer.logprobs
    assert answer.text.startswith(prompt) and "".join(told.tokens) == answer.text
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(value <= 0 for value in told.token_logprobs[1:]) and told.text_offset[0] == 0
    alone = client.completions.create(prompt=prompt, max_tokens=0, **options).choices[0]
    assert alone.text == prompt and alone.logprobs.token_logprobs[1:] == told.token_logprobs[1:-1]


def test_token_ids_are_prompts(client, server):
    prompt, options = "The capital of France is", {"model": MODEL, "max_tokens": 4, "temperature": 0}
    ids = client.post(f"{server.url}/tokenize", cast_to=object, body={"prompt": prompt})["tokens"]
    texts = [client.completions.create(prompt=given, **options).choices[0].text for given in (prompt, ids, [ids])]
    assert len(set(texts)) == 1


def test_embeddings(client):
    texts = ["A dog barks.", "The puppy is barking.", "Interest rates rose by two percent."]
    coded = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64 and decodes it
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    dog, puppy, money = vectors = [row.embedding for row in plain.data]
    for vector, same in zip(vectors, coded.data, strict=True):
        assert vector == pytest.approx(same.embedding, abs=1e-6)
        assert math.fsum(x * x for x in vector) == pytest.approx(1, abs=1e-5)
    assert math.sumprod(dog, puppy) > math.sumprod(dog, money)
    short = client.embeddings.create(model=MODEL, input=texts[0], dimensions=16).data[0].embedding
    assert len(short) == 16 and plain.usage.prompt_tokens > 10


# Responses ------------------------------------------------------------------------------------------------------------


def test_responses(client, said):
    options = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    made = client.responses.create(input="What is the capital of France?", **options)
    assert made.output_text == said and made.status in ("completed", "incomplete")
    assert client.responses.retrieve(made.id).output_text == said
    with client.responses.stream(input="What is the capital of France?", **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == said
    more = client.responses.create(input="And of Spain?", previous_response_id=made.id, **options)
    assert more.usage.input_tokens > made.usage.total_tokens
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_shapes_and_calls_of_responses(client):
    options = {"model": MODEL, "temperature": 0, "max_output_tokens": 200, "input": "Tell me about Paris."}
    assert isinstance(client.responses.parse(text_format=City, **options).output_parsed, City)
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    made = client.responses.create(tools=[tool], tool_choice="required", parallel_tool_calls=False, **options)
    (call,) = made.output
    assert call.type == "function_call" and json.loads(call.arguments).keys() == {"city", "unit"}
