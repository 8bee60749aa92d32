"""scripts/plot_bench.py: what it refuses, and that it draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "plot_bench.py"
pytest.importorskip("matplotlib")


def plot(folder, image, *model):
    rows = [{"engine": "e", "model": "m", "work": "lat1", "itl_ms": 2.0}]
    rows += [{"engine": "e", "model": "m", "work": f"batch{n}", "out_tok_s": 400.0 * n} for n in (16, 64)]
    (folder / "rows").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, SCRIPT, folder / image, folder / "rows", "--model", *model]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_draws(tmp_path):
    done = plot(tmp_path, "all.png", "m", "1.7", "3.4", "98")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "image, model, reason",
    [
        ("a.png", ("other", "1", "2", "3"), "no file has figures of other"),
        ("a.png", ("m", "1", "2", "0"), "three numbers above 0, not '0'"),
        ("none/a.png", ("m", "1", "2", "3"), "cannot be written"),
    ],
)
def test_mistakes(tmp_path, image, model, reason):
    done = plot(tmp_path, image, *model)
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
