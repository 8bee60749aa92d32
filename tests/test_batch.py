"""`jaxserve batch`: order, bad lines, interruption; and OpenAI's bodies."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve import GenerationConfig, protocol
from jaxserve.commands import batch
from jaxserve.engine.engine import EngineDead
from tests import fake_engine
from tests.waiting import soon

HOME = Path(__file__).parents[1]
CHAT, COMPLETION = protocol.CHAT, protocol.COMPLETION


def chat(content, id="a", **body):
    body = {"model": "m", "messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": body}


def completion(prompt, id="a", **body):
    return {"custom_id": id, "method": "POST", "url": COMPLETION, "body": {"model": "m", "prompt": prompt, **body}}


def run(lines, done=(), **settings):
    """The answers to lines (dicts or texts)."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    questions = io.BytesIO("".join(text + "\n" for text in texts).encode())
    answers = io.BytesIO()
    with fake_engine.make(**settings) as pipe:
        work = batch.Batch(pipe, "fake-1b")
        failed = work.run(questions, answers, len(done), len(texts))
        assert not pipe.engine.stats()["running"]
    found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert failed == sum(answer["error"] is not None for answer in found)
    return found


def texts(answers):
    return [
        choice["message"]["content"] if "message" in choice else choice["text"]
        for answer in answers
        for choice in answer["response"]["body"]["choices"]
    ]


def test_one_chat_line():
    (answer,) = run([chat("hi", "one")])
    created = answer["response"]["body"].pop("created")
    assert abs(created - time.time()) < 100
    assert answer == {
        "id": "batch_req_1",
        "custom_id": "one",
        "response": {
            "status_code": 200,
            "request_id": "req_1",
            "body": {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "model": "fake-1b",
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
            },
        },
        "error": None,
    }


def test_completions():
    (answer,) = run([completion(["ab", "cd"], n=2, max_tokens=100)])
    body = answer["response"]["body"]
    assert body["object"] == "text_completion" and body["id"] == "cmpl-1"
    assert texts([answer]) == ["answer 0: ab"] * 2 + ["answer 0: cd"] * 2
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (4, 48)
    assert texts(run([completion(list(b"ids"), max_tokens=100)])) == ["answer 0: ids"]
    assert texts(run([completion([[65], [66]], max_tokens=100)])) == ["answer 0: A", "answer 0: B"]
    assert [len(text) for text in texts(run([completion("x" * 50)]))] == [16]


@pytest.mark.parametrize("max_batch_size", [1, 4, 64])
def test_answers_come_in_order_whatever_the_batch(max_batch_size):
    draw = random.Random(1)
    lines = [
        chat("x" * draw.randint(1, 40), f"id {i}", **({"temperature": 1} if i % 3 else {}), max_tokens=30)
        for i in range(300)
    ]
    answers = run(lines, max_batch_size=max_batch_size)
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    assert texts(answers) == texts(run(lines, max_batch_size=7))


def test_seeds_do_not_depend_on_where_a_run_began():
    lines = [chat("hi", f"{i}", temperature=1) for i in range(6)]
    whole = texts(run(lines))
    assert len(set(whole)) == 6
    assert texts(run(lines, done=range(4))) == whole[4:]
    assert texts(run([chat("hi", temperature=1, seed=5)])) == ["answer 1: hi (seed 5)"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "it is not JSON"),
        ("[]", "an object with custom_id"),
        (chat("x", None), "custom_id is missing"),
        ({"custom_id": "a"}, "body is missing"),
        ({"custom_id": "a", "url": CHAT, "body": []}, "body is an object"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "'/v1/embeddings'"),
        ({"custom_id": "a", "method": "GET", "url": CHAT, "body": {}}, "method is POST, not 'GET'"),
        ({"custom_id": "a", "url": CHAT, "body": {}}, "messages is missing"),
        ({"custom_id": "a", "url": COMPLETION, "body": {}}, "prompt is missing"),
        (completion([]), "prompt is a text"),
        (completion({"a": 1}), "prompt is a text"),
        (completion([1, "a"]), "prompt is a text"),
        (completion([9999]), "0 to 257, not 9999"),
        (completion(""), "the prompt is empty"),
        (completion("x", logprobs=30), "logprobs"),
        (completion("x", best_of=2, n=3), "best_of"),
        (completion("x\0"), "it never fits"),
        (chat("x", temperature="hot"), "temperature is a number"),
        (chat("x", max_tokens=-1), "max_tokens"),
        (chat("x", stream=True), "stream"),
        (chat("x", tools=[{"type": "function"}]), "tool 0"),
        (chat("x", response_format={"type": "hiccup"}), "response_format"),
        (chat("x", top_logprobs=2), "top_logprobs needs logprobs"),
        (chat("x", logprobs=2), "logprobs is true or false"),
        (chat("x", messages=[]), "messages"),
        (chat("x", messages=[{"role": "user"}]), "message 0"),
        (chat("\ud800"), "surrogate"),
        ("\udcff", "not JSON"),
    ],
    ids=lambda value: None if isinstance(value, dict) else repr(value),
)
def test_a_bad_line_is_an_error_answer_and_not_the_end(line, said):
    if line == "\udcff":
        line = "\ufffd"
    before, answer, after = run([chat("1", "b"), line, chat("2", "c")])
    assert texts([before, after]) == ["answer 1: 1", "answer 1: 2"]
    assert said in answer["error"]["message"] and answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["message"] == answer["error"]["message"]
    expected = line.get("custom_id") if isinstance(line, dict) else None
    assert answer["custom_id"] == expected and answer["id"] == "batch_req_2"


