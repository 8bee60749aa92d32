"""Imports point down, and through few doors: what keeps a part readable without the others."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT / "jaxserve"

# Lowest first.  A module imports from lower rows, or from its own folder.
LAYERS = [
    "knobs",
    "_version config mesh ops progress",
    "cache checkpoint quant",
    "models sampling",
    "leaf",
    "hub step weights",
    "engine text",
    "reply",
    "bodies pipeline",
    "bench options protocol terminal voice",
    "answers lite",
    "check_env commands convert serve",
    "cli",
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}

# Stricter than their row.
ONLY = {
    "checkpoint": {"_version"},
    "text": {"config"},
    "hub": {"checkpoint"},
    "config": {"knobs"},
    "mesh": set(),
    "ops": set(),
}

# These know nothing of devices: they are tested, and start, without jax.
NO_JAX = [
    *("jaxserve", "jaxserve.config", "jaxserve.cli", "jaxserve.hub", "jaxserve.pipeline", "jaxserve.check_env"),
    *("jaxserve.answers", "jaxserve.reply", "jaxserve.commands.batch", "jaxserve.voice"),
    *("jaxserve.engine.pages", "jaxserve.engine.request", "jaxserve.engine.scheduler", "jaxserve.engine.link"),
    *("jaxserve.engine.guide", "jaxserve.engine.matchers", "jaxserve.engine.recovery"),
    *(f"jaxserve.serve.{path.stem}" for path in sorted(ROOT.glob("serve/[!_]*.py"))),
    *(f"jaxserve.{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("text/[!_]*.py"))),
    *(f"jaxserve.text.tools.{path.stem}" for path in sorted(ROOT.glob("text/tools/[!_]*.py"))),
    *(f"jaxserve.{path.parent.name}.{path.stem}" for path in sorted(ROOT.glob("checkpoint/[!_]*.py"))),
]


def sources(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path):
    """The full names of what a file imports, wherever in it: `a.b` for `import a.b` and for `from a import b`."""
    package = path.relative_to(PROJECT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parts(path):
    """Where a file of jaxserve stands: ("engine", "pages"), ("ops",)."""
    return path.relative_to(ROOT).with_suffix("").parts


def uses(path):
    """What a file of jaxserve imports of jaxserve, by the same parts: ("engine", "pages", "PagePool")."""
    for name in imports(path):
        if name.startswith("jaxserve."):
            used = tuple(name.split(".")[1:])
            yield ("_version",) if used == ("__version__",) else used


INSIDE = [path for path in sources(ROOT) if parts(path) not in (("__init__",), ("__main__",))]


@pytest.mark.parametrize("path", INSIDE, ids=lambda path: "/".join(parts(path)))
def test_imports_point_down(path):
    own = parts(path)[0]
    assert own in LEVEL, f"{path} stands in no layer: add it to LAYERS above"
    for used, *rest in uses(path):
        assert used in LEVEL, f"{path} imports {used}, which stands in no layer"
        assert used == own or LEVEL[used] < LEVEL[own], f"{path} imports {used}, which is not below it"
        assert used == own or used in ONLY.get(own, LEVEL), f"{path} imports {'.'.join([used, *rest])}"


def importers(*name):
    return {"/".join(parts(path)) for path in INSIDE if any(used[: len(name)] == name for used in uses(path))}


def test_only_ops_knows_the_kernels():
    kernels = {"/".join(parts(p)) for p in INSIDE if any(n.split(".")[0] == "pallas_kernels" for n in imports(p))}
    assert kernels == {"ops"}


def test_only_the_runner_steps():
    assert importers("step") == {"engine/runner"}


def test_the_engine_is_entered_by_its_doors():
    doors = {"engine", "link", "loading", "request"}
    for path in INSIDE:
        if parts(path)[0] != "engine":
            for used in uses(path):
                assert used[0] != "engine" or used[1] in doors, f"{path} imports {'.'.join(used)}"


def test_kernels_know_nothing_of_jaxserve():
    for path in sources(PROJECT / "pallas_kernels"):
        assert not [name for name in imports(path) if name.split(".")[0] == "jaxserve"], path


def test_no_torch():
    for folder in ("jaxserve", "pallas_kernels", "scripts", "tests"):
        for path in sources(PROJECT / folder):
            if path != PROJECT / "tests" / "data" / "families" / "make.py":  # made the golden files, once
                assert not [name for name in imports(path) if name.split(".")[0] == "torch"], path


def test_the_host_side_starts_without_jax():
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = {"jax", "jaxlib", "flax", "transformers", "torch"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
"""
    done = subprocess.run([sys.executable, "-c", code, *NO_JAX], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
