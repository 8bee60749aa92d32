"""Rows 52 to 54 and 61 to 63 of tests/serve/faults/table.py: faults of the engine, as clients over HTTP see them.

The engine is a real one with a tiny model; what goes wrong in it is put there.
"""

import threading
import time

import numpy as np
import orjson
import pytest

from jaxserve import EngineConfig, pipeline
from jaxserve.serve.door import Door
from jaxserve.serve.options import ServerOptions
from jaxserve.serve.service import Service
from tests.engine.test_faults import Once, before
from tests.serve import tiny
from tests.serve.local import Server

SESSION, PAGES, PAGE = 256, 20, 16
PROMPTS = [[10 + i] * (5 + i) for i in range(4)]
LONG = 200  # tokens of an answer; four of them take three times what the cache holds


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("models") / "tiny")
    config = EngineConfig(max_batch_size=4, cache_max_entry_count=PAGES, cache_block_seq_len=PAGE, session_len=SESSION)
    with pipeline(str(folder), config) as made:
        yield made


def over(pipe, **door):
    """The application over the engine; door: settings of its Door."""
    service = Service(Door(pipe.engine, **door), pipe.tokenizer, pipe.template, model_names=["tiny"])
    return Server(service, pipe.engine, ServerOptions())


@pytest.fixture(scope="module")
def server(pipe):
    return over(pipe)


def complete(server, prompt, tokens):
    """(status, answer, headers)"""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
    response = server.app.test_client().post("/v1/completions", json=body)
    return response.status_code, orjson.loads(response.data), response.headers


def together(server, prompts, tokens):
    """The answers to all of them, sent at once."""
    found = [None] * len(prompts)

    def ask(index):
        found[index] = complete(server, prompts[index], tokens)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def ids(answer):
    status, body, _ = answer
    assert status == 200, body
    return body["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def alone(server):
    """What each prompt is answered when it is the only one."""
    return [ids(complete(server, prompt, LONG)) for prompt in PROMPTS]


def alive(server, alone):
    """Whether all is as ever, and nothing is held."""
    assert [ids(answer) for answer in together(server, PROMPTS, LONG)] == alone
    stats = server.engine.stats()
    return stats["running"] == stats["waiting"] == stats["pages_used"] == 0


def test_52_a_cache_that_is_too_small_costs_no_token(server, alone):
    before_it = server.engine.stats()["preemptions"]
    assert [ids(answer) for answer in together(server, PROMPTS, LONG)] == alone
    assert server.engine.stats()["preemptions"] > before_it
    assert alive(server, alone)


def test_53_a_request_larger_than_the_cache(server, alone):
    status, body, _ = complete(server, [5] * (PAGES * PAGE + 1), 1)
    assert status == 400 and str(PAGES * PAGE + 1) in body["error"]["message"]
    status, body, _ = complete(server, [5] * 20, 10**6)  # as much as fits
    assert status == 200 and body["usage"]["total_tokens"] == SESSION
    assert alive(server, alone)


def test_54_a_time_limit(pipe, server, alone, monkeypatch):
    advance = pipe.engine.runner.advance

    def slowly(*arguments):
        time.sleep(0.05)
        return advance(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(pipe.engine.runner, "advance", slowly)
        for status, body, _ in together(over(pipe, request_timeout=0.5), PROMPTS, LONG):
            assert status == 504 and "0.5 s, the time limit" in body["error"]["message"]
    assert alive(server, alone)


def test_61_out_of_memory(pipe, server, alone, monkeypatch):
    monkeypatch.setattr(pipe.engine.runner, "advance", pipe.engine.runner.advance)  # it is put back
    Once(pipe.engine.runner, "advance", before("RESOURCE_EXHAUSTED: Out of memory at 0x7f"), nth=20, times=2)
    answers = together(server, PROMPTS, LONG)
    refused = [answer for answer in answers if answer[0] != 200]
    assert 1 <= len(refused) <= 2
    for status, body, headers in refused:
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "0x7f" not in body["error"]["message"]
    for answer, right in zip(answers, alone, strict=True):
        assert answer in refused or ids(answer) == right
    assert alive(server, alone)


def test_62_a_row_that_raises_fails_alone(pipe, server, alone, monkeypatch):
    pack, marked = pipe.engine.runner.pack, [77, 78]

    def raising(chunks, *rest):
        if any(chunk.request.tokens[:2] == marked and len(chunk.request.tokens) > 10 for chunk in chunks):
            raise RuntimeError("secret of the sampler")
        return pack(chunks, *rest)

    monkeypatch.setattr(pipe.engine.runner, "pack", raising)
    *good, (status, body, _) = together(server, [*PROMPTS[:3], marked], LONG)
    assert status == 500 and "secret" not in body["error"]["message"]
    assert [ids(answer) for answer in good] == alone[:3]
    assert alive(server, alone)


def test_63_logits_that_are_no_numbers(pipe, server, alone):
    runner, embed = pipe.engine.runner, pipe.engine.runner.params.embed
    counted = metric(server, "jaxserve:corrupted_requests_total")
    runner.params = runner.params.replace(embed=embed.at[99].set(np.nan))
    try:
        *good, (status, body, _) = together(server, [*PROMPTS[:3], [5, 99, 5]], LONG)
    finally:
        runner.params = runner.params.replace(embed=embed)
    assert status == 500 and "not numbers" in body["error"]["message"]
    assert [ids(answer) for answer in good] == alone[:3]
    assert metric(server, "jaxserve:corrupted_requests_total") == counted + 1
    assert alive(server, alone)


def metric(server, name):
    text = server.client.get("/metrics").get_data(as_text=True)
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return float(line.split()[-1])
