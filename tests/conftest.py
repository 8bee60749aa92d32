"""Every test runs on the CPU with four virtual devices, strictly, and with a cache folder of its own.

`JAX_PLATFORMS=cuda,cpu pytest -m gpu` runs the tests that need a GPU; without one they are skipped.
"""

import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, and for the commands that tests start
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run without a GPU, slowly
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need the network

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The machine may be busy: how long an example takes says nothing about whether it is right.
hypothesis.settings.register_profile("jaxserve", deadline=None, print_blob=True)
hypothesis.settings.load_profile("jaxserve")

# A shell's job in the background is told to ignore Control-C, and so would be all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """One cache folder for a run and its workers, which inherit it; never the user's."""
    if not hasattr(config, "workerinput"):
        config.jaxserve_cache = os.environ["JAXSERVE_CACHE"] = tempfile.mkdtemp(prefix="jaxserve-tests-")


def pytest_unconfigure(config):
    if hasattr(config, "jaxserve_cache"):
        shutil.rmtree(config.jaxserve_cache, ignore_errors=True)


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """An empty cache folder for one test that looks at what is written there."""
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
