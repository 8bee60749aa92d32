"""The official client of OpenAI against a server behind a socket."""

import pytest

openai = pytest.importorskip("openai", reason="the extra compat is not installed")
pydantic = pytest.importorskip("pydantic")

from tests.serve.live import live  # noqa: E402
from tests.serve.local import MODEL  # noqa: E402

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def address():
    with live(options={"api_keys": ["key"]}) as (_, url):
        yield f"{url}/v1"


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key="key", max_retries=0) as made:
        yield made


def test_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL] and listed[0].object == "model"
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_a_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("answer 1: hi", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat(client):
    options = {"include_usage": True}
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options=options) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "answer 1: hi"
    assert chunks[-1].usage.total_tokens == 19


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=HI, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta", "chunk"} <= kinds
    assert len(final.choices[0].logprobs.content) == 12 + len(" (seed )") + len(
        str(int(final.choices[0].message.content.split()[-1][:-1]))
    )


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt=["ab", "cd"], max_tokens=50, n=2)
    assert [choice.text for choice in answer.choices] == ["answer 0: ab"] * 2 + ["answer 0: cd"] * 2
    with client.completions.create(
        model=MODEL, prompt="ab", max_tokens=3, logprobs=1, echo=True, stream=True
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abans"


def test_errors(client, address):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=3)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HI)
    with (
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
    failing = [{"role": "user", "content": "\x01"}]
    with pytest.raises(openai.InternalServerError, match="a step of the computation failed"):
        client.chat.completions.create(model=MODEL, messages=failing)
    with (
        pytest.raises(openai.APIError, match="a step of the computation failed"),
        client.chat.completions.create(model=MODEL, messages=failing, stream=True) as stream,
    ):
        list(stream)


def test_failures_of_the_server_are_not_tried_again(address):
    asked = []
    with live() as (server, url), openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        server.app.before_request(lambda: asked.append(1))
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=MODEL, prompt="\x01")
    assert len(asked) == 1


class Step(pydantic.BaseModel):
    explanation: str
    result: int


class Add(pydantic.BaseModel):
    """Adds two numbers."""

    a: int
    b: int


def test_parsed_answers():
    said = '{"explanation": "one and one", "result": 2}'
    with (
        live(say=lambda _: said) as (server, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Step)
        assert answer.choices[0].message.parsed == Step(explanation="one and one", result=2)
        assert "explanation" in server.engine.submitted[-1].grammar
        with client.chat.completions.stream(model=MODEL, messages=HI, response_format=Step) as stream:
            assert stream.get_final_completion().choices[0].message.parsed.result == 2


def test_parsed_calls():
    said = '<tool_call>\n{"name": "Add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    with (
        live(say=lambda _: said, service={"tool_format": "hermes"}, session_len=4096) as (server, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        tools = [openai.pydantic_function_tool(Add)]
        answer = client.chat.completions.parse(model=MODEL, messages=HI, tools=tools)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.parsed_arguments == Add(a=1, b=2)
        assert server.engine.submitted[-1].grammar  # the function is strict
