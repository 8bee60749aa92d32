"""What `jaxserve check-env` prints: versions, devices, cache, settings, the default model; for a bug report, or a look.

Devices are asked for in a process of its own: whatever a broken driver does there (raise, hang, die), this one goes on.
"""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

from jaxserve import hub
from jaxserve._version import __version__

PACKAGES = [
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "triton", "jax-triton", "flax", "orbax-checkpoint"),
    *("safetensors", "gguf", "transformers", "tokenizers", "huggingface_hub", "jinja2"),
    *("flask", "gunicorn", "gevent", "msgspec", "orjson", "llguidance"),
    *("numpy", "ml_dtypes", "click", "prompt_toolkit"),
]
SETTINGS = ("JAXSERVE_", "JAX_", "XLA_", "CUDA_", "NVIDIA_", "NCCL_", "TRITON_", "TF_GPU_", "HF_", "LD_LIBRARY_PATH")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
GIB = 1 << 30

# Prints one line a device.
PROBE = """
import jax
for d in jax.devices():
    memory = d.memory_stats() if d.platform != "cpu" else None
    limit = (memory or {}).get("bytes_limit")
    room = f", {limit / 2**30:.1f} GiB for jax" if limit else ""
    capability = getattr(d, "compute_capability", None)
    print(f"{d.id}: {d.device_kind} ({d.platform}{f', compute capability {capability}' if capability else ''}){room}")
"""


def report(file: str | os.PathLike | None = None) -> str:
    """The report as text; written to `file` too where one is given (OSError where that fails)."""
    sections = {
        "jaxserve": [f"{__version__} in {Path(__file__).parent}"],
        "machine": _machine(),
        "packages": [f"{name} {_version(name)}" for name in PACKAGES],
        "devices": _devices(),
        "NVIDIA driver": _driver(),
        "cache": [_cache(hub.cache_dir())],
        "default model": [_default_model()],
        "settings": _settings() or ["none of " + " ".join(f"{name}*" for name in SETTINGS[:-1])],
    }
    lines = [line for title, content in sections.items() for line in (f"{title}:", *("  " + text for text in content))]
    text = "\n".join(lines)
    if file is not None:
        Path(file).write_text(text + "\n", encoding="utf-8")
    return text


def _machine() -> list[str]:
    memory = psutil.virtual_memory()
    total, free = memory.total / GIB, memory.available / GIB
    return [
        f"Python {platform.python_version()} ({sys.executable})",
        platform.platform(),
        f"{os.cpu_count()} processors, {total:.1f} GiB of memory, {free:.1f} GiB available",
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _run(*command: str, **environment: str) -> tuple[list[str], str]:
    """The lines a command prints, and why there are none: the last line of its errors, or how it ended."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=120, env={**os.environ, **environment}
        )
    except FileNotFoundError:
        return [], f"{command[0]} not found"
    except subprocess.TimeoutExpired:
        return [], f"no answer from {Path(command[0]).name} within 120 s"
    except OSError as error:
        return [], str(error)
    if done.returncode == 0:
        return done.stdout.splitlines(), ""
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return [], said[-1] if said else f"{Path(command[0]).name} ended with code {done.returncode}"


def _devices() -> list[str]:
    lines, problem = _run(sys.executable, "-c", PROBE, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    return lines or [f"jax cannot start: {problem}"]


def _driver() -> list[str]:
    query = "--query-gpu=index,name,memory.total,memory.used,driver_version"
    lines, problem = _run("nvidia-smi", query, "--format=csv,noheader")
    return lines or [problem]


def _cache(folder: Path) -> str:
    """The folder, what it holds, and whether it can be written."""
    try:
        if not folder.is_dir():
            return f"{folder}, made when it is first needed"
        files = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    except OSError as error:  # unreadable, or another process tidies up just now
        return f"{folder}: {error}"
    writable = "" if os.access(folder, os.W_OK) else ", not writable: every start compiles again"
    return f"{folder}, {len(files)} files, {sum(files) / GIB:.2f} GiB{writable}"


def _default_model() -> str:
    try:
        return str(hub.default_gguf())
    except ValueError as error:
        return str(error)


def _settings() -> list[str]:
    """The variables that change what jax, the GPU libraries and jaxserve do.  Secrets are named, not shown."""
    return [
        f"{name}={'(set)' if any(word in name.upper() for word in SECRET) else value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(SETTINGS)
    ]
