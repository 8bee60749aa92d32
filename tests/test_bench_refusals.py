"""Scripts that need a GPU, a program or folders say in a line what is missing, and end with 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(script, *given):
    """What a script prints as an error where there is no GPU."""
    command = [sys.executable, SCRIPTS / f"{script}.py", *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2 and not done.stdout, done
    return done.stderr


@pytest.mark.parametrize("script", ["bench_kernels", "bench_matmuls", "tune_kernels"])
def test_no_gpu(script):
    assert run(script).removesuffix("; --reference times their definitions\n").strip() == (
        "the kernels cannot run: JAX runs on cpu, not on a GPU"
    )


@pytest.mark.parametrize(
    "script, given, reason",
    [
        ("bench_kernels", ("--only", "nosuch"), "--only is one of paged_decode, "),
        ("bench_kernels", ("--reference", "--only", "rope_kv_write"), "--only is one of paged_decode, "),
        ("bench_matmuls", ("--matrix", "12"), "--matrix: there are il18 2048x4096, "),
    ],
)
def test_mistakes_are_told_first(script, given, reason):
    assert f"{script}.py: error: {reason}" in run(script, *given)


def test_no_sanitizer(tmp_path):
    assert run("sanitize", "--tool", "/nosuch") == "/nosuch is no program\n"
    assert run("sanitize", "--tool", tmp_path) == f"{tmp_path} is no program\n"


def test_no_model(tmp_path):
    """Nothing is begun, not even the folder of the results."""
    assert run("bench_all", tmp_path / "out", tmp_path, tmp_path / "nosuch") == f"no such folder: {tmp_path}/nosuch\n"
    assert not (tmp_path / "out").exists()
