"""The files for those who run servers: what can be said of them without a container engine or systemd."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def text(name):
    return (PROJECT / name).read_text(encoding="utf-8")


def test_the_image():
    lines = text("Dockerfile").replace("\\\n", " ").splitlines()
    last = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert any(line.startswith("USER ") and line.split()[1] not in ("0", "root") for line in last)
    assert any(line.startswith("HEALTHCHECK ") and "/health" in line for line in last)
    assert any(line.startswith("ENTRYPOINT [") for line in last), "a shell would keep SIGTERM to itself"
    model = re.search(r"model_wheel='(.+)'", text("scripts/venv.sh"))[1]
    assert model in text("Dockerfile")
    commands = {line.split()[0] for line in lines if line and not line.startswith(("#", " "))}
    known = "ARG FROM RUN WORKDIR COPY ENV VOLUME USER EXPOSE STOPSIGNAL HEALTHCHECK ENTRYPOINT CMD"
    assert commands == set(known.split())


def test_what_the_image_is_made_from():
    """What setup.cfg and pyproject.toml name, and nothing else: no history, no environment, no keys."""
    lines = [line for line in text(".dockerignore").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {
        *("jaxserve", "pallas_kernels", "constraints.txt", "LICENSE", "pyproject.toml", "README.md", "setup.cfg"),
    }
    assert all((PROJECT / name).exists() for name in let_in)


def test_the_composition():
    given = text("compose.yaml")
    for words in (
        "read_only: true",
        "cap_drop: [ALL]",
        "no-new-privileges:true",
        '"127.0.0.1:23333:23333"',
        "cache:/cache",
    ):
        assert words in given
    assert "JAXSERVE_API_KEYS:?" in given, "without a key it must not start"


def test_the_unit(tmp_path):
    given = text("deploy/jaxserve.service")
    for words in ("DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "KillMode=mixed", "--api-key-file"):
        assert words in given
    assert int(re.search(r"TimeoutStopSec=(\d+)", given)[1]) > 30  # --graceful-timeout
    if not shutil.which("systemd-analyze"):
        pytest.skip("needs systemd-analyze to read the whole unit")
    unit = tmp_path / "jaxserve.service"
    unit.write_text(given.replace("/opt/jaxserve/bin/jaxserve", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, env={"PATH": os.defpath}
    )
    complaints = [line for line in done.stderr.splitlines() if "jaxserve" in line]
    assert done.returncode == 0 and not complaints, done.stderr


def test_the_audit():
    assert os.access(PROJECT / "scripts" / "audit", os.X_OK)
    assert subprocess.run(["sh", "-n", PROJECT / "scripts" / "audit"]).returncode == 0
    assert "--strict" in text("scripts/audit")
