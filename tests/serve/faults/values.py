"""Rows 1 to 22: bodies that are no JSON, parameters that cannot be, prompts that do not fit."""

import json
from collections.abc import Iterator

from tests.serve.faults.row import Case, Row, both, cases, fault, values
from tests.serve.faults.target import CHAT, COMPLETION, Target

DEEP = 100_000
MANY = 1_000_000


def _text(target: Target, **body) -> str:
    return json.dumps({"model": target.model, "messages": target.said, "max_tokens": 1} | body)


def content_type(target: Target) -> Iterator[str | None]:
    data = _text(target).encode()
    yield fault(target, "text/plain", target.post(CHAT, data, Content_Type="text/plain"), 415, 200)
    yield fault(target, "none", target.post(CHAT, data, Content_Type=""), 415, 200)
    form = target.post(CHAT, data, Content_Type="application/x-www-form-urlencoded")
    yield fault(target, "a form", form, 415, 200)


def large(target: Target) -> Iterator[str | None]:
    size = 40 << 20
    head = target.head("POST", CHAT, size)
    yield fault(target, "40 MB", target.raw([head, *[b" " * (1 << 20)] * 40]), 413)
    before = target.raw([head, b" "], 10)  # an answer, although the body has not come
    if before.status != 413:
        yield f"40 MB are read before they are refused: {before}"
    chunked = target.head("POST", CHAT, Transfer_Encoding="chunked")
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    yield fault(target, "40 MB in chunks", target.raw([chunked, *[chunk] * 40, b"0\r\n\r\n"]), 413)


def deep(target: Target) -> Iterator[str | None]:
    nested = "[" * DEEP + "]" * DEEP
    objects = '{"a":' * (DEEP // 2) + "1" + "}" * (DEEP // 2)
    bodies = {
        "arrays": nested,
        "objects": objects,
        "unclosed": "[" * DEEP,
        **{name: _text(target, **{name: "DEEP"}).replace('"DEEP"', nested) for name in ("messages", "stop", "tools")},
        "an unknown field": _text(target, extra="DEEP").replace('"DEEP"', nested),
    }
    for name, text in bodies.items():
        yield fault(target, name, target.post(CHAT, text.encode()), 400, within=0.05)


def no_numbers(target: Target) -> Iterator[str | None]:
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        data = _text(target, temperature="X").replace('"X"', text).encode()
        yield fault(target, text, target.post(CHAT, data), 400, param="temperature")


def huge_lengths(target: Target) -> Iterator[str | None]:
    for value in (2**63 - 1, 2**63, 10**30):
        data = _text(target, max_tokens="X", stop="e").replace('"X"', str(value)).encode()
        yield fault(target, str(value), target.post(CHAT, data), 400, 200)


def many_answers(target: Target) -> Iterator[str | None]:
    before = target.memory() if target.memory else 0
    yield from cases(*both("n", MANY, 2**31), *values("best_of", MANY, path=COMPLETION))(target)
    if target.memory and target.memory() > before + (64 << 20):
        yield f"memory grew by {target.memory() - before >> 20} MiB"


def ids(target: Target) -> Iterator[str | None]:
    told = target.get("/tokenizer_info")
    size = told.json().get("vocab_size", 10_000_000) if told.status == 200 else 10_000_000
    prompts = [-1], [5, size], [1 << 40], [10**30], [5, "a"], [5.5], [True], [None], [[5, [5]]]
    several = values("prompt", [[5], "a"], path=COMPLETION, statuses=(200, 400))  # each may be a prompt
    yield from cases(*values("prompt", *prompts, path=COMPLETION), *several)(target)


def exact(target: Target) -> Iterator[str | None]:
    if not target.context:
        yield "/v1/models does not say max_model_len"
        return
    fits = target.complete(prompt=[5] * target.context)
    yield fault(target, "a prompt of the whole context", fits, 200)
    if fits.status == 200 and fits.json()["choices"][0]["finish_reason"] != "length":
        yield f"it ended by {fits.json()['choices'][0]['finish_reason']}, not by length"
    over = target.complete(prompt=[5] * (target.context + 1))
    yield fault(target, "a token more", over, 400)
    if over.error and not all(str(n) in over.error["message"] for n in (target.context, target.context + 1)):
        yield f"a token more: the message lacks a number: {over.error['message']}"


def _many_messages() -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(10_001)]}


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOLD = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
]

