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


@pytest.mark.parametrize("tokens, rows, layer", [(16, 16, 12), (640, 256, 10)])
def test_a_step_is_one_graph(tokens, rows, layer):
    """A decode step, and one with prompts among 256 rows: one command buffer, few launches, and no pool is copied."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--tokens", str(tokens), "--rows", str(rows)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["command_buffers"], found["outside"], found["copies"]) == (1, {}, {})
    assert found["layer"] <= layer
    assert found["temp_bytes"] < 256 << 20  # a pool of the model is 4 GB
