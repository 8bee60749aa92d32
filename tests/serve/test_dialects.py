"""Bodies of other APIs become chat bodies, and answers become theirs: without Flask, without an engine."""

from types import SimpleNamespace

import pytest

from jaxserve import bodies
from jaxserve.bodies import ParamError
from jaxserve.serve import anthropic_answer, anthropic_body, responses_answer, responses_body


def call(index, arguments, id=None, name=None):
    return SimpleNamespace(index=index, id=id, name=name, arguments=arguments)


# Anthropic's requests. ------------------------------------------------------------------------------------------------


def anthropic(**body):
    given = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]} | body
    return anthropic_body.chat(bodies.convert(given, anthropic_body.CreateMessage))


def test_a_message():
    assert anthropic(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x"], metadata={"user_id": "u"}) == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["x"],
    }


def messages(*given, **body):
    return anthropic(messages=list(given), **body)["messages"]


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def test_a_system_text_and_blocks():
    for system in ("be kind", [text("x-anthropic-billing-header: v=1"), text("be", cache_control={}), text("kind")]):
        made = messages(user(text("a"), text("b")), system=system)
        assert made[0] == {"role": "system", "content": "be kind" if isinstance(system, str) else "be\nkind"}
        assert made[1:] == [{"role": "user", "content": "a\nb"}]
    assert messages(user(text("a")), system=[]) == [{"role": "user", "content": "a"}]


def test_calls_and_results():
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 3}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [text("8"), text("!")]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no file", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
    ]
    thought = {"type": "thinking", "thinking": "3+5", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "?"}
    assert messages(
        user(text("go")),
        {"role": "assistant", "content": [thought, hidden, text("I add"), use]},
        user(*results, text("and?")),
    )[1:] == [
        {
            "role": "assistant",
            "content": "I add",
            "reasoning_content": "3+5",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "add", "arguments": '{"a":3}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "8\n!"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no file"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "and?"},
    ]


def test_documents_are_texts():
    plain = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    blocks = {"type": "document", "source": {"type": "content", "content": [text("E"), text("F")]}}
    found = {"type": "search_result", "title": "W", "source": "http://w", "content": [text("G")]}
    later = {"type": "mid_conv_system", "content": [text("now be brief")]}
    assert messages(user(plain, blocks, found, later, text("?"))) == [
        {"role": "user", "content": "T\nD\nE\nF\nW\nhttp://w\nG"},
        {"role": "system", "content": "now be brief"},
        {"role": "user", "content": "?"},
    ]


TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}


@pytest.mark.parametrize(
    "choice, expected",
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any"}, {"tool_choice": "required"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "add"}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
    ],
)
def test_tools(choice, expected):
    made = anthropic(tools=[TOOL], tool_choice=choice)
    function = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    assert made.pop("tools") == [{"type": "function", "function": function}]
    assert {name: made[name] for name in made if name not in ("model", "messages", "max_tokens")} == expected


