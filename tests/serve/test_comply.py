"""llm-comply's suites, which hold answers against the published schemas of the APIs; without a model."""

import importlib.resources

import pytest

from tests.serve import scripted

pytest.importorskip("llm_comply", reason="llm-comply is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its schema validator

NAME = "fake-claude-4-gpt-5"  # else it skips what has to do with thinking
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"location": "San Francisco"}}\n</tool_call>'
SUITES = {"open-responses": "openresponses", "anthropic": "anthropic"}


def say(prompt):
    if "get_weather" in prompt:
        return CALL
    # Open Responses and OpenAI call a stream's pieces of reasoning by different names: ours are OpenAI's.
    return ("<think>\nHm.\n</think>\n\n" if "reasoning" in prompt else "") + "Hello there, friend."


@pytest.fixture(scope="module")
def address():
    options = {"tool_format": "hermes", "reasoning_format": "think", "session_len": 4096, "names": [NAME]}
    with scripted.app(say, **options) as flask, scripted.serving(flask) as url:
        yield f"{url}/v1"


@pytest.mark.parametrize("suite", SUITES)
def test_suite(suite, address):
    from llm_comply.config import ComplianceConfig
    from llm_comply.http import close_client
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests import get_tests

    header, bearer = ("x-api-key", False) if suite == "anthropic" else ("Authorization", True)
    config = ComplianceConfig(address, "key", NAME, auth_header=header, use_bearer_prefix=bearer)
    spec = SpecLoader(str(importlib.resources.files("llm_comply") / "specs" / f"{SUITES[suite]}.json"))
    results = TestRunner(config, get_tests(suite), spec).run_all().results
    close_client()
    failed = {result.id: result.errors for result in results if result.status.value != "passed"}
    images = {name: errors for name, errors in failed.items() if "image" in name}
    assert failed == images, failed  # the models served here read text: an image is a 400
    assert all("HTTP 400" in errors[0] for errors in images.values()) and len(images) <= 1
