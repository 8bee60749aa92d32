"""Tool calls and reasoning through the whole server, with models that say what a script says."""

import json
import re

import pytest

from jaxserve.serve import schemas
from jaxserve.text.tools.rules import FURTHER
from tests.serve.live import live
from tests.serve.local import MODEL, exact, serving

openai = pytest.importorskip("openai", reason="the extra compat is not installed")
CHAT = "/v1/chat/completions"


def function(name, **more):
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters} | more}


TOOLS = [function("add"), function("mul")]
ONE = '<tool_call>\n{"name": "mul", "arguments": {"a": 3, "b": "é"}}\n</tool_call>'
TWO = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n' + ONE


def asking(**body):
    return {"messages": [{"role": "user", "content": "3 + 5?"}], "tools": TOOLS} | body


def saying(text, delay=0.0, **service):
    given = {"tool_format": "hermes"} | service
    return serving(say=lambda _: text, service=given, session_len=4096, delay=delay)


def joined(chunks):
    """The message that the chunks of one choice make."""
    message, calls = {}, {}
    for chunk in chunks:
        exact(chunk, schemas.ChatChunk)
        (choice,) = chunk["choices"]
        for name, value in choice["delta"].items():
            if name != "tool_calls":
                message[name] = message.get(name, "") + value
                continue
            for part in value:
                if "id" in part:
                    assert part["index"] == len(calls) and part["type"] == "function"
                    calls[part["index"]] = {"id": part["id"], "name": part["function"]["name"], "arguments": ""}
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return message, list(calls.values()), chunks[-1]["choices"][0]["finish_reason"]


def test_calls():
    with saying(TWO) as server:
        status, answer = server.post(CHAT, asking())
        assert status == 200
        exact(answer, schemas.Chat)
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me see.", "tool_calls")
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["add", "mul"]
        assert json.loads(calls[1]["function"]["arguments"]) == {"a": 3, "b": "é"}
        assert len({call["id"] for call in calls}) == 2 and calls[0]["id"].startswith("call_")
        message, streamed, finish = joined(server.chunks(CHAT, asking()))
        assert (message["role"], message["content"], finish) == ("assistant", "Let me see.", "tool_calls")
        assert [(call["name"], call["arguments"]) for call in streamed] == [
            (call["function"]["name"], call["function"]["arguments"]) for call in calls
        ]


def test_arguments_come_as_they_are_written():
    with saying(ONE, delay=0.01) as server:  # what is there when the reader comes is one chunk
        chunks = server.chunks(CHAT, asking())
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    first, *others = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert first["function"] == {"name": "mul", "arguments": ""} and first["id"]
    assert len(others) > 5 and all(set(part) == {"index", "function"} for part in others)


def test_choices_of_n_answers_have_their_own_calls():
    with saying(ONE) as server:
        answer = server.post(CHAT, asking(n=3))[1]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 3


def test_no_tools_no_calls():
    with saying(ONE) as server:
        for body in (asking(tool_choice="none"), asking(tools=None), asking(tools=[])):
            (choice,) = server.post(CHAT, body)[1]["choices"]
            assert choice["message"]["content"] == ONE and choice["finish_reason"] == "stop"


def test_required_calls_are_enforced_by_a_grammar():
    with saying(ONE) as server:
        for choice, shown in (
            ("required", {"add", "mul"}),
            ({"type": "function", "function": {"name": "mul"}}, {"mul"}),
            ("auto", None),
        ):
            server.post(CHAT, asking(tool_choice=choice))
            grammar = server.engine.submitted[-1].grammar
            assert (grammar and {name for name in ("add", "mul") if f"{name}\\" in grammar}) == shown
            assert grammar is None or (FURTHER in grammar) == (choice == "required")
        server.post(CHAT, asking(tools=[function("add", strict=True)]))
        assert server.engine.submitted[-1].grammar


