"""LangChain's ChatOpenAI."""

import asyncio

import pytest

from tests.compat.conftest import MODEL

pydantic = pytest.importorskip("pydantic", reason="pydantic is not installed")
pytest.importorskip("langchain_openai", reason="langchain-openai is not installed: scripts/compat installs it")

QUESTION = "What is the capital of France?"


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    capital: bool


@pytest.fixture
def chat(url, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url, api_key="-", model=MODEL, temperature=0, max_tokens=60, max_retries=0, timeout=300)


def test_a_chat(chat):
    answer = chat.invoke([("system", "You are a helpful AI assistant named SmolLM."), ("human", QUESTION)])
    assert "Paris" in answer.content and answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["output_tokens"] > 0


def test_a_stream(chat):
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 3
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.content == chat.invoke(QUESTION).content
    assert whole.usage_metadata["total_tokens"] > whole.usage_metadata["output_tokens"] > 0


def test_several_at_once(chat):
    async def stream():
        try:
            return "".join([chunk.content async for chunk in chat.astream(QUESTION)])
        finally:
            await chat.root_async_client.close()  # else its connections stay open, and Python warns of them

    expected = chat.invoke(QUESTION).content
    assert [answer.content for answer in chat.batch([QUESTION] * 3)] == [expected] * 3
    assert asyncio.run(stream()) == expected


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    shaped = chat.with_structured_output(City, method=method, include_raw=True).invoke("Tell me about Paris.")
    assert shaped["parsing_error"] is None and isinstance(shaped["parsed"], City)


def test_calls(chat):
    bound = chat.bind_tools([City], tool_choice="required", parallel_tool_calls=False)
    (call,) = bound.invoke("Tell me about Paris.").tool_calls
    assert call["name"] == "City" and call["args"].keys() == {"name", "capital"} and call["id"]
    whole = None
    for chunk in bound.stream("Tell me about Paris."):
        whole = chunk if whole is None else whole + chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [("City", call["args"])]


def test_the_responses_api(chat):
    answer = chat.model_copy(update={"use_responses_api": True}).invoke(QUESTION)
    assert "Paris" in answer.text
