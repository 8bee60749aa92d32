"""Rows 66, 68 and 69 of tests/serve/faults/table.py: models whose files are damaged, absurd or meant ill.

What a server makes of them when it starts: one line that says what is wrong, before anything large is made.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import EngineConfig
from jaxserve.serve import engine_process
from jaxserve.serve.engine_process import DEVICE, MODEL, Failure
from jaxserve.serve.options import ServerOptions
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from tests.serve import tiny
from tests.serve.local import Server, serving

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("models") / "sound")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "model")


def refused(folder, *statuses):
    """The one line with which a server refuses a model."""
    with pytest.raises(Failure) as failure:
        engine_process.load(str(folder), EngineConfig(max_batch_size=2, cache_max_entry_count=40), ServerOptions())
    assert failure.value.status in (statuses or (MODEL,))
    assert "\n" not in str(failure.value)
    return str(failure.value)


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", ["cut", "length", "overlap", "shape", "gone", "NaN"])
def test_66_weights(folder, damage, monkeypatch):
    path = folder / "model.safetensors"
    data, tensors = bytearray(path.read_bytes()), load_file(path)
    if damage == "cut":
        path.write_bytes(data[:-1000])
    elif damage == "length":
        path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
    elif damage == "overlap":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[DOWN]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
        path.write_bytes(data[:8] + json.dumps(header).encode().ljust(length)[:length] + data[8 + length :])
    else:
        if damage == "shape":
            tensors[DOWN] = np.ascontiguousarray(tensors[DOWN][:-1])
        elif damage == "gone":
            del tensors[DOWN]
        else:
            tensors[DOWN][3, 4] = np.nan
        save_file(tensors, path)
    if damage != "NaN":  # which is seen when all is compiled
        monkeypatch.setattr("jaxserve.engine.loading.Runner", None)
    said = refused(folder)
    assert "model" in said and (damage in ("cut", "length", "overlap") or DOWN in said)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**31},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**62},
        {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
        {"head_dim": 2 * 10**9},
        {"intermediate_size": 1e30},
        {"max_position_embeddings": -5},
        {"max_position_embeddings": float("inf")},
        {"rope_theta": "x"},
        {"rope_scaling": 5},
        {"architectures": [["x"]]},
        {"architectures": None},
        {"eos_token_id": "x"},
        {"eos_token_id": [10**9]},
        {"num_key_value_heads": {}},
    ],
    ids=str,
)
def test_68_configs(folder, changes, monkeypatch):
    monkeypatch.setattr("jaxserve.engine.loading.Runner", None)  # nothing is compiled or placed
    change(folder, **changes)
    assert refused(folder, MODEL, DEVICE)


def test_68_code_in_a_folder_is_not_run(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w').close()\n")
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change(folder, auto_map=auto, trust_remote_code=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    engine = engine_process.load(str(folder), EngineConfig(max_batch_size=2, session_len=64), ServerOptions())
    engine.close()
    (folder / "tokenizer.json").unlink()  # now transformers is asked
    refused(folder)
    change(folder, architectures=["EvilForCausalLM"])
    assert "EvilForCausalLM" in refused(folder)
    assert not ran.exists()


def test_69_tokenizers(folder):
    path = folder / "tokenizer.json"
    whole = path.read_text()
    for text in ("{", "[]", "{}", "\x00" * 100, whole[:-100], '{"model": {"type": "x"}}', "[" * 100_000):
        path.write_text(text)
        assert "tokenizer.json" in refused(folder)
    with path.open("ab") as file:
        file.truncate(500 << 20)
    assert "500 MiB" in refused(folder)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__ }}",
        "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
    ],
)
def test_69_templates(folder, source):
    """A template does no harm when it is loaded; what it may not do is a 400 when it is used."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": source}))
    tokenizer = Tokenizer.load(folder)
    with serving() as server:
        server.service.template = ChatTemplate.for_model({}, tokenizer)
        again = Server(server.service, server.engine, ServerOptions())
        body = {"messages": [{"role": "user", "content": "hi"}]}
        status, answer = again.post("/v1/chat/completions", body)
        assert status == 400 and "uid=" not in answer["error"]["message"]
        assert again.post("/v1/completions", {"prompt": "hi"})[0] == 200
