"""Rows of tests/serve/faults/table.py for which a server needs keys, bounds or many seats; its engine only emits."""

import threading

import pytest

from tests.serve import processes
from tests.serve.faults import table
from tests.serve.faults.row import judge
from tests.serve.faults.target import Streams, Target, first
from tests.serve.test_faults import ELSEWHERE, SLACK

KEY = "a-key-of-these-tests"
LIMIT, LANES = 110, 100  # requests that are let in, and that run at once
HERE = [*sorted(ELSEWHERE), 46, 50, table.LAST]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(Target, Streams, the rows by their number)"""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY + "\n")
    options = {"api_key_file": keys, "max_concurrent_requests": LIMIT, "log_level": "error"}
    with processes.served(processes.stub(50, LANES, session_len=1_000_000, **options)) as running:
        target = Target(running.url, KEY, memory=running.memory, slack=SLACK)
        watch = table.Watch(target)
        rows = table.checks(limit=LIMIT, watch=watch)
        yield target, Streams(target), {row.number: row for row in rows}
        assert "Traceback" not in running.log.read_text(encoding="utf-8")


def test_72_every_answer_is_its_own(server):
    """2000 requests, 100 at a time, while others leave: the tokens of each follow from its prompt."""
    target, _, _ = server
    done = threading.Event()

    def leave(index):
        while not done.is_set():
            with target.open(prompt=[index], max_tokens=500) as client:
                first(client)

    leaving = [threading.Thread(target=leave, args=(i,)) for i in range(4)]
    for thread in leaving:
        thread.start()
    try:
        for body in range(20):
            prompts = [[1000 + 400 * body + 3 * i] for i in range(100)]
            reply = target.complete(prompt=prompts, max_tokens=3, ignore_eos=True, return_token_ids=True)
            assert reply.status == 200, reply
            given = [choice["token_ids"] for choice in reply.json()["choices"]]
            assert given == [[token, token + 1, token + 2] for (token,) in prompts]
    finally:
        done.set()
        for thread in leaving:
            thread.join()


@pytest.mark.parametrize("number", HERE, ids=lambda number: f"{number:02}")
def test_row(server, number):
    target, streams, rows = server
    result = judge(rows[number], target, None if number == table.LAST else streams)
    assert result.passed, "\n".join([f"{number} {result.row.fault}: {result.row.expected}", *result.wrong])
