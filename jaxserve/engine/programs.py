"""Compiles programs before the first request, and keeps the executables on disk.

A stored executable is loaded without tracing or lowering anything, which is what makes a second start quick.  An entry
is one file named by a hash of all that the executable depends on; files are written aside and renamed, so processes can
share the folder; the oldest go when the folder outgrows its bound.  A folder that can't be written costs the speed-up
and nothing else.
"""

import hashlib
import os
import pickle
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.experimental import serialize_executable

CACHE_BYTES = 4 << 30
SOURCES = ("cache.py", "ops.py", "sampling.py", "step.py", "models", "quant")  # what a program is traced from


def compile_all(jobs, devices, folder, progress=None, workers=None):
    """{key: executable} of {key: (jitted function, arguments, compiler options)}.

    Arguments may be ShapeDtypeStructs on `devices`.  `progress(done, total, loaded)` is called after each; `folder`
    None keeps nothing.
    """
    store = Store(folder, devices)
    done, loaded, out = 0, 0, {}
    missing = []
    for key, job in jobs.items():
        found = store.load(store.name(key, *job))
        if found is None:
            missing.append(key)
        else:
            out[key] = found
            done, loaded = done + 1, loaded + 1
            progress and progress(done, len(jobs), loaded)

    def compile_one(key_lowered):
        key, lowered = key_lowered
        executable = lowered.compile(compiler_options=jobs[key][2])
        store.save(store.name(key, *jobs[key]), executable)
        return key, executable

    def lowered():
        for key in missing:
            function, arguments, _ = jobs[key]
            yield key, function.lower(*arguments)

    # Lowering holds the interpreter lock, compiling does not.
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for key, executable in pool.map(compile_one, lowered()):
            out[key] = executable
            done += 1
            progress and progress(done, len(jobs), loaded)
    store.trim()
    return out


class Store:
    """Executables in a folder."""

    def __init__(self, folder, devices):
        self.folder, self.devices = folder and Path(folder), devices
        self.machine = _machine() if folder else ""

    def name(self, key, function, arguments, options=None):
        """The entry's file name: a hash of the program, its arguments' shapes, types and places, and the machine."""
        if not self.folder:
            return None
        leaves, tree = jax.tree.flatten(arguments)
        text = [self.machine, repr(key), function.__name__, repr(options), str(tree)]
        text += [
            f"{x.shape} {x.dtype} {getattr(x, 'sharding', None)}" if hasattr(x, "shape") else repr(x) for x in leaves
        ]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:40]

    def load(self, name):
        """The executable, or None where there is none that this process can use."""
        if name is None:
            return None
        path = self.folder / name
        try:
            payload, in_tree, out_tree = pickle.loads(path.read_bytes())  # our own file, in the user's own folder
            executable = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=self.devices
            )
        except FileNotFoundError:
            return None
        except Exception:  # a damaged file or one of another build: compile again and replace it
            return None
        try:
            os.utime(path)
        except OSError:
            pass
        return executable

    def save(self, name, executable):
        """Keeps an executable; a failure to write is no error."""
        if name is None:
            return
        try:
            data = pickle.dumps(serialize_executable.serialize(executable))
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as out:
                out.write(data)
            os.replace(out.name, self.folder / name)
        except (OSError, ValueError, TypeError):
            pass

    def trim(self, bound=CACHE_BYTES):
        """Removes the least recently used entries over `bound` bytes."""
        if not self.folder or not self.folder.is_dir():
            return
        try:
            entries = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in os.scandir(self.folder))
            total = sum(size for _, size, _ in entries)
            for _, size, path in entries:
                if total <= bound:
                    break
                os.unlink(path)
                total -= size
        except OSError:  # another process trims too
            pass


def _machine():
    """All that an executable depends on besides the program and its arguments."""
    device = jax.devices()[0]
    root = Path(__file__).parents[1]
    files = sorted(
        f for name in SOURCES for f in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py"))
    )
    files += sorted((root.parent / "pallas_kernels").rglob("*.py")) + sorted(
        (root.parent / "pallas_kernels").rglob("*.json")
    )
    source = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    cpu = ""
    if device.platform == "cpu":  # code for one processor does not run on another
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
        cpu = "\n".join(line for line in lines[:40] if line.startswith(("model name", "flags", "Features")))
    options = {k: v for k, v in jax.config.values.items() if k in ("jax_default_matmul_precision", "jax_enable_x64")}
    versions = [jax.__version__, jax.lib.__version__]
    place = [device.platform, device.device_kind, str(jax.device_count()), cpu]
    return "\n".join([*versions, *place, os.environ.get("XLA_FLAGS", ""), repr(options), source])
