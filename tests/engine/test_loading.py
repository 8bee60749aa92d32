"""From a folder to an engine: weights come while programs are compiled, and what is wrong with them ends both."""

import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.checkpoint import CheckpointError
from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.engine.runner import Runner
from scripts import tiny_checkpoint
from tests.engine import build


@pytest.fixture
def folder(tmp_path):
    tiny_checkpoint.write(tmp_path, build.HF)
    return tmp_path


def test_weights_load_while_programs_compile(folder, monkeypatch):
    told, shown, read, compile_ = [], [], threading.Event(), Runner.compile
    hold = loading.Model.read

    def reads(self, progress, store):
        try:
            return hold(self, progress, store)
        finally:
            read.set()

    def compiles(self, *arguments):
        assert read.wait(60)  # not begun before the programs are there, it would never be
        compile_(self, *arguments)

    monkeypatch.setattr(loading.Model, "read", reads)
    monkeypatch.setattr(Runner, "compile", compiles)
    config = EngineConfig(max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100)
    with loading.load(str(folder), config, told.append, lambda what, *_: shown.append(what)) as engine:
        assert len(build.run(engine, [([1, 2, 3], 4)])[0]) == 4
    assert set(shown) == {"compiling"}  # the other bar would be over it
    assert [line.split(" ")[1] for line in told if "ready in" in line or "loaded in" in line] == ["programs", "loaded"]


def test_damaged_weights_end_the_compiling(folder, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="down_proj.weight has values that are no numbers"):
        build.engine(folder)


def test_a_failed_compile_ends_the_loading(folder, monkeypatch):
    def fails(self, *_):
        raise ValueError("no such kernel")

    monkeypatch.setattr(Runner, "compile", fails)
    with pytest.raises(ValueError, match="no such kernel"):
        build.engine(folder)
