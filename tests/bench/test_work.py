import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest

from jaxserve.bench import work

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_mix_is_the_work_of_the_offline_benchmark():
    spec = importlib.util.spec_from_file_location("workloads", SCRIPTS / "workloads.py")
    workloads = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workloads)
    requests, clients = workloads.requests("mix")
    assert [(item.prompt, item.output) for item in work.mix()] == requests
    assert clients == work.MIX_CLIENTS


@pytest.mark.parametrize("ids", [None, (5, 9)])
def test_made_up(ids):
    items = work.made_up(200, (3, 6), (10, 12), 1, ids=ids)
    assert items == work.made_up(200, (3, 6), (10, 12), 1, ids=ids) != work.made_up(200, (3, 6), (10, 12), 2, ids=ids)
    lengths = {len(item.prompt if ids else item.prompt.split()) for item in items}
    assert lengths == {3, 4, 5, 6} and {item.output for item in items} == {10, 11, 12}
    if ids:
        assert {token for item in items for token in item.prompt} == {5, 6, 7, 8, 9}


ENTRIES = [
    {"conversations": [{"from": "human", "value": "a b c d e"}, {"from": "gpt", "value": "1 2 3 4 5"}, {"value": "x"}]},
    {"prompt": "f g h i j", "reply": "1 2 3 4 5 6"},
    {"prompt": "k l m n o", "output_len": 77},
    {"messages": [{"role": "user", "content": "p q r s t"}, {"role": "assistant", "content": "1 2 3 4"}]},
    {"conversations": [{"value": "alone"}]},
    {"prompt": "too short", "reply": "1 2 3 4 5"},
    {"prompt": "a b c d e", "reply": "short"},
    {"prompt": "long " * 1025, "reply": "1 2 3 4 5"},
    {"prompt": "a b c d e", "reply": "long " * 2048},
]


def words(texts):
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize("lines", [False, True])
def test_files_of_conversations(tmp_path, lines):
    """What ShareGPT benchmarks leave out is left out; the answers have the lengths of those in the file."""
    path = tmp_path / "file"
    text = "\n".join(map(json.dumps, ENTRIES)) + "\n\n" if lines else json.dumps(ENTRIES)
    path.write_text(text, encoding="utf-8")
    items = work.conversations(path, 100, 0, words)
    found = {json.dumps(item.prompt): item.output for item in items}
    assert found == {
        '"a b c d e"': 5,
        '"f g h i j"': 6,
        '"k l m n o"': 77,
        '[{"role": "user", "content": "p q r s t"}]': 4,
    }
    assert {item.output for item in work.conversations(path, 2, 0, None, output=9)} == {9}
    assert len(work.conversations(path, 2, 0, words)) == 2
    assert work.conversations(path, 100, 0, words) == items


def test_files_that_are_none(tmp_path):
    path = tmp_path / "file"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="neither JSON nor JSON lines"):
        work.conversations(path, 1, 0, None)
    path.write_text('[{"prompt": "a"}, 5]', encoding="utf-8")
    with pytest.raises(ValueError, match="no exchange"):
        work.conversations(path, 1, 0, None)


@pytest.mark.parametrize("burstiness", [0.25, 1, 4])
def test_arrivals(burstiness):
    """The rate is kept on average; the gaps vary as a gamma distribution's do."""
    times = work.arrivals(20_000, 50, burstiness, 7)
    assert times[0] == 0 and times == sorted(times) == work.arrivals(20_000, 50, burstiness, 7)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.2)
