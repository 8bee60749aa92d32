"""Stored programs: found again, replaced when damaged, shared, bounded, and never taken for others."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve import mesh as meshes
from jaxserve.engine import programs
from jaxserve.engine.programs import ASIDE, STALE, Store, compile_all

SHAPES = (4, 8, 16)


@jax.jit
def double(x):
    return x * 2 + 1


def struct(size, devices=1, dtype=jnp.float32, axis=None):
    where = meshes.sharding(meshes.make_mesh(devices), axis)
    return jax.ShapeDtypeStruct((size,), dtype, sharding=where)


def jobs(devices=1, sizes=SHAPES, **changes):
    return {size: (double, (struct(size, devices, **changes),), None) for size in sizes}


class Compiled:
    """compile_all in a folder, counting."""

    def __init__(self, folder, devices=1, **changes):
        self.seen = []
        self.programs = compile_all(
            jobs(devices, **changes), jax.devices()[:devices], folder, lambda *counts: self.seen.append(counts)
        )
        self.loaded = self.seen[-1][2]

    def works(self):
        return all((f(jnp.ones(size)) == 3).all() for size, f in self.programs.items())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "programs"


def test_a_second_start_loads_everything(folder):
    first = Compiled(folder)
    assert first.seen == [(1, 3, 0), (2, 3, 0), (3, 3, 0)] and first.works()
    assert len(list(folder.iterdir())) == 3 and folder.stat().st_mode & 0o777 == 0o700
    second = Compiled(folder)
    assert second.seen == [(1, 3, 1), (2, 3, 2), (3, 3, 3)] and second.works()
    assert list(second.programs) == list(SHAPES)


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Compiled(None).works()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"junk", "half", "bit", "unpickled"])
def test_a_damaged_entry_is_replaced(folder, damage):
    Compiled(folder)
    for path in folder.iterdir():
        data = path.read_bytes()
        if damage == "half":
            path.write_bytes(data[: len(data) // 2])
        elif damage == "bit":
            path.write_bytes(data[:-1000] + bytes([data[-1000] ^ 1]) + data[-999:])
        elif damage == "unpickled":
            path.write_bytes(pickle.dumps((b"not an executable", None, None)))
        else:
            path.write_bytes(damage)
    again = Compiled(folder)
    assert again.loaded == 0 and again.works()
    assert Compiled(folder).loaded == 3
    assert len(list(folder.iterdir())) == 3


def test_what_another_user_wrote_is_not_unpickled(folder, monkeypatch):
    Compiled(folder)
    owner = os.geteuid()
    monkeypatch.setattr(programs.os, "geteuid", lambda: owner + 1)
    assert Compiled(folder).loaded == (3 if owner == 0 else 0)  # root may prepare a folder for all
    if owner == 0:
        for path in folder.iterdir():
            os.chown(path, owner + 2, -1)
        assert Compiled(folder).loaded == 0


@pytest.mark.parametrize("where", ["a file", "in a file", "in /proc"])
def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, where):
    (tmp_path / "taken").write_text("not a folder")
    folder = {"a file": tmp_path / "taken", "in a file": tmp_path / "taken" / "programs", "in /proc": Path("/proc/x")}
    assert Compiled(folder[where]).works()
    assert (tmp_path / "taken").read_text() == "not a folder" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_looked_at_costs_only_time(tmp_path):
    folder = tmp_path / ("long" * 100)  # as where a folder above it is another user's
    with pytest.raises(OSError, match="too long"):
        folder.stat()
    programs = compile_all(jobs(), jax.devices()[:1], folder, stored=lambda: pytest.fail("nothing is stored"))
    assert sorted(programs) == sorted(SHAPES)


def test_entries_of_a_read_only_folder_are_used(folder, monkeypatch):
    Compiled(folder)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    for name in ("utime", "unlink", "replace"):
        monkeypatch.setattr(programs.os, name, refuse)
    monkeypatch.setattr(programs.tempfile, "NamedTemporaryFile", refuse)
    assert Compiled(folder).loaded == 3
    assert Compiled(folder, sizes=(32,)).works()


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(programs.os, "replace", full)
    assert Compiled(folder).works()
    assert list(folder.iterdir()) == []


def test_a_program_that_cannot_be_kept_still_runs(folder, monkeypatch):
    def refuse(*_):
        raise NotImplementedError("serialize_executables with const_args")

    monkeypatch.setattr(programs.serialize_executable, "serialize", refuse)
    assert Compiled(folder).works()


def test_an_error_ends_the_compiling(folder):
    def broken(x):
        raise ValueError("this one cannot be traced")

    bad = jobs() | {"broken": (jax.jit(broken), (struct(4),), None)}
    with pytest.raises(ValueError, match="cannot be traced"):
        compile_all(bad, jax.devices()[:1], folder)


WORKER = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from pathlib import Path
from tests.engine.test_programs import Compiled
for _ in range(3):
    assert Compiled(Path(sys.argv[1]), sizes=range(4, 12)).works()
"""


