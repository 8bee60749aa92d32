"""scripts/bench_compare.py: what counts as worse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_compare.py"


def compare(folder, old, new):
    """Exit status and text for two lists of figures."""
    paths = []
    for name, rows in (("old", old), ("new", new)):
        lines = ["a line for people", *("RESULT " + json.dumps({"model": "m", "tp": 1} | row) for row in rows)]
        (folder / name).write_text("\n".join(lines))
        paths.append(folder / name)
    done = subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)
    assert not done.stderr or done.returncode == 2, done.stderr
    return done.returncode, done.stdout


def test_noise_is_no_change(tmp_path):
    old = [{"work": "lat1", "out_tok_s": 100.0, "itl_ms": 10.0, "spread": 0.05}]
    new = [{"work": "lat1", "out_tok_s": 96.0, "itl_ms": 10.4, "spread": 0.001}]
    assert compare(tmp_path, old, new)[0] == 0


def test_a_fall_is(tmp_path):
    old = [{"work": "mix", "out_tok_s": 100.0, "spread": 0.01}, {"work": "lat1", "out_tok_s": 50.0, "itl_ms": 2.0}]
    new = [{"work": "mix", "out_tok_s": 97.0, "spread": 0.01}, {"work": "lat1", "out_tok_s": 50.0, "itl_ms": 2.2}]
    status, text = compare(tmp_path, old, new)
    assert status == 1
    assert [line.split()[1] for line in text.splitlines() if "WORSE" in line] == ["mix", "lat1"]


def test_wrong_answers_and_what_is_missing_count(tmp_path):
    row = {"work": "mix", "out_tok_s": 100.0, "different_alone": 0}
    assert compare(tmp_path, [row], [row | {"different_alone": 1}])[0] == 1
    assert "missing" in compare(tmp_path, [row, row | {"work": "lat1"}], [row])[1]
    assert compare(tmp_path, [row], [])[0] == 2
    for new in ({"work": "mix"}, row | {"out_tok_s": 0.0}):
        status, text = compare(tmp_path, [row], [new])
        assert status == 1 and "out_tok_s 100.0 -> " in text


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        (b"RESULT {}\n{\n", "line 2: not JSON"),
        (b"\xff{", "cannot be read"),
        (b"", "holds no results"),
        (b"# Text\n{}\n", "holds no results"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, reason):
    """Status 1 would say that something got worse."""
    path = tmp_path / "new"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run([sys.executable, SCRIPT, path, path], capture_output=True, text=True)
    assert done.returncode == 2 and str(path) in done.stderr and reason in done.stderr
    assert "Traceback" not in done.stderr
