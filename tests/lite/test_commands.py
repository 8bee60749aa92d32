"""`jaxserve lite auto_gptq` and `smooth_quant` as commands: folders that load, and mistakes in one line."""

import json
import os
import signal
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.cli import main
from jaxserve.commands import lite
from jaxserve.config import EngineConfig
from jaxserve.engine.loading import open_model
from jaxserve.lite import making, report
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


def test_the_same_command_makes_a_report_that_is_missing(run, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no room")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(report, "write", fail)
        assert "no room" in run("smooth_quant").output
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert not (out / report.FILE).exists() and not list(tmp_path.glob(".out.partial/layer-*"))
    other = run("smooth_quant", "--alpha", "0.4")
    assert other.exit_code == 2 and "exists already" in other.output
    again = run("smooth_quant")
    assert again.exit_code == 0 and "out: is complete but for its report, which is made now" in again.output
    assert (out / report.FILE).exists() and (out / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "exists already" in run("smooth_quant").output


@pytest.mark.parametrize("files, words", [
    (["layer-00000.safetensors", "layer-00001.safetensors", "windows.safetensors"], "2 finished layers; the same "),
    (["windows.safetensors"], "the calibration text; the same command goes on from there"),
    (["left.json"], "out is complete but for its report, which the same command makes"),
    ([], "interrupted\n"),
])  # fmt: skip
def test_an_interrupted_run_tells_what_is_kept(run, tmp_path, monkeypatch, files, words):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    for folder in ("out", ".out.partial"):
        (tmp_path / folder).mkdir()
    for file in files:
        (tmp_path / ".out.partial" / file).touch()
    monkeypatch.setattr(making, "make", interrupt)
    monkeypatch.setattr(lite.os, "_exit", sys.exit)
    result = run("auto_gptq")
    assert result.exit_code == 130 and "interrupted" in result.output and words in result.output
    assert ("goes on" not in words) or f"kept in {tmp_path / '.out.partial'}: " in result.output


@pytest.mark.parametrize("command", ["auto_gptq", "calibrate"])
def test_a_folder_that_cannot_be_written(run, tmp_path, command):
    (tmp_path / "text.txt").touch()
    for folder, where in ((tmp_path / "text.txt" / "x", tmp_path / "text.txt"), ("/proc/x", "/proc")):
        result = run(command, "--work-dir", folder)
        assert result.exit_code == 2 and f": {folder} cannot be written in {where} (" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_no_such_model(run):
    result = run("auto_gptq", model="nowhere")
    assert result.exit_code == 2 and "nothing exists at this path" in result.output