def test_two_processes_share_a_folder(folder):
    here = Path(__file__).parents[2]
    command = [sys.executable, "-c", WORKER, str(folder)]
    both = [subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    entries = list(folder.iterdir())
    assert len(entries) == 8 and not any(path.name.endswith(ASIDE) for path in entries)
    assert Compiled(folder, sizes=range(4, 12)).loaded == 8  # what another process compiled serves here


def age(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_least_recently_used_go(folder):
    folder.mkdir()
    for i, name in enumerate("abcde"):
        (folder / name).write_bytes(bytes(100))
        age(folder / name, 100 - i)
    store = Store(folder, jax.devices()[:1])
    store.trim(bound=500)
    assert len(list(folder.iterdir())) == 5
    store.trim(bound=250)
    assert sorted(path.name for path in folder.iterdir()) == ["d", "e"]


def test_use_makes_an_entry_recent(folder):
    Compiled(folder)
    for path in folder.iterdir():
        age(path, 1000)
    Compiled(folder, sizes=SHAPES[:1])
    Store(folder, jax.devices()[:1]).trim(bound=max(path.stat().st_size for path in folder.iterdir()))
    assert Compiled(folder, sizes=SHAPES[:1]).loaded == 1
    assert len(list(folder.iterdir())) == 1


def test_what_a_killed_process_left_goes_when_nobody_can_want_it(folder):
    Compiled(folder)
    (folder / f"old{ASIDE}").write_bytes(b"half")
    (folder / f"new{ASIDE}").write_bytes(b"half")  # another process may be writing it
    (folder / "folder").mkdir()
    age(folder / f"old{ASIDE}", STALE + 60)
    assert Compiled(folder).loaded == 3
    names = {path.name for path in folder.iterdir()}
    assert f"old{ASIDE}" not in names and {f"new{ASIDE}", "folder"} < names and len(names) == 5


def test_trimming_while_another_process_trims(folder, monkeypatch):
    Compiled(folder)
    unlink = os.unlink

    def first_elsewhere(path):
        unlink(path)
        unlink(path)  # FileNotFoundError

    monkeypatch.setattr(programs.os, "unlink", first_elsewhere)
    Store(folder, jax.devices()[:1]).trim(bound=0)
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
    Store(folder, jax.devices()[:1]).trim(bound=0)


def test_names_tell_programs_apart(folder):
    store = Store(folder, jax.devices()[:4])

    def triple(x):
        return x * 3

    with jax.default_matmul_precision("highest"):
        precise = Store(folder, jax.devices()[:4]).name("key", double, (struct(8),))
    names = [
        store.name("key", double, (struct(8),)),
        store.name("other", double, (struct(8),)),
        store.name("key", jax.jit(triple), (struct(8),)),
        store.name("key", double, (struct(16),)),
        store.name("key", double, (struct(8, dtype=jnp.int32),)),
        store.name("key", double, (struct(8, 2),)),
        store.name("key", double, (struct(8, 4),)),
        store.name("key", double, (struct(8, 4, axis="tp"),)),
        store.name("key", double, ((struct(8), struct(8)),)),
        store.name("key", double, (struct(8),), {"xla_cpu_enable_fast_math": True}),
        precise,
    ]
    assert len(set(names)) == len(names)
    assert names[0] == Store(folder, jax.devices()[:4]).name("key", double, (struct(8),))


def test_devices_do_not_collide(folder):
    assert Compiled(folder).works()
    split = Compiled(folder, 2, axis="tp")
    assert split.loaded == 0
    again = Compiled(folder, 2, axis="tp")
    assert again.loaded == 3
    x = jax.device_put(jnp.ones(8), struct(8, 2, axis="tp").sharding)
    assert (again.programs[8](x) == 3).all() and len(again.programs[8](x).devices()) == 2


@pytest.mark.parametrize(
    "change",
    ["jaxserve/step.py", "jaxserve/models/llama.py", "pallas_kernels/kv_write.py", "pallas_kernels/tuned/a.json"],
)
def test_a_change_of_source_changes_the_name(tmp_path, folder, monkeypatch, change):
    root = Path(programs.__file__).parents[2]
    for name in ("jaxserve", "pallas_kernels"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pallas_kernels/tuned").mkdir(exist_ok=True)
    monkeypatch.setattr(programs, "__file__", str(tmp_path / "jaxserve/engine/programs.py"))

    def name():
        return Store(folder, jax.devices()[:1]).name("key", double, (struct(8),))

    before = name()
    (tmp_path / "jaxserve/serve.txt").write_text("no program is traced from this")
    assert name() == before
    with open(tmp_path / change, "a") as file:
        file.write("\n")
    assert name() != before


def test_what_is_tuned_is_tuned_once():
    """Who tunes it first is ready before the others with it begin; all else goes ahead, in the order given."""
    lowered, began, done = [], [], []

    class Slow:
        __name__ = "slow"

        def __init__(self, key):
            self.key = key

        def lower(self):
            lowered.append(self.key)
            return self

        def compile(self, compiler_options):
            began.append((self.key, list(done)))
            time.sleep(0.02)
            done.append(self.key)
            return self

    keys = ["h1", "h2", "lh", "-", "l", "L"]  # what they tune: h, l and L, but the one that does nothing
    made = compile_all({key: (Slow(key), (), None) for key in keys}, [], None, workers=8,
                       tunes=lambda key: [c for c in key if c.isalpha()])  # fmt: skip
    assert lowered == keys and sorted(made) == sorted(keys)
    before = dict(began)
    assert "h1" in before["h2"] and "h1" in before["lh"] and "lh" in before["l"]
    assert "lh" not in before["-"] and "lh" not in before["L"]


def test_an_error_in_the_report_ends_the_compiling(folder):
    """Such as that the weights, which are loaded meanwhile, are damaged."""

    def damaged(*_):
        raise ValueError("a tensor is missing")

    with pytest.raises(ValueError, match="a tensor is missing"):
        compile_all(jobs(), jax.devices()[:1], folder, damaged)


def test_a_compiler_that_did_not_start_is_started_again(monkeypatch, caplog):
    class Lowered:
        def __init__(self, failures, text=programs.NOT_STARTED):
            self.failures, self.text = failures, text

        def compile(self, compiler_options):
            self.failures -= 1
            if self.failures >= 0:
                raise jax.errors.JaxRuntimeError(f"INTERNAL: {self.text}")
            return compiler_options

    waited = []
    monkeypatch.setattr(programs.time, "sleep", waited.append)
    assert programs._compiled(Lowered(2), "options") == "options"
    assert waited == [1, 2] and "once more in 2 s" in caplog.text
    with pytest.raises(jax.errors.JaxRuntimeError, match="launch ptxas"):
        programs._compiled(Lowered(9), None)
    assert waited == [1, 2, 1, 2, 4]
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of registers"):
        programs._compiled(Lowered(1, "out of registers"), None)
