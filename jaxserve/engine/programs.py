"""Compiles programs before the first request, and keeps the executables on disk.

A stored executable is loaded without tracing or lowering anything, which is what makes a second start quick.  An entry
is one file named by a hash of all that the executable depends on; files are written aside and renamed, so processes can
share the folder; the oldest go when the folder outgrows its bound.  A folder that can't be written costs the speed-up
and nothing else.
"""

import gc
import hashlib
import logging
import os
import pickle
import platform
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import jax
from jax.experimental import serialize_executable

log = logging.getLogger("jaxserve")
CACHE_BYTES = 4 << 30
DIGEST = 32  # bytes of the hash ahead of an entry's data
ASIDE = ".part"  # ends the name of a file that is not finished
NOT_STARTED, PAUSES = "Failed to launch ptxas", (1, 2, 4)  # XLA's error, and seconds before it is asked again
STALE = 3600  # seconds after which nobody will finish it
# What a program is traced from.
SOURCES = ("cache.py", "leaf.py", "ops.py", "sampling.py", "step.py", "models", "quant")


def compile_all(jobs, devices, folder, progress=None, workers=None, tunes=None, stored=None):
    """{key: executable} of {key: (jitted function, arguments, compiler options)}, begun in this order.

    Arguments may be ShapeDtypeStructs on `devices`.  `progress(done, total, loaded)` is called after each; `folder`
    None keeps nothing; `stored()` is called first where all seem to be in it.  `tunes(key)` names what XLA tries out
    while it compiles a program: that is done once, if the first program with it is ready before it begins the others.
    """
    store, out, loaded = Store(folder, devices), {}, 0
    names = {key: store.name(key, *job) for key, job in jobs.items()}
    if stored and folder and all(os.path.exists(store.folder / name) for name in names.values()):
        stored()
    one_by_one = threading.Lock()

    def ready(key, executable):
        with one_by_one:
            out[key] = executable
            progress and progress(len(out), len(jobs), loaded)

    def finish(key, lowered, before):
        wait(before)
        executable = _compiled(lowered, jobs[key][2])
        store.save(names[key], executable)
        ready(key, executable)

    # Lowering holds the interpreter lock, compiling and loading do not.  It leaves little garbage, and to look for it
    # took a ninth of its time.
    collects = gc.isenabled()
    gc.disable()
    cores = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers or min(32, 2 * cores if tunes else cores))  # some wait
    try:
        for key, found in zip(names, pool.map(store.load, names.values())):
            if found is not None:
                loaded += 1
                ready(key, found)
        first: dict = {}
        running: list = []
        for key in names:
            if key in out:
                continue
            tuned = tunes(key) if tunes else ()
            before = {first[what] for what in tuned if what in first}  # all of these have begun
            running.append(pool.submit(finish, key, jobs[key][0].lower(*jobs[key][1]), before))
            first |= {what: running[-1] for what in tuned if what not in first}
            for future in running:
                if future.done():
                    future.result()  # an error ends it all
        for future in as_completed(running):
            future.result()
    finally:  # after an error, what has not begun will not
        if collects:
            gc.enable()
        pool.shutdown(wait=False, cancel_futures=True)
    store.trim()
    return out


def _compiled(lowered, options):
    """A lowered program, compiled.

    A host that has no room for one more process just then has it soon: so many are started, and so short they are.
    """
    for pause in (*PAUSES, None):
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if NOT_STARTED not in str(error) or pause is None:
                raise
            log.warning("a program was not compiled, once more in %d s: %s", pause, error)
            time.sleep(pause)


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
            entry = path.read_bytes()
            digest, data = entry[:DIGEST], entry[DIGEST:]
            # A damaged executable can end the process, and unpickling runs what a stranger put into a file.
            if hashlib.sha256(data).digest() != digest or path.stat().st_uid not in (0, os.geteuid()):
                return None
            payload, in_tree, out_tree = pickle.loads(data)
            executable = serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=self.devices
            )
        except Exception:  # there is none, or it is of another build: compile again and replace it
            return None
        try:
            os.utime(path)
        except OSError:
            pass
        return executable

    def save(self, name, executable):
        """Keeps an executable; a failure to do so is no error."""
        if name is None:
            return
        aside = None
        try:
            data = pickle.dumps(serialize_executable.serialize(executable))
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=ASIDE, delete=False) as out:
                aside = out.name
                out.write(hashlib.sha256(data).digest() + data)
            os.replace(aside, self.folder / name)
        except Exception as error:  # a full disk, a folder that can't be written, a program that can't be kept
            log.debug("%s is not kept: %s", name, error)
            if aside:
                _remove(aside)

    def trim(self, bound=CACHE_BYTES):
        """Removes the least recently used entries over `bound` bytes, and what killed processes left unfinished."""
        if not self.folder:
            return
        entries, now = [], time.time()
        try:
            with os.scandir(self.folder) as found:
                for entry in found:
                    if entry.is_file():
                        entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        except OSError:  # no folder, or another process trims too
            return
        total = sum(size for _, size, _ in entries)
        for used, size, path in sorted(entries):
            stale = path.endswith(ASIDE) and now - used > STALE
            if (stale or total > bound) and _remove(path):
                total -= size


def _remove(path):
    """Whether a file could be removed."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


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
    options = {name: getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_enable_x64")}
    versions = [jax.__version__, jax.lib.__version__, device.client.platform_version]
    place = [device.platform, device.device_kind, str(jax.device_count()), cpu]
    return "\n".join([*versions, *place, os.environ.get("XLA_FLAGS", ""), repr(options), source])