ROWS = [
    Row(1, "body `{` (truncated)", "400, JSON envelope", cases(Case("{", lambda: b"{"))),
    Row(
        2,
        'body empty / `[]` / `"x"` / `null`',
        "400 must be an object",
        cases(*(Case(repr(data), lambda data=data: data) for data in (b"", b"[]", b'"x"', b"null"))),
    ),
    Row(3, "content-type text/plain", "415 (or accept)", content_type),
    Row(4, "40 MB body", "413 before parsing", large),
    Row(5, "100 000-deep JSON", "400 in 50 ms", deep),
    Row(6, "NaN/Infinity temperature, 1e999", "400 param=temperature", no_numbers),
    Row(7, 'temperature "hot", -1, 2.1, true', "400", cases(*both("temperature", "hot", -1, 2.1, True))),
    Row(
        8,
        "top_p 0, 1.5; min_p -1; top_k -5",
        "400",
        cases(*both("top_p", 0, 1.5), *both("min_p", -1), *both("top_k", -5)),
    ),
    Row(
        9,
        'max_tokens 0, -1, 1.5, "5"',
        "400 (0 for completions with echo)",
        cases(
            *values("max_tokens", 0, -1, 1.5, "5"),
            *values("max_tokens", -1, 1.5, "5", path=COMPLETION),
            *values("max_tokens", 0, path=COMPLETION, statuses=(200,), echo=True),
        ),
    ),
    Row(10, "max_tokens 2^63, 10^30", "400 or clamped", huge_lengths),
    Row(11, "n 0, -1", "400", cases(*both("n", 0, -1))),
    Row(12, "n 1 000 000", "400, memory flat", many_answers),
    Row(
        13,
        "logprobs 10^6 / top_logprobs 21",
        "400",
        cases(
            *values("logprobs", MANY, -1, path=COMPLETION),
            *values("top_logprobs", 21, -1, MANY, logprobs=True),
        ),
    ),
    Row(
        14,
        "logit_bias: bad id, 10^6 entries, NaN",
        "400",
        cases(
            *both("logit_bias", {"-1": 1}, {"x": 1}, {"999999999": 1}, {str(2**40): 1}, {"5": "x"}, {"5": 1000}),
            Case("10^6 entries", lambda: {"logit_bias": {str(i): 1 for i in range(MANY)}}, param="logit_bias"),
            Case("NaN", {"logit_bias": {"5": float("nan")}}),
        ),
    ),
    Row(
        15,
        "stop: 10 000 texts, an empty one, 1 MB, no text",
        "400",
        cases(
            *both("stop", ["x"] * 10_000, "", [""], "x" * (1 << 20), 5, [5], [None], {}),
        ),
    ),
    Row(
        16,
        'seed 2^63, -2^63-1, "x"',
        "400 or the documented range",
        cases(*both("seed", 2**63, -(2**63) - 1, statuses=(400, 200)), *both("seed", "x", 1.5)),
    ),
    Row(
        17,
        "messages missing, [], no list, unknown role, content a number",
        "400 param=messages",
        cases(
            *values(
                "messages",
                ...,
                [],
                5,
                {},
                [5],
                [{}],
                [{"role": "king", "content": "a"}],
                [{"role": "user", "content": 5}],
                [{"role": "user"}],
                [{"role": "user", "content": [{"type": "text"}]}],
            )
        ),
    ),
    Row(
        18,
        "content null with tool_calls; 10 000 messages",
        "200; 200 or 400 by length",
        cases(
            Case("content null", {"messages": TOLD}, (200,)),
            Case("10 000 messages", _many_messages, (200, 400)),
        ),
    ),
    Row(
        19,
        'prompt "", [] and [[]]',
        "400 or BOS alone",
        cases(*values("prompt", "", [], [[]], [""], path=COMPLETION, statuses=(400, 200))),
    ),
    Row(
        20,
        "prompt of ids -1, the vocabulary's size, 2^40, mixed types",
        "400",
        ids,
    ),
    Row(
        21,
        "1025 prompts in one request",
        "400",
        cases(*values("prompt", ["a"] * 1025, [[5]] * 1025, path=COMPLETION)),
    ),
    Row(22, "a prompt of exactly the context; one token more", "200 length; 400 with both numbers", exact),
]
