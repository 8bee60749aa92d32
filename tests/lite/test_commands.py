"""`jaxserve lite auto_gptq` and `smooth_quant` as commands: folders that load, and mistakes in one line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from tests.serve import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("model"), intermediate_size=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(model, text, tmp_path):
    def run(command, *more, model=model):
        small = (
            "--calib-dataset",
            text,
            "--calib-samples",
            "4",
            "--calib-seqlen",
            "32",
            "--work-dir",
            tmp_path / "out",
        )
        arguments = map(str, ("lite", command, model, *small, *more))
        return CliRunner().invoke(main, list(arguments), prog_name="jaxserve")

    return run


CASES = [
    ("auto_gptq", ("--w_group_size", "32"), {"bits": 4, "group_size": 32, "sym": True}),
    ("smooth_quant", ("--quant-dtype", "fp8"), {"quant_dtype": "float8_e4m3fn"}),
]


@pytest.mark.parametrize("command, options, expected", CASES, ids=str)
def test_a_folder_is_written(run, tmp_path, command, options, expected):
    result = run(command, *options)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert expected.items() <= found.items()
    held = open_model(str(out), EngineConfig())
    params = held.read()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (params.embed, params.layers[0].norm1))
    again = run(command, *options)
    assert again.exit_code == 2 and "exists already" in again.output and "Traceback" not in again.output
    quantized = run(command, "--work-dir", tmp_path / "other", model=out)
    assert quantized.exit_code == 2 and "are quantized already" in quantized.output


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("auto_gptq", ("--w-group-size", "40"), "groups of 40 do not divide the maps' inputs (64)"),
        ("auto_gptq", ("--w-bits", "3"), "'3' is not one of"),
        ("auto_gptq", ("--calib-dataset", "none.txt"), "'none.txt' is no file"),
        ("auto_gptq", ("--calib-seqlen", "2000"), "give more text or shorter windows"),
        ("smooth_quant", ("--quant-dtype", "float8_e5m2"), "--quant-dtype is fp8, int8, float8_e4m3fn"),
        ("smooth_quant", ("--alpha", "2"), "2.0 is not in the range"),
        ("smooth_quant", ("--alpha", "nan"), "nan is not in the range 0<=x<=1"),
        ("auto_gptq", ("--damping", "nan"), "nan is not in the range 0<=x<=1"),
    ],
)
def test_mistakes_are_told_in_a_line(run, command, options, words):
    result = run(command, *options)
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_lmdeploys_other_options(run, tmp_path):
    """Where they are of no use they are said to be ignored, and not refused."""
    result = run("smooth_quant", "--search-scale", "False", "--device", "cpu")
    assert result.exit_code == 0 and "ignored" not in result.output, result.output
    more = ("--search-scale", "--trust-remote-code", "--work-dir", tmp_path / "other", "--calib-seqlen", "2000")
    result = run("calibrate", *more)
    for words in ("--search-scale is ignored: auto_awq alone", "--trust-remote-code is ignored", "give more text"):
        assert words in result.output


def test_one_window_is_too_few(run, tmp_path):
    """Nothing of such a run is kept, for it could not go on."""
    result = run("auto_awq", "--calib-seqlen", "600")
    assert result.exit_code == 2 and "fills one window of 600 tokens; one more is needed" in result.output
    assert not list(tmp_path.iterdir())


def test_no_such_model(run):
    result = run("auto_gptq", model="nowhere")
    assert result.exit_code == 2 and "nothing exists at this path" in result.output
