"""From a folder to an engine: what is read when, and what is said of damaged weights."""

import gc
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import CheckpointError
from jaxserve.config import EngineConfig
from jaxserve.engine import engine as engines
from jaxserve.engine import loading
from jaxserve.engine import programs as module
from jaxserve.engine.programs import Store
from jaxserve.engine.runner import Runner
from scripts import tiny_checkpoint
from tests.engine import build


@pytest.fixture
def folder(tmp_path):
    tiny_checkpoint.write(tmp_path, build.HF)
    return tmp_path


def test_files_are_read_ahead_while_programs_compile(folder, monkeypatch):
    told, asked, done, compile_ = [], [], threading.Event(), Runner.compile
    large = (folder / "model.safetensors").stat()

    def advised(file, offset, size, advice):
        asked.append((os.fstat(file).st_ino, offset, advice))
        if offset + size >= large.st_size:
            done.set()

    def compiles(self, *arguments):
        assert done.wait(60)  # not begun before the programs are there, it would never be
        compile_(self, *arguments)

    monkeypatch.setattr(loading, "PIECE", large.st_size // 2)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    monkeypatch.setattr(Runner, "compile", compiles)
    config = EngineConfig(max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100)
    with loading.load(str(folder), config, told.append) as engine:
        assert len(build.run(engine, [([1, 2, 3], 4)])[0]) == 4
    pieces = range(0, large.st_size, large.st_size // 2)
    assert asked == [(large.st_ino, offset, os.POSIX_FADV_WILLNEED) for offset in pieces]
    assert [line.split(" ")[1] for line in told if "ready in" in line or "loaded in" in line] == ["programs", "loaded"]


def test_weights_are_read_while_stored_programs_load(folder, monkeypatch):
    config = EngineConfig(max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100)
    loading.load(str(folder), config).close()
    read, begun, shown, told, load = loading.Model.read, threading.Event(), [], [], Store.load

    def reads(self, *arguments):
        begun.set()
        return read(self, *arguments)

    def loads(self, name):
        assert begun.wait(60)  # not begun before the programs are there, it would never be
        return load(self, name)

    monkeypatch.setattr(loading.Model, "read", reads)
    monkeypatch.setattr(Store, "load", loads)
    with loading.load(str(folder), config, told.append, lambda what, *_: shown.append(what)) as engine:
        assert len(build.run(engine, [([1, 2, 3], 4)])[0]) == 4
    assert shown == sorted(shown, reverse=True) and "loading" in shown  # one bar after the other
    assert [line.split(" ")[1] for line in told if "ready in" in line or "loaded in" in line] == ["programs", "loaded"]


def test_a_damaged_program_is_compiled_where_people_can_see_it(folder, monkeypatch, tmp_path):
    """The weights have been read when it is found out: theirs is not the time that it takes."""
    config = EngineConfig(max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100)
    programs, said, shown, compiling = tmp_path / "cache" / "programs", [], [], threading.Event()
    monkeypatch.setattr(loading.hub, "cache_dir", lambda: programs.parent)
    loading.load(str(folder), config).close()
    largest = max(programs.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])

    def progress(what, done, total):
        shown.append((what, done < total))
        if what == "compiling":
            compiling.set()

    def compiles(*arguments):
        assert compiling.wait(60)
        return compiled(*arguments)

    compiled = module._compiled
    monkeypatch.setattr(module, "_compiled", compiles)
    loading.load(str(folder), config, said.append, progress).close()
    assert ("compiling", True) in shown and shown[-1] == ("compiling", False)
    times = [float(line.split(" in ")[1].split()[0]) for line in said if "ready in" in line or "loaded in" in line]
    assert times[0] >= times[1]


def test_an_error_of_reading_beside_stored_programs_is_told(folder, monkeypatch):
    config = EngineConfig(max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100)
    loading.load(str(folder), config).close()

    def reads(self, *arguments):
        raise ValueError("no weights today")

    monkeypatch.setattr(loading.Model, "read", reads)
    with pytest.raises(ValueError, match="no weights today"):
        loading.load(str(folder), config)


def test_what_starting_leaves_is_not_looked_through_again(folder, monkeypatch):
    monkeypatch.setattr(engines, "_settled", set())  # whatever else runs here
    first, second = build.engine(folder), build.engine(folder)
    first.close()
    first.close()
    assert gc.get_freeze_count() > 50_000
    second.close()
    assert not gc.get_freeze_count()


def test_damaged_weights_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj.weight has values that are no numbers"):
        build.engine(folder)
