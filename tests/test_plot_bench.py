"""scripts/plot_bench.py: what it refuses, and that it draws."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    "engines, colours",
    [
        (["vLLM 1", "LMDeploy 1", "jaxserve"], {"jaxserve": "C0", "LMDeploy 1": "C1", "vLLM 1": "C2"}),
        (["other", "vLLM 2", "vLLM 1"], {"other": "C3", "vLLM 1": "C2", "vLLM 2": "C4"}),
    ],
)
def test_an_engine_has_its_colour(tmp_path, monkeypatch, engines, colours):
    """Whichever files there are, in whatever order."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    plot_bench = importlib.import_module("plot_bench")
    row = {"model": "m", "work": "lat1", "itl_ms": 2.0}
    for engine in engines:
        (tmp_path / engine).write_text(json.dumps(row | {"engine": engine}))
    axes = plot_bench.plt.figure().subplots()
    results = [tmp_path / engine for engine in engines]
    plot_bench.panel(axes, SimpleNamespace(results=results, bandwidth=4300, tflops=790), "m", 1e9, 2e9, 1e5)
    assert {line.get_label(): line.get_color() for line in axes.lines[:-1]} == colours
    plot_bench.plt.close("all")