def test_thinking_and_the_form_of_the_answer():
    assert anthropic(thinking={"type": "enabled", "budget_tokens": 2000})["chat_template_kwargs"] == {
        "enable_thinking": True
    }
    assert anthropic(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in anthropic(thinking={"type": "adaptive"})
    schema = {"type": "object"}
    made = anthropic(output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"})
    assert made["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    "body, param",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [user({"type": "video"})]}, "messages[0].content[0].type"),
        ({"messages": [user(IMAGE)]}, "messages.0.content.0"),
        ({"messages": [user({"type": "document", "source": {"type": "url"}})]}, "messages.0.content.0.source"),
        ({"messages": [user({"type": "thinking", "thinking": "?"})]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages.0.content.0"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"name": "a"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "web_search", "type": "web_search_20250305"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"system": 3}, "system"),
    ],
)
def test_what_anthropic_bodies_cannot_be(body, param):
    with pytest.raises(ParamError) as caught:
        anthropic(**body)
    assert caught.value.param == param
    assert param.partition("[")[0] in str(caught.value)


def test_a_missing_max_tokens():
    with pytest.raises(ParamError, match="max_tokens is missing"):
        bodies.convert({"model": "m", "messages": [{"role": "user", "content": "x"}]}, anthropic_body.CreateMessage)


# Anthropic's answers. -------------------------------------------------------------------------------------------------


def anthropic_events(deltas, **options):
    events = anthropic_answer.Events(**options)
    return [event for delta in deltas for event in events.feed(*delta)] + list(events.close())


def test_events_of_a_message():
    start = {"type": "tool_use", "id": "t1", "name": "add", "input": {}, "caller": {"type": "direct"}}
    made = anthropic_events(
        [
            ("hm", "", []),
            ("!", "", []),
            ("", "I ", []),
            ("", "add", []),
            ("", "", [call(0, "", "t1", "add")]),
            ("", "", [call(0, '{"a":')]),
            ("", "", [call(0, "3}"), call(1, "{}", "t1", "add")]),
        ]
    )
    assert [(event["type"].removeprefix("content_block_"), event["index"]) for event in made] == [
        *[("start", 0), ("delta", 0), ("delta", 0), ("delta", 0), ("stop", 0)],
        *[("start", 1), ("delta", 1), ("delta", 1), ("stop", 1)],
        *[("start", 2), ("delta", 2), ("delta", 2), ("stop", 2)],
        *[("start", 3), ("delta", 3), ("stop", 3)],
    ]
    deltas = [event["delta"] for event in made if "delta" in event]
    assert deltas[:2] == [{"type": "thinking_delta", "thinking": "hm"}, {"type": "thinking_delta", "thinking": "!"}]
    assert deltas[2] == {"type": "signature_delta", "signature": anthropic_answer.signature("hm!")}
    assert deltas[3] == {"type": "text_delta", "text": "I "}
    assert deltas[5:] == [{"type": "input_json_delta", "partial_json": part} for part in ('{"a":', "3}", "{}")]
    blocks = [event["content_block"] for event in made if "content_block" in event]
    assert blocks[2] == start and blocks[3]["id"] != "t1"


def test_hidden_thinking():
    made = anthropic_events([("secret", "", []), ("", "hi", [])], shown=False)
    assert "secret" not in str(made) and made[1]["delta"]["type"] == "signature_delta"
    assert anthropic_answer.content("secret", "hi", [], shown=False)[0]["thinking"] == ""


def test_whole_content():
    made = anthropic_answer.content("hm", "hi", [call(0, '{"a": 3}', "t", "add"), call(1, '{"a', "t", "mul")])
    assert [block["type"] for block in made] == ["thinking", "text", "tool_use", "tool_use"]
    assert (made[2]["input"], made[3]["input"]) == ({"a": 3}, {}) and made[2]["id"] != made[3]["id"]
    assert anthropic_answer.content("", "", []) == []


@pytest.mark.parametrize(
    "finish, by, completion, expected",
    [
        ("stop", None, 3, ("end_turn", None)),
        ("stop", "END", 3, ("stop_sequence", "END")),
        ("length", None, 9, ("max_tokens", None)),
        ("length", None, 8, ("model_context_window_exceeded", None)),
        ("tool_calls", None, 3, ("tool_use", None)),
    ],
)
def test_stop_reasons(finish, by, completion, expected):
    assert anthropic_answer.stop_reason(finish, by, completion, 9) == expected


# Requests of the Responses API. ---------------------------------------------------------------------------------------


def create(**body):
    return bodies.convert({"model": "m", "input": "hi"} | body, responses_body.CreateResponse)


def responses(earlier=(), **body):
    return responses_body.chat(create(**body), list(earlier))


def test_a_text_with_instructions():
    assert responses(
        instructions="be kind", max_output_tokens=7, temperature=0, top_k=3, parallel_tool_calls=False
    ) == {
        "model": "m",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_k": 3,
        "parallel_tool_calls": False,
    }


def test_items():
    given = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "3+5?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I add", "annotations": []}],
        },
        {"type": "function_call", "id": "f", "call_id": "c1", "name": "add", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "mul", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "8"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "15"}]},
        {"type": "message", "role": "assistant", "phase": "commentary", "content": "a"},
        {"type": "message", "role": "assistant", "phase": "final_answer", "content": "b"},
        {"role": "user", "content": "more"},
    ]
    functions = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id, name in (("c1", "add"), ("c2", "mul"))
    ]
    expected = [
        {"role": "user", "content": "3+5?"},
        {"role": "assistant", "content": "I add", "reasoning_content": "hm", "tool_calls": functions},
        {"role": "tool", "tool_call_id": "c1", "content": "8"},
        {"role": "tool", "tool_call_id": "c2", "content": "15"},
        {"role": "assistant", "content": "a\n\nb"},
        {"role": "user", "content": "more"},
    ]
    assert responses(input=given)["messages"] == [{"role": "system", "content": "be kind"}, *expected]
    assert responses(input=given, instructions="be brief")["messages"][0]["content"] == "be brief\n\nbe kind"
    earlier = [{"role": "user", "content": "before"}]
    assert responses(earlier)["messages"] == [*earlier, {"role": "user", "content": "hi"}]


FUNCTION = {"type": "function", "name": "add", "description": "adds", "parameters": {"type": "object"}, "strict": True}


