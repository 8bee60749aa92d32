"""llm-comply: what the published schemas of OpenAI's and Anthropic's APIs, and Open Responses', ask of a server."""

import importlib.resources
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.compat.conftest import MODEL

pytest.importorskip("llm_comply", reason="llm-comply is not installed: scripts/compat installs it")
# Its validator is made of what jsonschema would have replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*RefResolver:DeprecationWarning")

SUITES = {"openai-chat": "openai_chat", "open-responses": "openresponses", "anthropic": "anthropic"}


@pytest.fixture(scope="module")
def outcome(url):
    """What each suite found.  They run side by side: answers of a batch cost a CPU little more than one alone."""
    from llm_comply.config import ComplianceConfig
    from llm_comply.http import close_client
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests import get_tests

    def run(suite):
        header, bearer = ("x-api-key", False) if suite == "anthropic" else ("Authorization", True)
        config = ComplianceConfig(url, "key", MODEL, auth_header=header, use_bearer_prefix=bearer, timeout=240)
        spec = SpecLoader(str(importlib.resources.files("llm_comply") / "specs" / f"{SUITES[suite]}.json"))
        return TestRunner(config, get_tests(suite), spec).run_all().results

    with ThreadPoolExecutor(len(SUITES)) as pool:
        found = dict(zip(SUITES, pool.map(run, SUITES), strict=True))
    close_client()
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite, outcome):
    """Images are refused, as the models served here read text; reasoning is left out for models that have none."""
    failed = {result.id: result.errors for result in outcome[suite] if result.status.value == "failed"}
    image = [name for name in failed if "image" in name]
    assert [errors[0] for errors in map(failed.pop, image)] == ["HTTP 400 (expected [200])"]
    assert not failed
    skipped = [result.id for result in outcome[suite] if result.status.value == "skipped"]
    assert len(skipped) == 1 and ("reasoning" in skipped[0] or "thinking" in skipped[0])
