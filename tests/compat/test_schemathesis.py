"""schemathesis reads our OpenAPI document and sends what it allows, and what it does not: no answer may be a 5xx, and
every one, streams included, must be as the document says.

It runs by its command line, in a process of its own, with the hooks of tests/compat/fuzzing.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed: scripts/compat installs it"
)
ROOT = Path(__file__).parents[2]
SEED, EXAMPLES = 1, 8
# What the document allows may still be refused: whether a text fits, a model is here, a grammar can be compiled.
EXCLUDED = "positive_data_acceptance"
NEVER = {"POST /v1/responses/{id}/cancel"}  # accepts only what runs in the background at this moment
ITSELF = {"GET /openapi.json"}  # schemathesis reads it, and passes over it


def test_the_document_is_kept(server, tmp_path):
    report = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--seed", str(SEED), "--max-examples", str(EXAMPLES), "--phases", "coverage,fuzzing", "--workers", "2"),
        *("--exclude-checks", EXCLUDED, "--request-timeout", "120", "--continue-on-failure"),
        *("--generation-database", "none", "--no-color", "--output-sanitize", "false"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.compat.fuzzing", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=550)
    assert done.returncode == 0, f"{done.stdout[-20000:]}{done.stderr[-2000:]}"
    found = json.loads(report.read_text(encoding="utf-8"))
    paths = json.loads(server.get("/openapi.json")[1])["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert found["valid_rates"].keys() == operations - ITSELF
    accepted = {
        name: sum(phase["accepted"] for phase in rates.values()) for name, rates in found["valid_rates"].items()
    }
    assert {name for name, times in accepted.items() if not times} <= NEVER
    assert server.get("/health")[0] == 200
