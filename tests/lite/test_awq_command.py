"""`jaxserve lite auto_awq` and `calibrate` as commands: a folder with its report, options, and mistakes in one line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from jaxserve.cli import main
from jaxserve.commands import lite
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from jaxserve.lite import report, writing
from tests.lite.test_commands import model, run, text  # noqa: F401  fixtures


def test_a_folder_is_written_with_its_report(run, tmp_path):  # noqa: F811
    result = run("auto_awq")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"]) == ("awq", 4, 64)
    assert open_model(str(out), EngineConfig()).source.method == "awq"
    told = json.loads((out / report.FILE).read_text())
    before, after = told["rows"]
    assert 0 < after["disk"] < before["disk"]
    assert abs(np.log(after["perplexity"] / before["perplexity"])) < 0.5
    assert [set(layer) for layer in told["errors"]] == [{"mixer.qkv", "mixer.o", "ffn.gate_up", "ffn.down"}] * 2
    assert "perplexity" in result.output and "the error of every layer" in result.output
    assert " outputs " in result.output  # on a CPU these are what `layers` makes
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "errors, title", [([{"o": {"found": 1e-3, "nearest": 1e-2}}], "dotted: rounded to nearest"), ([{"o": 1e-3}], "")]
)
def test_the_plot_tells_of_what_it_has(tmp_path, errors, title):
    axes = report.draw(tmp_path / "plot.png", errors * 2, "weights").axes[0]
    assert "of a map's weights,\nas a share of their squares" in axes.get_ylabel()
    assert axes.get_title() == title and len(axes.lines) == (2 if title else 1)
    assert (tmp_path / "plot.png").stat().st_size > 1000


SCALES = [
    ((), None),
    (("--search-scale", "False"), False),
    (("--search_scale", "True"), True),
    (("--search-scale",), True),
    (("--search-scale=no",), False),
]


@pytest.mark.parametrize("words, value", SCALES, ids=str)
def test_search_scale_has_a_value_or_none(monkeypatch, words, value):
    seen = []
    monkeypatch.setattr(lite, "make", lambda name, *others: seen.append((name, others[-1])))
    for arguments in ((*words, "MODEL"), ("MODEL", *words), ("MODEL", *words, "--w-sym")):
        result = CliRunner().invoke(main, ["lite", "auto_awq", *arguments])
        assert result.exit_code == 0, result.output
    assert [(name, settings["search_scale"]) for name, settings in seen] == [("MODEL", value)] * 3


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ("--w-group-size", "128"),
            "groups of 128 do not divide the maps' inputs (64); --w-group-size 64 is the largest",
        ),
        (("--w-group-size", "4"), "a group has a multiple of 8 inputs, not 4; --w-group-size 64 is the largest here"),
        (("--w-bits", "8"), "'8' is not '4'"),
        (("--search-scale", "maybe"), "--search-scale stands alone, or before True or False, not before 'maybe'"),
        (("--search-scale=maybe",), "--search-scale"),
        (("--device", "tpu"), "--device is cuda or cpu, not tpu"),
        (("--calib-dataset", "none.txt"), "'none.txt' is no file"),
        (("--search-scale", "False", "--dtype", "int8"), "float16"),
    ],
)
def test_mistakes_are_told_in_a_line(run, tmp_path, options, words):  # noqa: F811
    result = run("auto_awq", *options)
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_activations_are_written(run, tmp_path):  # noqa: F811
    result = run("calibrate")
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "out" / "activations.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert found[f"{name}.absmax"].shape == (64,)
    assert (found[f"{name}.absmax"] >= found[f"{name}.absmean"]).all()
    assert (tmp_path / "out" / "activations.safetensors").stat().st_mode & 0o777 == 0o644


def test_no_folder_is_left_where_no_activations_are_written(run, tmp_path):  # noqa: F811
    result = run("calibrate", "--calib-dataset", "none.txt", "--work-dir", tmp_path / "new" / "out")
    assert result.exit_code == 2 and "'none.txt' is no file" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, words", [(0.004, "+5.40 % +- 0.40"), (None, "+5.40 % +- unknown (one window)")])
def test_a_change_is_told_with_its_error(error, words):
    row = {"disk": 2, "weights": 2, "perplexity": 2.0, "change": 0.054, "change_error": error, "agreement": 1.0}
    assert words in "\n".join(report.table([row | {"weights": 3}, row | {"tokens": 5}]))


def test_the_model_writes_its_own_text(model):  # noqa: F811
    found, _ = writing.windows(str(model), EngineConfig(num_tokens_per_iter=64), "self", 3, 24)
    assert found.shape == (3, 24) and found.dtype == np.int32
    assert len({tuple(window) for window in found}) == 3
