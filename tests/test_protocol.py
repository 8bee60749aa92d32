"""Bodies to Asks: every parameter has its effect or is named in the error, and no body does anything else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import protocol
from jaxserve.protocol import CHAT, COMPLETION, Ask, ParamError

MESSAGES = [{"role": "user", "content": "x"}]


def chat(**body):
    return Ask.parse(CHAT, {"messages": MESSAGES} | body)


def completion(**body):
    return Ask.parse(COMPLETION, {"prompt": "x"} | body)


def refused(url, body):
    """(parameter, message) of the error."""
    with pytest.raises(ParamError) as caught:
        Ask.parse(url, body)
    return caught.value.param, str(caught.value)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

BAD = [
    ("temperature", "hot", "temperature is a number from 0 to 2, not 'hot'"),
    ("temperature", -1, "not -1"),
    ("temperature", 2.1, "from 0 to 2"),
    ("temperature", True, "not True"),
    ("top_p", 0, "above 0 and up to 1"),
    ("top_p", 1.5, "1.5"),
    ("min_p", -1, "from 0 to 1"),
    ("top_k", -5, "-5"),
    ("top_k", 1.5, "whole number"),
    ("max_tokens", 0, "1 or more"),
    ("max_tokens", -1, "-1"),
    ("max_tokens", 1.5, "1.5"),
    ("max_tokens", "5", "'5'"),
    ("max_tokens", 10**30, "whole number"),
    ("max_completion_tokens", 0, "1 or more"),
    ("n", 0, "from 1 to 128, not 0"),
    ("n", -1, "-1"),
    ("n", 1_000_000, "1000000"),
    ("top_logprobs", 21, "from 0 to 20"),
    ("top_logprobs", 2, "needs logprobs"),
    ("logprobs", 5, "true or false"),
    ("logit_bias", {"a": 1}, "'a'"),
    ("logit_bias", {"-1": 1}, "'-1'"),
    ("logit_bias", {"1": 101}, "from -100 to 100"),
    ("logit_bias", {"1": "x"}, "numbers"),
    ("logit_bias", {str(id): 1 for id in range(301)}, "300 at most"),
    ("logit_bias", [], "an object"),
    ("stop", ["x"] * 10_000, "up to 32 texts"),
    ("stop", "", "1 to 1000 characters"),
    ("stop", ["a", ""], "1 to 1000 characters"),
    ("stop", "x" * 1_000_000, "1 to 1000 characters"),
    ("stop", 5, "not 5"),
    ("stop", [5], "found [5]"),
    ("stop_token_ids", [-1], "token ids"),
    ("stop_token_ids", [2**40], "token ids"),
    ("seed", 2**63, "64 bits"),
    ("seed", -(2**63) - 1, "64 bits"),
    ("seed", "x", "'x'"),
    ("presence_penalty", 3, "from -2 to 2"),
    ("frequency_penalty", -3, "from -2 to 2"),
    ("repetition_penalty", 1e-9, "0.01 to 100"),
    ("min_tokens", -1, "0 or more"),
    ("ignore_eos", 1, "true or false"),
    ("stream", "yes", "true or false"),
    ("stream_options.include_usage", {"include_usage": 5}, "expected bool"),
    ("stream_options", 5, "stream_options"),
    ("messages", [], "at least one message"),
    ("messages", None, "messages is missing"),
    ("messages", 5, "not 5"),
    ("messages", {}, "not {}"),
    ("messages", ["x"], "message 0"),
    ("messages", [{"role": "user"}], "message 0"),
    ("messages", [{"role": "king", "content": "x"}], "not 'king'"),
    ("messages", [{"role": "user", "content": 5}], "message 0"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "images"),
    ("messages", [{"role": 5, "content": "x"}], "5"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": True}], "tool_calls is a list"),
    ("messages", MESSAGES * 20_001, "20000 at most"),
    ("messages", [{"role": "user", "content": ["x"] * 10_001}], "10000 parts at most"),
    ("tools", 5, "a list of functions"),
    ("tools", [5], "functions"),
    ("tools", [{"type": "function"}], "tool 0"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tool 0: a name"),
    ("tools", [{"type": "function", "function": {"name": '"'}}], "tool 0: a name"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": 5}}], "tool 0: parameters"),
    ("tools", [{"type": "code", "function": {"name": "f"}}], "tool 0: the type is 'function', not 'code'"),
    ("tools", [TOOL] * 1025, "1024"),
    ("tool_choice", "required", "no tools"),
    ("tool_choice", "maybe", "'maybe'"),
    ("tool_choice", {"type": "function", "function": {"name": "nope"}}, "'nope'"),
    ("tool_choice", {"type": "function"}, "tool_choice names a function"),
    ("tool_choice", {}, "tool_choice names a function"),
    ("parallel_tool_calls", "x", "true or false"),
    ("functions", [{"name": "f"}], "tools"),
    ("adapter_name", "lora", "LoRA"),
    ("chat_template", "{{ x }}", "the server's"),
    ("chat_template_kwargs", {"tokenize": True}, "'tokenize'"),
    ("chat_template_kwargs", {"chat_template": "x"}, "'chat_template'"),
    ("chat_template_kwargs", {"enable_thinking": []}, "no list"),
    ("chat_template_kwargs", 5, "an object"),
    ("reasoning_effort", "extreme", "'extreme'"),
    ("modalities", ["audio"], "text"),
    ("model", 5, "the name of a model"),
    ("request_id", 5, "a text"),
]


@pytest.mark.parametrize("param, value, said", BAD, ids=lambda value: f"{value!r:.30}")
def test_values_that_cannot_be_used(param, value, said):
    name = param.partition(".")[0]
    found, message = refused(CHAT, {"messages": MESSAGES, name: value})
    assert found == param and said in message and len(message) < 300
    assert message.startswith(name) or param in ("messages", "tools")


@pytest.mark.parametrize(
    "param, body, said",
    [
        ("prompt", {}, "prompt is missing"),
        ("prompt", {"prompt": None}, "prompt is missing"),
        ("prompt", {"prompt": []}, "prompt is a text"),
        ("prompt", {"prompt": [[]]}, "prompt is a text"),
        ("prompt", {"prompt": [1, "a"]}, "prompt is a text"),
        ("prompt", {"prompt": [True]}, "prompt is a text"),
        ("prompt", {"prompt": [1.5]}, "prompt is a text"),
        ("prompt", {"prompt": {"a": 1}}, "prompt is a text"),
        ("prompt", {"prompt": ["x"] * 1025}, "1024 prompts at most, not 1025"),
        ("n", {"prompt": ["x"] * 1000, "n": 2}, "1024 answers at most"),
        ("suffix", {"prompt": "x", "suffix": "y"}, "filling in the middle"),
        ("logprobs", {"prompt": "x", "logprobs": 21}, "from 0 to 20"),
        ("logprobs", {"prompt": "x", "logprobs": 10**6}, "from 0 to 20"),
        ("min_tokens", {"prompt": "x", "min_tokens": 17}, "at most max_tokens, 16"),
        ("best_of", {"prompt": "x", "best_of": 0}, "best_of"),
        (None, 5, "body is an object"),
        (None, None, "body is an object"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_completions_that_cannot_be_used(param, body, said):
    found, message = refused(COMPLETION, body)
    assert found == param and said in message


def test_the_url_is_checked():
    assert refused("/v1/other", {})[0] == "url"


@pytest.mark.parametrize(
    "body, expected",
    [
        ({"top_k": -1}, {"greedy": False, "effective_top_k": 0}),
        ({"top_k": 1}, {"greedy": True}),
        ({"min_p": 0.1, "temperature": 1}, {"min_p": 0.1, "greedy": False}),
        ({"seed": -1}, {"random_seed": 2**32 - 1}),
        ({"seed": 2**32 + 3}, {"random_seed": 3}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ({"min_tokens": 4}, {"min_new_tokens": 4}),
        ({"min_new_tokens": 4}, {"min_new_tokens": 4}),
        ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
        ({"stop": "a"}, {"stop_words": ["a"]}),
        (
            {"stop_token_ids": [5], "bad_words": ["x"], "bad_token_ids": [6]},
            {"stop_token_ids": [5], "bad_words": ["x"]},
        ),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"logprobs": True, "top_logprobs": 20}, {"logprobs": 20}),
    ],
    ids=str,
)
def test_parameters_of_generation(body, expected):
    config = chat(**body).config
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_shapes_a_stream():
    ask = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": None})
    assert (ask.stream, ask.include_usage, ask.continuous_usage) == (True, True, False)
    assert not chat(stream=None).stream and chat(return_token_ids=True).return_token_ids


OTHER = {"type": "function", "function": {"name": "mul"}}


@pytest.mark.parametrize(
    "given, shown, choice",
    [
        (None, ["add", "mul"], "auto"),
        ("auto", ["add", "mul"], "auto"),
        ("none", None, "none"),
        ("required", ["add", "mul"], "required"),
        ({"type": "function", "function": {"name": "mul"}}, ["mul"], "mul"),
    ],
    ids=str,
)
def test_tools(given, shown, choice):
    ask = chat(tools=[TOOL, OTHER], tool_choice=given, parallel_tool_calls=False)
    assert (ask.tools and [tool["function"]["name"] for tool in ask.tools]) == shown
    assert (ask.tool_choice, ask.parallel_tool_calls) == (choice, False)


def test_the_tools_of_the_course():
    """Its schemas have the type 'int', which is none, and functions come without their wrapping."""
    schema = {"type": "object", "properties": {"a": {"type": "int"}}}
    ask = chat(tools=[{"name": "add", "description": "Compute", "parameters": schema}])
    assert ask.tools[0]["function"]["parameters"] == schema


@pytest.mark.parametrize(
    "body, variables",
    [
        ({}, {}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, {"enable_thinking": True}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "none", "enable_thinking": False}),
    ],
    ids=str,
)
def test_variables_of_the_template(body, variables):
    assert chat(**body).variables == variables


def test_without_a_template():
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    ask = chat(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": parts}], do_preprocess=False)
    assert ask.prompts == ["ab\nc"]


def test_a_messages_fields_stay():
    given = [{"role": "assistant", "content": "x", "reasoning_content": "y", "refusal": None}]
    assert chat(messages=given).prompts == [given]


# Anything at all. -----------------------------------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    sorted({*protocol.ChatBody.__struct_fields__, *protocol.CompletionBody.__struct_fields__, *protocol.ABSENT})
)
LIKELY = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(protocol.ROLES) | VALUES,
                "content": st.text() | VALUES,
                "tool_calls": VALUES,
            },
        ),
        max_size=3,
    ),
    "prompt": st.text() | st.lists(st.text() | st.integers() | st.lists(st.integers())),
    "response_format": st.fixed_dictionaries(
        {"type": st.text() | st.sampled_from(["text", "json_object", "json_schema"])}
    ),
    "tools": st.lists(
        st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text()})}) | VALUES, max_size=3
    ),
}
BODIES = st.dictionaries((NAMES | st.text(max_size=8)).filter(lambda n: n not in LIKELY), VALUES, max_size=6).flatmap(
    lambda body: st.fixed_dictionaries(
        {name: st.just(value) for name, value in body.items()}, optional={n: s | VALUES for n, s in LIKELY.items()}
    )
)


@settings(max_examples=400)
@given(st.sampled_from([CHAT, COMPLETION]), BODIES)
def test_a_body_becomes_an_ask_or_a_short_error(url, body):
    try:
        ask = Ask.parse(url, body)
    except ParamError as error:
        assert len(str(error)) < 1000
    else:
        assert ask.prompts and 1 <= ask.config.n <= 128


@given(VALUES)
def test_no_value_at_all_breaks_it(value):
    with pytest.raises(ParamError):
        Ask.parse(CHAT, [value])
    for name in protocol.ChatBody.__struct_fields__:
        try:
            Ask.parse(CHAT, {"messages": MESSAGES, name: value})
        except ParamError:
            pass
