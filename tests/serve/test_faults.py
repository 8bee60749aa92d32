"""Faults and bad inputs, row by row of tests/serve/faults/table.py, done to a live server with a real, tiny model.

While a row is done four good streams run beside it, which must be answered as without it.  Time limits are deadlines
here, of ten times what the table says: the machine may be busy.  `python scripts/faults.py URL` tells the true times.
"""

import ast
from pathlib import Path
from random import Random

import pytest

from tests.serve import processes, tiny
from tests.serve.faults import table
from tests.serve.faults.row import judge
from tests.serve.faults.target import Streams, Target, first, many

SLACK = 10
ELSEWHERE = {24, 40, 41, 47, 48, 49, 51}  # test_faults_clients.py: before a server with keys, bounds and many seats
HERE = sorted({row.number for row in table.ROWS if row.check or row.number == table.LAST} - ELSEWHERE)
OPTIONS = {
    "max-batch-size": 16,
    "session-len": 2048,
    "cache-max-entry-count": 400,
    "cache-block-seq-len": 16,
    "model-name": "tiny",
    "tool-call-parser": "hermes",
    "log-level": "error",
    "server-port": "0",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(Target, Streams, the rows by their number)"""
    folder = tiny.write(tmp_path_factory.mktemp("tiny"))
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    with processes.served(["-m", "jaxserve", "serve", str(folder), *options], start=300) as running:
        target = Target(running.url, memory=running.memory, slack=SLACK)
        watch = table.Watch(target)
        rows = table.checks(limit=None, watch=watch, schemas=400, secrets=600)
        yield target, Streams(target), {row.number: row for row in rows}
        assert "Traceback" not in running.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("number", HERE, ids=lambda number: f"{number:02}")
def test_row(server, number):
    target, streams, rows = server
    result = judge(rows[number], target, None if number == table.LAST else streams)
    assert result.passed, "\n".join([f"{number} {result.row.fault}: {result.row.expected}", *result.wrong])


def test_72_answers_do_not_mix(server):
    """Whoever asks beside it, comes or leaves: each prompt is answered as it was alone."""
    target, _, _ = server
    prompts = [f"The secret is {Random(i).randrange(10**9)}, and" for i in range(16)]
    alone = [target.complete(prompt=prompt, max_tokens=16).text for prompt in prompts]
    assert len(set(alone)) > 8

    def ask(index):
        draw = Random(index)
        number = draw.randrange(len(prompts))
        if draw.random() < 0.3:
            with target.open(prompt=prompts[number], max_tokens=400) as client:
                first(client)
            return True
        return target.complete(prompt=prompts[number], max_tokens=16).text == alone[number]

    assert all(many(ask, 300, 24))


def test_every_row_is_shown():
    """By a check, or by tests that are there."""
    assert [row.number for row in table.ROWS] == list(range(1, 76))
    tests = Path(__file__).parents[1]
    for row in table.ROWS:
        assert row.check or row.tests or row.number in (51, table.LAST), row.number
        for test in row.tests:
            file, _, name = test.partition("::")
            tree = ast.parse((tests / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
