"""What the engine's programs launch on a GPU, by compiling them for one that is not there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "count_kernels.py"
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in PLUGINS) or not importlib.util.find_spec("jax_triton"),
    reason="needs jax's CUDA plugin and jax-triton",
)


@pytest.mark.parametrize(
    "tokens, rows, steps, layer", [(16, 16, 1, 10), (256, 256, 1, 8), (640, 256, 1, 10), (16, 16, 4, 10)]
)
def test_a_step_is_one_graph(tokens, rows, steps, layer):
    """A decode step, one with prompts among 256 rows, several steps: one command buffer each, and no pool is copied.

    Several steps are a loop whose turns XLA has counted.
    """
    command = [sys.executable, SCRIPT, "--tokens", tokens, "--rows", rows, "--steps", steps]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["command_buffers"], found["outside"], found["turns"]) == (1, {}, steps)
    assert sum(found["copies"].values()) == (tokens != rows)  # the rows' words, for the program that draws
    assert found["layer"] <= layer
    assert found["temp_bytes"] < 256 << 20  # a pool of the model is 4 GB


def test_a_split_model_reduces_by_nccl():
    """XLA's own kernels would keep memory for each all-reduce, outside of the memory plan."""
    command = [sys.executable, SCRIPT, "--tokens", "2", "--rows", "2", "--tp", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["outside"]["kAllReduce"] > 0 and "kCollectiveKernel" not in found["outside"]
    assert found["temp_bytes"] < 64 << 20  # the embedding, gathered, has 379 MB
    assert found["layer_kinds"]["kAllReduce"] == 2 and "slower" not in done.stderr
