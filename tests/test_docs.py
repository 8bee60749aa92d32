"""The documents keep up with the code: every option has its counterpart, every link leads somewhere."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from jaxserve import config, options
from jaxserve.serve import options as server

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]
COMING = (PROJECT / "docs" / "coming-from.md").read_text(encoding="utf-8")
HERE_ALONE = {"seed"}  # no option of LMDeploy's


def words(name):
    return "--" + name.rstrip("_").replace("_", "-")


@pytest.mark.parametrize(
    "names",
    [
        {knob.name for knob in fields(config.EngineConfig)} - HERE_ALONE,
        {knob.name for knob in fields(server.ServerOptions)} - {"capability"} | {"cap"},
        *(config.UNUSED_ENGINE, config.MISSING_ENGINE, options.RENAMED, options.MISSING_COMMAND),
        *(options.UNUSED_COMMAND, server.UNUSED_SERVER),
    ],
    ids=["engine", "server", "unused", "missing", "renamed", "missing-command", "unused-command", "unused-server"],
)
def test_every_option_has_its_counterpart(names):
    told = set(re.findall(r"--[a-z][a-z0-9-]+", COMING)) | {f"--{one}" for one in ("device-type",)}
    missing = {words(name) for name in names} - told
    assert not missing, f"docs/coming-from.md says nothing of {sorted(missing)}"


def test_what_is_ignored_and_what_is_refused():
    rows = [row for row in COMING.splitlines() if row.startswith("|")]

    def said(name, how):
        return any(words(name) in re.findall(r"--[a-z][a-z0-9-]+", row) and how in row for row in rows)

    ignored = [*config.UNUSED_ENGINE, *options.UNUSED_COMMAND, *server.UNUSED_SERVER]
    assert [name for name in ignored if name != "device_type" and not said(name, "*ignored*")] == []
    assert [name for name in (*config.MISSING_ENGINE, *options.MISSING_COMMAND) if not said(name, "*refused*")] == []


def test_every_field_of_a_generation_config():
    for name in (*config.UNUSED_GENERATION, *config.MISSING_GENERATION):
        assert f"`{name}`" in COMING, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("picture", sorted(PROJECT.glob("docs/*.png")), ids=lambda path: path.name)
def test_pictures_are_small(picture):
    assert picture.stat().st_size < 200_000