def test_a_tool_that_cannot_be_enforced():
    bad = function("add", parameters={"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}})
    with saying(ONE) as server:
        assert server.refused(CHAT, asking(tools=[bad], tool_choice="required"))[:2] == (400, "tools")


def test_a_model_whose_format_is_not_known():
    with serving() as server:
        status, param, message = server.refused(CHAT, asking())
        assert (status, param) == (400, "tools") and "--tool-call-parser" in message
        assert server.post(CHAT, asking(tool_choice="none"))[0] == 200


# Reasoning. -----------------------------------------------------------------------------------------------------------

THOUGHT = "<think>\nHm, well.\n</think>\n\nIt is 8."


def test_reasoning():
    with saying(THOUGHT, reasoning_format="qwen3") as server:
        answer = server.chat()
        exact(answer, schemas.Chat)
        message = answer["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("It is 8.", "Hm, well.")
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("Hm, well.")}
        body = {"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": True}}
        *chunks, last = server.chunks(CHAT, body)
        message, _, _ = joined(chunks)
        assert message == {"role": "assistant", "content": "It is 8.", "reasoning_content": "Hm, well."}
        assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("Hm, well.")}
        (text,) = server.complete("x", max_tokens=100)["choices"]
        assert text["text"] == THOUGHT  # completions are what the model wrote


def test_reasoning_then_a_call():
    with saying(THOUGHT.replace("It is 8.", ONE), reasoning_format="think") as server:
        message, calls, finish = joined(server.chunks(CHAT, asking()))
        assert message["reasoning_content"] == "Hm, well." and message["content"] == ""
        assert calls[0]["name"] == "mul" and finish == "tool_calls"


def test_a_grammar_lets_a_model_think_first():
    with saying(THOUGHT, reasoning_format="think") as server:
        server.chat(response_format={"type": "json_object"})
        assert "<think>" in server.engine.submitted[-1].grammar
        server.complete("x", response_format={"type": "json_object"})
        assert "<think>" not in server.engine.submitted[-1].grammar


# The course. ----------------------------------------------------------------------------------------------------------


def calculator(prompt):
    """InternLM2.5 in the course: adds first, then multiplies what the plugin said."""
    if found := re.search(r"environment name=<\|plugin\|>\n3\+5=(\d+)<", prompt):
        call = {"name": "mul", "parameters": {"a": int(found[1]), "b": 2}}
    else:
        call = {"name": "add", "parameters": {"a": 3, "b": 5}}
    return f"<|action_start|><|plugin|>\n{json.dumps(call)}<|action_end|>"


def test_the_script_of_the_course():
    """Function calling as the course has it: no flag at the server, the type 'int', the role 'environment'."""

    def schema(name, text):
        number = {"type": "int", "description": "A number"}
        parameters = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
        return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}

    def add(a: int, b: int):
        return a + b

    def mul(a: int, b: int):
        return a * b

    tools = [schema("add", "Compute the sum of two numbers"), schema("mul", "Calculate the product of two numbers")]
    messages = [{"role": "user", "content": "Compute (3+5)*2"}]
    settings = {"say": calculator, "template": "internlm2", "session_len": 8192}
    with (
        live(service={"tool_format": "internlm2"}, **settings) as (_, url),
        openai.OpenAI(api_key="YOUR_API_KEY", base_url=f"{url}/v1") as client,
    ):
        model = client.models.list().data[0].id
        common = {"model": model, "temperature": 0.8, "top_p": 0.8, "stream": False, "tools": tools}
        response = client.chat.completions.create(messages=messages, **common)
        first = response.choices[0].message.tool_calls[0]
        assert response.choices[0].finish_reason == "tool_calls" and response.choices[0].message.content == ""
        assert (first.id, first.function.name) == ("0", "add")
        result = eval(f"{first.function.name}(**{first.function.arguments})", {"add": add})
        assert result == 8
        messages.append({"role": "assistant", "content": response.choices[0].message.content})
        messages.append({"role": "environment", "content": f"3+5={result}", "name": "plugin"})
        response = client.chat.completions.create(messages=messages, **common)
        second = response.choices[0].message.tool_calls[0]
        assert (second.id, second.function.name) == ("1", "mul")
        assert eval(f"{second.function.name}(**{second.function.arguments})", {"mul": mul}) == 16


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_sends_calls_and_results(stream):
    def say(prompt):
        return "It is 15." if "15" in prompt else ONE.replace('"é"', "5")

    with (
        live(say=say, service={"tool_format": "hermes"}, session_len=4096) as (_, url),
        openai.OpenAI(api_key="-", base_url=f"{url}/v1") as client,
    ):
        messages = [{"role": "user", "content": "3 * 5?"}]
        if stream:
            with client.chat.completions.stream(model=MODEL, messages=messages, tools=TOOLS) as events:
                kinds = {event.type for event in events}
                message = events.get_final_completion().choices[0].message
            assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        else:
            message = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments) == {"a": 3, "b": 5}
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "15"}]
        answer = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
        assert answer.choices[0].message.content == "It is 15."
