"""llm-comply on thoughts, which the default model has none of; tests/compat/test_comply.py has the whole suites."""

import importlib.resources

import pytest

from tests.serve import scripted

pytest.importorskip("llm_comply", reason="llm-comply is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its schema validator

NAME = "fake-claude-4-gpt-5"  # else it skips what has to do with thinking
THOUGHTS = {
    "openai-chat": ("openai_chat", "reasoning-summary"),
    "open-responses": ("openresponses", "reasoning-summary"),
    "anthropic": ("anthropic", "thinking-display"),
}


@pytest.fixture(scope="module")
def address():
    # Open Responses and OpenAI call a stream's pieces of reasoning by different names: ours are OpenAI's.
    def say(prompt):
        return ("<think>\nHm.\n</think>\n\n" if "reasoning" in prompt else "") + "Hello there, friend."

    options = {"reasoning_format": "think", "session_len": 4096, "names": [NAME]}
    with scripted.app(say, **options) as flask, scripted.serving(flask) as url:
        yield f"{url}/v1"


@pytest.mark.parametrize("suite", THOUGHTS)
def test_thoughts(suite, address):
    from llm_comply.config import ComplianceConfig
    from llm_comply.http import close_client
    from llm_comply.runner import TestRunner
    from llm_comply.schema import SpecLoader
    from llm_comply.tests import get_tests

    file, name = THOUGHTS[suite]
    header, bearer = ("x-api-key", False) if suite == "anthropic" else ("Authorization", True)
    config = ComplianceConfig(address, "key", NAME, auth_header=header, use_bearer_prefix=bearer)
    spec = SpecLoader(str(importlib.resources.files("llm_comply") / "specs" / f"{file}.json"))
    wanted = [test for test in get_tests(suite) if name in test.id]
    (result,) = TestRunner(config, wanted, spec).run_all().results
    close_client()
    assert result.status.value == "passed", result.errors
