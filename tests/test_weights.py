"""Checkpoints onto the mesh: what is read, where it goes, what padding holds, and what is said of a broken one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve import checkpoint, weights
from jaxserve import mesh as meshes
from jaxserve.models.config import from_hf
from scripts import tiny_checkpoint

ODD = {"num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 97, "intermediate_size": 94}  # 4 divides none
MODELS = {
    "llama": ("LlamaForCausalLM", ODD),
    "tied": ("LlamaForCausalLM", ODD | {"tie_word_embeddings": True}),
    "biases": ("Qwen2ForCausalLM", ODD),
    "norms": ("Qwen3ForCausalLM", ODD),
    "fused": ("InternLM2ForCausalLM", ODD),
    "mixtral": ("MixtralForCausalLM", ODD),
    "experts": ("Qwen3MoeForCausalLM", ODD | {"moe_intermediate_size": 46, "decoder_sparse_step": 2}),
}


class Recording:
    """A checkpoint that counts how often each value of each tensor is read."""

    def __init__(self, source):
        self.source, self.path, self.names = source, source.path, source.names
        self.shape, self.dtype = source.shape, source.dtype
        self.counts = {name: np.zeros(source.shape(name), int) for name in source.names}
        self.largest = dict.fromkeys(source.names, 0)  # bytes of one read

    def read(self, name, index=None):
        self.counts[name][index or ...] += 1
        data = self.source.read(name, index)
        self.largest[name] = max(self.largest[name], data.nbytes)
        return data


class Loaded:
    """A tiny model on `tp` devices, what was read for it, and its tensors as stored."""

    def __init__(self, folder, name, tp, dtype="float32"):
        architecture, changes = MODELS[name]
        hf = tiny_checkpoint.config(architecture, **changes)
        tiny_checkpoint.write(folder, hf)
        self.stored, self.cfg, self.mesh = load_file(folder / "model.safetensors"), from_hf(hf), meshes.make_mesh(tp)
        with checkpoint.open(folder) as source:
            self.file, self.progress = Recording(source), []
            self.params = weights.load(
                self.file, self.cfg, self.mesh, dtype, lambda done, total: self.progress.append((done, total))
            )
        self.shapes = weights.shapes(self.cfg, self.mesh, self.file.names, dtype)


@pytest.fixture(params=sorted(MODELS))
def name(request):
    return request.param


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_everything_is_read_once(tmp_path, name, tp):
    loaded = Loaded(tmp_path, name, tp)
    for tensor, count in loaded.file.counts.items():
        assert (count == 1).all(), (tensor, count.min(), count.max())


def test_each_device_reads_only_its_slice(tmp_path, name):
    loaded = Loaded(tmp_path, name, 4)
    whole = ("norm", "mlp.gate.weight", "block_sparse_moe.gate.weight", "o_proj.bias")
    for tensor, largest in loaded.file.largest.items():
        values = loaded.stored[tensor]
        if not any(part in tensor for part in whole):
            assert largest <= values.nbytes * 0.36, tensor  # a fourth, or the fourth part of 4 heads where there are 3


@pytest.mark.parametrize("tp", [1, 4])
def test_shapes_are_known_before(tmp_path, name, tp):
    loaded = Loaded(tmp_path, name, tp, "bfloat16")
    assert jax.tree.structure(loaded.shapes) == jax.tree.structure(loaded.params)
    for shape, array in zip(jax.tree.leaves(loaded.shapes), jax.tree.leaves(loaded.params)):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, array.sharding)
    done, total = zip(*loaded.progress)
    assert sorted(done) == list(done) and done[-1] == total[0] == total[-1] >= weights.nbytes(loaded.params)


def test_four_devices_hold_what_one_holds_and_zeros(tmp_path, name):
    one, four = (Loaded(tmp_path / str(tp), name, tp).params for tp in (1, 4))
    padded = 0
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(four)):
        a, b = np.asarray(a), np.asarray(b)
        # Padding stands at the end of each axis; the inputs of `o` are heads, of which the last ones are padding.
        assert all(x <= y for x, y in zip(a.shape, b.shape)), path
        inside = tuple(slice(n) for n in a.shape)
        np.testing.assert_array_equal(b[inside], a, err_msg=str(path))
        outside = np.ones(b.shape, bool)
        outside[inside] = False
        assert not b[outside].any(), path
        padded += outside.sum()
    assert padded


def test_arrangements(tmp_path):
    """Against the definitions in models/table.py."""
    loaded = Loaded(tmp_path, "biases", 1)
    stored, layer, cfg = loaded.stored, loaded.params.layers[1], loaded.cfg
    q, k, v = (stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    qkv = np.asarray(layer.mixer.qkv.weight)  # [D, K, G+2, H]
    groups, width = cfg.heads // cfg.kv_heads, cfg.head_dim
    for head in range(cfg.heads):
        rows = q[head * width : (head + 1) * width]
        np.testing.assert_array_equal(qkv[:, head // groups, head % groups], rows.T)
    for head in range(cfg.kv_heads):
        np.testing.assert_array_equal(qkv[:, head, -2], k[head * width : (head + 1) * width].T)
        np.testing.assert_array_equal(qkv[:, head, -1], v[head * width : (head + 1) * width].T)
    bias = stored["model.layers.1.self_attn.k_proj.bias"].reshape(cfg.kv_heads, width)
    np.testing.assert_array_equal(layer.mixer.qkv.bias[:, -2], bias)
    np.testing.assert_array_equal(layer.mixer.o.weight, stored["model.layers.1.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(layer.ffn.gate_up.weight[:, 1], stored["model.layers.1.mlp.up_proj.weight"].T)
    np.testing.assert_array_equal(layer.ffn.down.weight, stored["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(loaded.params.head.weight, stored["lm_head.weight"].T)
    assert layer.mixer.o.bias is None


def test_experts(tmp_path):
    loaded = Loaded(tmp_path, "mixtral", 4)
    stored, moe, ffn = loaded.stored, loaded.params.layers[0].ffn, loaded.cfg.expert_ffn
    base = "model.layers.0.block_sparse_moe."
    np.testing.assert_array_equal(moe.router.weight, stored[base + "gate.weight"].T)
    for expert in range(loaded.cfg.experts):
        gate, down, up = (stored[f"{base}experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
        np.testing.assert_array_equal(moe.gate_up.weight[expert, :, 0, :ffn], gate.T)
        np.testing.assert_array_equal(moe.gate_up.weight[expert, :, 1, :ffn], up.T)
        np.testing.assert_array_equal(moe.down.weight[expert, :ffn], down.T)
    mixed = Loaded(tmp_path / "mixed", "experts", 1).params.layers
    assert [hasattr(layer.ffn, "router") for layer in mixed] == [False, True]


def test_a_head_may_share_the_embedding(tmp_path):
    params = Loaded(tmp_path, "tied", 4).params
    assert params.head.weight is params.embed
    apart = Loaded(tmp_path / "apart", "llama", 4).params
    assert weights.nbytes(apart) - weights.nbytes(params) == apart.head.weight.nbytes // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_are_cast(tmp_path, dtype):
    loaded = Loaded(tmp_path, "llama", 2, dtype)
    assert {array.dtype for array in jax.tree.leaves(loaded.params)} == {jnp.dtype(dtype)}
    want = loaded.stored["model.norm.weight"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(loaded.params.norm), want)


def broken(folder, change, name="llama", seen="at once"):
    """A checkpoint whose tensors `change` has changed; loads it.  seen: when the fault shows."""
    architecture, changes = MODELS[name]
    tiny_checkpoint.write(folder, tiny_checkpoint.config(architecture, **changes))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return load(folder, seen)


def load(folder, seen="at once"):
    with checkpoint.open(folder) as source:
        read = []
        if seen == "at once":
            source.read = lambda *_: read.append(1)
        try:
            return weights.load(source, from_hf(source.config), meshes.make_mesh(2), "float32")
        finally:
            assert not read, "broken checkpoints are refused before anything is read"


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("biases", "model.layers.0.self_attn.v_proj.bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    ],
)
def test_a_missing_tensor(tmp_path, name, tensor):
    with pytest.raises(ValueError, match=tensor) as error:
        broken(tmp_path, lambda tensors: tensors.pop(tensor), name)
    assert str(tmp_path) in str(error.value) and "missing" in str(error.value)


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
def test_a_wrong_shape(tmp_path, tensor):
    def change(tensors):
        tensors[tensor] = np.ascontiguousarray(tensors[tensor][:-1])

    with pytest.raises(ValueError, match=tensor) as error:
        broken(tmp_path, change)
    assert str(tmp_path) in str(error.value) and "the config asks for [" in str(error.value)


@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_no_number(tmp_path, tensor, value):
    def change(tensors):
        tensors[tensor].flat[5] = value

    with pytest.raises(ValueError, match=tensor) as error:
        broken(tmp_path, change, seen="when it is read")
    assert str(tmp_path) in str(error.value) and "no numbers" in str(error.value)


def test_maps_of_two_types_side_by_side(tmp_path):
    def change(tensors):
        for name, dtype in (("q_proj", np.float16), ("k_proj", ml_dtypes.bfloat16)):
            name = f"model.layers.0.self_attn.{name}.weight"
            tensors[name] = tensors[name].astype(dtype)
            want.append(tensors[name].astype(np.float32))

    want: list = []
    qkv = np.asarray(broken(tmp_path, change, seen="when it is read").layers[0].mixer.qkv.weight)
    for found, expected in zip((qkv[:, :, :-2], qkv[:, :, -2]), want):
        found = found.reshape(len(qkv), -1)[:, : len(expected)]  # the rest are padded heads
        np.testing.assert_array_equal(found, expected.T)


def test_integers_are_no_weights(tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    with pytest.raises(ValueError, match="model.norm.weight is int8, and nothing says how integers become weights"):
        broken(tmp_path, change)


def test_a_truncated_file(tmp_path):
    tiny_checkpoint.write(tmp_path, tiny_checkpoint.config("LlamaForCausalLM"))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=last) as error:
        load(tmp_path)
    assert str(path) in str(error.value) and "truncated" in str(error.value)


MEASURE = """
import sys
import jax
from jaxserve import checkpoint, mesh, weights
from jaxserve.models.config import from_hf
from pathlib import Path

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024

if len(sys.argv) > 2:
    weights.AHEAD_BYTES = int(sys.argv[2])
jax.numpy.zeros(8).block_until_ready()
before = status("VmRSS")
with checkpoint.open(sys.argv[1]) as source:
    params = weights.load(source, from_hf(source.config), mesh.make_mesh(1), "float32")
arrays = weights.nbytes(params)
print(status("VmHWM") - before - arrays, arrays)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """600 MB of weights; the largest tensor has 131 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=16,
                 num_key_value_heads=16, head_dim=64, vocab_size=32000)  # fmt: skip
    hf = tiny_checkpoint.config("LlamaForCausalLM", **sizes)
    (folder / "config.json").write_text(json.dumps(hf))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_checkpoint, "_random", lambda seed, name, shape: np.ones(shape, np.float32))
        save_file(tiny_checkpoint.tensors(hf), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("ahead, most", [(None, 2 << 30), (64 << 20, 300 << 20)])
def test_little_host_memory_beside_the_arrays(large, ahead, most):
    command = [sys.executable, "-c", MEASURE, str(large), *([str(ahead)] if ahead else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    beside, arrays = map(int, done.stdout.split())
    assert arrays > 590e6
    assert beside < most + (131 << 20)
