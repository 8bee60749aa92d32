import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import soon


@contextlib.contextmanager
def started(folder, rate):
    """The URL of a source of events that gives each stream so many tokens a second."""
    file = folder / f"port-{rate}"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.source", file, str(rate)], cwd=Path(__file__).parents[2]
    )
    try:
        soon(lambda: process.poll() is not None or (file.exists() and file.read_text().endswith("\n")))
        assert process.poll() is None
        yield f"http://127.0.0.1:{int(file.read_text())}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    with started(tmp_path_factory.mktemp("source"), 100) as url:
        yield url