def test_a_failed_step_is_a_servers_error():
    answer, after = run([chat("\x01"), chat("b")])
    assert (answer["response"]["status_code"], answer["error"]["code"]) == (500, "server_error")
    assert texts([after]) == ["answer 1: b"]


def test_when_the_engine_stops_nothing_is_written_for_it(capsys):
    questions = io.BytesIO("".join(json.dumps(chat(text)) + "\n" for text in ("a", "\x02", "c")).encode())
    answers = io.BytesIO()
    with fake_engine.make(max_batch_size=1) as pipe, pytest.raises(EngineDead, match="has stopped"):
        batch.Batch(pipe, "fake-1b").run(questions, answers, 0, 3)
    assert texts(map(json.loads, answers.getvalue().splitlines())) == ["answer 1: a"]


def test_only_bad_lines():
    assert len(run(["{"] * 5000)) == 5000


def test_what_a_window_holds(monkeypatch):
    monkeypatch.setattr(batch, "AHEAD", 20)
    lines = [chat("x" * 100, "first")] + [chat("y", f"{i}", max_tokens=1) for i in range(200)]
    most = 0

    class Watched(batch.Batch):
        def _flush(self):
            nonlocal most
            most = max(most, len(self._pending))
            super()._flush()

    monkeypatch.setattr(batch, "Batch", Watched)
    assert len(run(lines, max_batch_size=64)) == 201
    assert 15 < most <= 20


def test_no_room_for_an_answer():
    (answer,) = run([chat("x" * 300)])
    assert answer["response"]["body"]["choices"][0]["finish_reason"] == "length"


def test_logprobs():
    (answer,) = run([chat("x", logprobs=True, top_logprobs=2, max_tokens=1)])
    (content,) = answer["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert content == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ],
    }
    (answer,) = run([completion("x", logprobs=2, max_tokens=2)])
    assert answer["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["a", "n"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"n": -0.5, "o": -1.5}],
        "text_offset": [0, 1],
    }


def test_echo_and_best_of():
    (answer,) = run([completion("ab", echo=True, logprobs=1, max_tokens=1)])
    (choice,) = answer["response"]["body"]["choices"]
    assert choice["text"] == "aba" and choice["logprobs"]["token_logprobs"] == [None, -98.0, -0.5]
    (answer,) = run([completion(["ab", "c", "de"], echo=True, logprobs=1, max_tokens=1)])
    told = [choice["logprobs"]["token_logprobs"] for choice in answer["response"]["body"]["choices"]]
    assert told == [[None, -98.0, -0.5], [None, -0.5], [None, -101.0, -0.5]]
    (answer,) = run([completion("ab", best_of=3, max_tokens=1)])
    assert texts([answer]) == ["a"] and answer["response"]["body"]["usage"]["completion_tokens"] == 3


def test_tools():
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    (answer,) = run([chat("1 + 1?", tools=[tool])], say=lambda _: call, session_len=4096)
    (choice,) = answer["response"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == ""
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}


def test_what_is_not_known_is_ignored():
    assert texts(run([chat("x", max_tokenz=1)])) == ["answer 1: x"]