def test_functions_and_what_they_may_be():
    declared = {name: FUNCTION[name] for name in ("name", "description", "parameters", "strict")}
    other = {"type": "web_search"}
    made = responses(tools=[FUNCTION, other], tool_choice={"type": "function", "name": "add"})
    assert made["tools"] == [{"type": "function", "function": declared}]
    assert made["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert "tools" not in responses(tools=[other])
    assert responses(tools=[FUNCTION], tool_choice="required")["tool_choice"] == "required"
    second = FUNCTION | {"name": "mul"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "mul"}]}
    made = responses(tools=[FUNCTION, second], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in made["tools"]] == ["mul"] and made["tool_choice"] == "required"


def test_forms_of_the_answer():
    schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert responses(text={"format": schema})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
    }
    assert responses(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    assert responses(include=["message.output_text.logprobs"])["logprobs"] is True
    assert responses(top_logprobs=2)["top_logprobs"] == 2
    assert responses(reasoning={"effort": "none"})["reasoning_effort"] == "none"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": {"type": "function", "name": "none such"}}, "tool_choice"),
        ({"tool_choice": "robot"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "haiku"}}}, "text.format.type"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"truncation": "some"}, "truncation"),
        ({"previous_response_id": ""}, "previous_response_id"),
    ],
)
def test_what_responses_bodies_cannot_be(body, param):
    with pytest.raises(ParamError) as caught:
        responses(**body)
    assert caught.value.param == param


# Answers of the Responses API. ----------------------------------------------------------------------------------------


def written(deltas, finish="stop", **body):
    resource = responses_answer.resource("resp_1", 5, "m", create(**body), 1.0, 1.0)
    writer = responses_answer.Writer(resource)
    events = list(writer.begin())
    for delta in deltas:
        events += writer.feed(*delta)
    events += writer.end(finish, responses_answer.usage(3, 1, 2), 7)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_events_of_a_response():
    events = written(
        [
            ("hm", "", []),
            ("", "I ", []),
            ("", "add", []),
            ("", "", [call(0, "", "c1", "add")]),
            ("", "", [call(0, '{"a":'), call(0, "3}")]),
            ("", "", [call(1, "{}", "c1", "mul")]),
        ],
        "tool_calls",
    )
    assert [event["type"].removeprefix("response.") for event in events] == [
        *["created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"],
        *["reasoning_text.done", "content_part.done", "output_item.done", "output_item.added", "content_part.added"],
        *["output_text.delta", "output_text.delta", "output_text.done", "content_part.done", "output_item.done"],
        *["output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"],
        *["function_call_arguments.done", "output_item.done", "output_item.added", "function_call_arguments.delta"],
        *["function_call_arguments.done", "output_item.done", "completed"],
    ]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert events[2]["item"]["content"] == [] and events[3]["part"] == {"type": "reasoning_text", "text": ""}
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert {item["status"] for item in final["output"]} == {"completed"}
    assert final["output"][1]["content"][0]["text"] == "I add" and final["output"][2]["arguments"] == '{"a":3}'
    assert len({item["call_id"] for item in final["output"][2:]}) == 2
    assert (final["status"], final["completed_at"], final["usage"]["total_tokens"]) == ("completed", 7, 5)
    told = responses_body.items(final["output"])
    assert [message["role"] for message in told] == ["assistant"] and len(told[0]["tool_calls"]) == 2


def test_ends_of_a_response():
    cut = written([("", "hal", [])], "length")[-1]
    assert cut["type"] == "response.incomplete" and cut["response"]["output"][0]["status"] == "incomplete"
    assert cut["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    empty = written([])[-1]["response"]
    assert empty["output"][0]["content"][0]["text"] == ""
    assert written([], "error")[-1]["type"] == "response.failed"
    assert written([], "abort")[-1]["response"]["status"] == "cancelled"


def test_log_probabilities_of_a_response():
    row = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    events = written([("", "a", [], [row]), ("", "", [], [row])])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [delta["logprobs"] for delta in deltas] == [[row], [row]]
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == [row, row]


def test_a_response_repeats_what_was_asked():
    schema = {"type": "json_schema", "name": "n", "schema": {}}
    made = written([], tools=[FUNCTION, {"type": "web_search"}], text={"format": schema}, metadata={"a": "b"})[-1]
    found = made["response"]
    assert found["tools"] == [FUNCTION] and found["metadata"] == {"a": "b"} and found["store"] is True
    assert found["text"]["format"] == schema | {"strict": False, "description": None}


def test_events_fit_the_published_schema():
    pytest.importorskip("llm_comply", reason="llm-comply is not installed")
    import importlib.resources
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from llm_comply.schema import SpecLoader

        spec = SpecLoader(str(importlib.resources.files("llm_comply") / "specs" / "openresponses.json"))
        deltas = [("", "I add", []), ("", "", [call(0, "{}", "c1", "add")])]
        for event in written(deltas, "length", tools=[FUNCTION], top_logprobs=1):
            assert not spec.validate_sse_event(event["type"], event), event["type"]
