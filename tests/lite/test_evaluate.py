"""`jaxserve lite eval`: its numbers against an oracle's, and its command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxserve.cli import main
from jaxserve.config import EngineConfig
from jaxserve.lite import evaluate
from tests import oracle
from tests.quant import folders
from tests.serve import tiny

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, the same one rounded to 4 bits, and the latter's weights as values."""
    root = tmp_path_factory.mktemp("models")
    plain, packed = root / "plain", root / "packed"
    plain.mkdir()
    packed.mkdir()
    tiny.write(plain)
    hf = json.loads((plain / "config.json").read_text())
    values = folders.write(packed, hf, "awq", 32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (packed / name).write_bytes((plain / name).read_bytes())
    return plain, packed, values


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def expected(checkpoint, config, windows):
    """Cross entropies and likeliest tokens."""
    nll, top = [], []
    for window in windows:
        logits = oracle.logits(checkpoint, config, window)[:-1]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll.append(-logprobs[np.arange(len(window) - 1), window[1:]])
        top.append(logits.argmax(-1))
    return np.stack(nll), np.stack(top)


def test_numbers_are_the_oracles(models, text):
    plain, packed, values = models
    config = EngineConfig(dtype="float32", num_tokens_per_iter=64)
    settings = {"text": text, "seqlen": 100, "samples": 5}
    windows = evaluate.text_windows(plain, config, **settings)
    assert windows.shape == (5, 100)
    hf = json.loads((packed / "config.json").read_text())
    want_nll, want_top = expected(plain, None, windows)
    other_nll, other_top = expected(values, hf, windows)
    nll, top = evaluate.score(plain, config, windows)
    assert nll.dtype == np.float64 and top.dtype == np.int32
    np.testing.assert_allclose(nll, want_nll, atol=1e-4)
    np.testing.assert_array_equal(top, want_top)

    told = []
    first, second = evaluate.compare([plain, packed], config, report=told.append, **settings)
    assert first["perplexity"] == pytest.approx(np.exp(want_nll.mean()), rel=1e-4)
    assert second["perplexity"] == pytest.approx(np.exp(other_nll.mean()), rel=1e-3)
    assert second["change"] == pytest.approx(np.exp(other_nll.mean() - want_nll.mean()) - 1, abs=1e-3)
    assert second["agreement"] == pytest.approx((other_top == want_top).mean(), abs=0.01)
    assert first["agreement"] is None and first["change"] == 0 and first["tokens"] == 5 * 99
    assert first["weights"] == "float32" and second["weights"] == "awq 4 bits g32"
    assert second["file_bytes"] < first["file_bytes"] and second["weight_bytes"] <= first["weight_bytes"]
    shown = evaluate.table([first, second]).splitlines()
    assert len({line.index("float32") if "float32" in line else line.index("awq 4") for line in shown[1:]}) == 1
    assert told[0] == "5 windows of 100 tokens" and len(told) == 3


def test_a_change_and_its_error():
    nll, first = np.array([[1.1, 1.3], [2.0, 2.0]]), np.array([[1.0, 1.0], [2.0, 2.0]])
    top = np.array([[1, 2], [3, 4]])
    row = evaluate.figures(nll, top, first, np.array([[1, 2], [3, 0]]))
    assert row["change"] == pytest.approx(np.exp(0.1) - 1)
    assert row["change_error"] == pytest.approx(np.exp(0.1) * 0.1)
    assert row["agreement"] == 0.75
    assert evaluate.figures(nll[:1], top[:1], first[:1], top[:1])["change_error"] is None


def test_bytes_of_a_folder_are_its_weights(tmp_path):
    """Not what stands beside them: a plot, or the same weights in another format."""
    for name, size in (("model.safetensors", 5), ("original.pth", 70), ("plot.png", 300), ("config.json", 9)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert evaluate.file_bytes(tmp_path) == 5
    (tmp_path / "model.safetensors").unlink()
    assert evaluate.file_bytes(tmp_path) == 370 and evaluate.file_bytes(tmp_path / "plot.png") == 300


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, ["lite", *map(str, arguments)], prog_name="jaxserve")


def test_the_command(run, models, text, tmp_path):
    small = ("--text", text, "--seqlen", 64, "--samples", 2)
    result = run("eval", models[0], *small, "--quant-policy", "none,int8", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "rows.json").read_text())
    first, second = report["rows"]
    assert f"{second['perplexity']:.4f}" in result.output and report["protocol"]["seqlen"] == 64
    assert (first["kv"], second["kv"]) == ("as computed", "int8") and 0 < abs(second["change"]) < 0.05
    assert second["kv_bytes_per_token"] < first["kv_bytes_per_token"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_a_full_disk_is_named_under_the_table(run, models, text):
    result = run("eval", models[0], "--text", text, "--seqlen", 64, "--samples", 2, "--json", "/dev/full")
    assert result.exit_code == 2 and "/dev/full could not be written: No space left on device" in result.output
    assert "same top-1" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--text", "none.txt"), "'none.txt' is no file"),
        (("--text", "{text}", "--seqlen", "900000"), "give more text or shorter windows"),
        (("--text", "{text}", "--skip", "99"), "nothing is left"),
        (("--text", "{text}", "--quant-policy", "0,7"), "not '7'"),
        (("--text", "{text}", "nowhere"), "nothing exists at this path"),
        (("--text", "{text}", "--json", "no/where.json"), "No such file or directory: 'no/where.json'"),
        ((), "Missing option '--text'"),
    ],
)
def test_mistakes_are_told_in_a_line(run, models, text, arguments, words):
    result = run("eval", models[0], *(argument.format(text=text) for argument in arguments))
    assert result.exit_code == 2
    assert words in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) <= 2


def test_models_with_other_tokens_are_not_compared(run, models, text, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tiny.write(other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(spec))
    result = run("eval", models[0], other, "--text", text, "--seqlen", 64)
    assert result.exit_code == 2 and "makes other tokens of this text" in result.output


def test_lmdeploys_spelling(run):
    assert run("eval", "--quant_policy", "9", "--text", "x").exit_code == 2
    assert "--quant-policy" in run("eval", "-h").output