@pytest.mark.parametrize(
    "body, advice, expected",
    [
        ({}, {}, {"greedy": True, "max_new_tokens": None}),
        ({"temperature": 0.7}, {}, {"greedy": False, "effective_top_k": 0, "temperature": 0.7}),
        ({"temperature": 0}, {"do_sample": True}, {"greedy": True}),
        ({}, {"do_sample": True, "top_k": 20}, {"greedy": False, "effective_top_k": 20, "temperature": 1.0}),
        ({"temperature": 0.7}, {"do_sample": True, "top_k": 20}, {"effective_top_k": 20}),
        ({"top_p": 0.9}, {}, {"greedy": False, "top_p": 0.9, "effective_top_k": 0, "temperature": 1.0}),
        ({"max_tokens": 5}, {}, {"max_new_tokens": 5}),
        ({"max_completion_tokens": 6}, {}, {"max_new_tokens": 6}),
        ({"stop": "x", "seed": 3, "n": 2}, {}, {"stop_words": ["x"], "random_seed": 3, "n": 2}),
        ({"stop": ["x", "y"], "logprobs": False}, {}, {"stop_words": ["x", "y"], "logprobs": None}),
        ({"logprobs": True}, {}, {"logprobs": 0}),
        ({"logit_bias": {"7": 3}, "ignore_eos": True}, {}, {"logit_bias": {7: 3}, "ignore_eos": True}),
        ({"user": "u", "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}, {}, {}),
        ({"temperature": None, "stop": None, "tools": None}, {}, {"greedy": True}),
    ],
    ids=str,
)
def test_parameters(body, advice, expected):
    ask = protocol.Ask.parse(CHAT, {"messages": [{"role": "user", "content": "x"}], **body}, advice)
    assert {name: getattr(ask.config, name) for name in expected} == expected


def test_a_text_as_messages_is_a_whole_prompt():
    ask = protocol.Ask.parse(CHAT, {"messages": "raw"})
    assert (ask.prompts, ask.do_preprocess) == (["raw"], False)
    assert protocol.Ask.parse(COMPLETION, {"prompt": "x"}).config == GenerationConfig.from_hf({}, max_new_tokens=16)


# The command: files, interruption, going on. --------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(chat(f"q{i}", f"id {i}")) + "\n" for i in range(40)))
    return source, target


def command(source, target, *arguments, **environment):
    line = [sys.executable, "-m", "tests.fake_engine", "batch", str(source), str(target), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=HOME, env=os.environ | environment)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out, err


def answered(target):
    return [json.loads(line)["custom_id"] for line in target.read_text().splitlines()]


EXPECTED = [f"id {i}" for i in range(40)]


def test_the_command(files):
    source, target = files
    status, out, err = finish(command(source, target))
    assert (status, out) == (0, "") and "40 lines answered" in err
    assert answered(target) == EXPECTED
    before = target.read_bytes()
    status, _, err = finish(command(source, target))
    assert status == 0 and "all 40 lines are answered" in err and "memory plan" not in err
    assert target.read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_started_again(files, how):
    source, target = files
    process = command(source, target, FAKE_DELAY="0.03")  # 4 s for all
    soon(lambda: process.poll() is not None or (target.exists() and target.read_bytes().count(b"\n") >= 5))
    assert process.poll() is None
    process.send_signal(how)
    status, _, err = finish(process)
    assert status == (130 if how == signal.SIGINT else -how)
    some = target.read_bytes()
    assert 5 <= some.count(b"\n") < 40
    if how == signal.SIGKILL:
        target.write_bytes(some + b'{"id": "batch_req_41", "custom')  # and in the middle of a line
    status, _, err = finish(command(source, target))
    assert status == 0 and "of 40 lines are answered, going on" in err
    assert answered(target) == EXPECTED and target.read_bytes().startswith(some)
    assert texts(map(json.loads, target.read_text().splitlines())) == [f"answer 1: q{i}" for i in range(40)]


def test_empty_lines_and_a_last_line_without_an_end(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n" + json.dumps(chat("a", "1")) + "\n\n  \n" + json.dumps(chat("b", "2")))
    assert finish(command(source, target))[0] == 0
    assert answered(target) == ["1", "2"]
    assert json.loads(target.read_text().splitlines()[1])["id"] == "batch_req_5"


def resumed(source, target):
    with batch.opened(str(source), str(target)) as (questions, answers):
        return batch.resume(questions, answers)


def test_resume_finds_where_to_go_on(files):
    source, target = files
    lines = [json.dumps({"id": "batch_req_1", "custom_id": id}) + "\n" for id in EXPECTED]
    for text, count in [
        ("", 0),
        (lines[0], 1),
        (lines[0][:-1], 0),
        ("".join(lines[:7]) + lines[7][:5], 7),
        ("".join(lines), 40),
    ]:
        target.write_text(text)
        assert resumed(source, target) == count
        assert target.read_text() == "".join(lines[:count])


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"custom_id": "other"}\n', "line 1 answers 'other', but line 1 of .* is 'id 0'"),
        ("notes\n", "line 1 is no answer"),
        ("notes", "line 1 is no answer"),
        ('{"custom_id": "other"}\n{"id": "batch', "line 1 answers 'other'"),
        ("".join(f'{{"custom_id": "{id}"}}\n' for id in [*EXPECTED, "more"]), "has more lines"),
    ],
)
def test_an_output_of_something_else_is_left_alone(files, text, said):
    source, target = files
    target.write_text(text)
    with pytest.raises(ValueError, match=said):
        resumed(source, target)
    assert target.read_text() == text


def test_mistakes_with_files(files, tmp_path):
    source, target = files
    with pytest.raises(ValueError, match="is the input, too"):
        resumed(source, source)
    with batch.opened(str(source), str(target)), pytest.raises(ValueError, match="another process is writing"):
        resumed(source, target)
    status, _, err = finish(command(source, tmp_path / "no" / "folder"))
    assert status == 2 and "No such file" in err and "memory plan" not in err
