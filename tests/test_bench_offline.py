"""scripts/bench_offline.py and profile_step.py: mistakes are told before, or instead of, a start."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(
    "script, given, reason",
    [
        ("bench_offline", ("--work", "batch"), "no workload batch; there are lat1"),
        ("bench_offline", ("--work", "lat1", "--session-len", "64"), "lat1 needs --session-len 768, not 64"),
        ("bench_offline", ("--runs", "0"), "argument --runs: must be at least 1, not 0"),
        ("bench_offline", ("--work", "host", "--dtype", "float8"), "not 'float8'"),
        ("bench_offline", ("--work", "host"), "nothing exists at this path"),
        ("profile_step", ("--rows", "many"), "argument --rows: must be at least 1, not many"),
        ("profile_step", ("--prompt", "5000"), "need --session-len 5009 or more, not 4096"),
        ("profile_step", (), "nothing exists at this path"),
    ],
)
def test_mistakes(script, given, reason):
    command = [sys.executable, SCRIPTS / f"{script}.py", "--model", "/none", *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
