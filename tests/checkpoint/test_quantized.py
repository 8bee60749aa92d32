"""AWQ, GPTQ and compressed-tensors: what is read equals what was packed, and what is refused is named."""

import json

import numpy as np
import pytest

from jaxserve import checkpoint
from jaxserve.checkpoint import CheckpointError
from jaxserve.checkpoint.safetensors import SafetensorsFolder, save
from scripts import tiny_checkpoint
from tests.quant import folders

HF = tiny_checkpoint.config("LlamaForCausalLM", num_hidden_layers=1)
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=sorted(folders.CONFIGS))
def kind(request):
    return request.param


@pytest.mark.parametrize("group", [16, 32, -1])
def test_values(tmp_path, kind, group):
    if kind.startswith("act-order") and group == -1:
        pytest.skip("one group has no order")
    if kind in folders.EIGHT and group != 32:
        pytest.skip("the kind says the group")
    want = folders.write(tmp_path, HF, kind, group)
    with checkpoint.open(tmp_path) as found:
        assert found.names == set(want)
        assert bool(found.packed)
        for name, values in want.items():
            assert found.shape(name) == values.shape
            np.testing.assert_array_equal(found.read(name), values.astype(found.dtype(name)), err_msg=name)


def test_nibbles(tmp_path):
    """Nibble by nibble against the bits of the file."""
    folders.write(tmp_path, HF, "awq")
    with checkpoint.open(tmp_path) as found:
        qweight, qzeros = (found.source.read(f"{NAME}.{part}").view(np.uint32) for part in ("qweight", "qzeros"))
        nibbles, zero, scale = (found.read(f"{NAME}.{part}") for part in ("nibbles", "zero", "scale"))
        np.testing.assert_array_equal(scale, found.source.read(f"{NAME}.scales").T)
    for column in range(64):
        place = folders.AWQ.index(column % 8)
        for k in range(64):
            assert nibbles[column, k] == int(qweight[k, column // 8]) >> 4 * place & 15
        for g in range(2):
            assert zero[column, g] == int(qzeros[g, column // 8]) >> 4 * place & 15


def test_slices(tmp_path, kind):
    folders.write(tmp_path, HF, kind)
    rng = np.random.default_rng(0)
    with checkpoint.open(tmp_path) as found:
        down = "model.layers.0.mlp.down_proj"
        how = found.packed[down]
        parts = ["weight", "scale", "nibbles" if how.kind == "int4" else "bytes", *["zero"] * how.zero]
        for part in parts:
            name = f"{down}.{part}"
            whole = found.read(name)
            assert whole.shape == found.shape(name) and whole.dtype == found.dtype(name)
            for _ in range(20):
                index = tuple(slice(*sorted(rng.integers(0, n + 1, 2))) for n in whole.shape)
                np.testing.assert_array_equal(found.read(name, index), whole[index])


def test_words(tmp_path, kind):
    """Where a packing is told, the nibbles are what lies in the words' places; slices are those of the words."""
    folders.write(tmp_path, HF, kind)
    with checkpoint.open(tmp_path) as found:
        if found.packed[NAME].kind != "int4" or (packing := found.packing(NAME)) is None:
            assert found.packed[NAME].kind != "int4" or kind.startswith("act-order")
            return
        (axis, places), words, nibbles = packing, found.read(f"{NAME}.words"), found.read(f"{NAME}.nibbles")
        assert words.shape == found.shape(f"{NAME}.words") and words.dtype == found.dtype(f"{NAME}.words")
        for j, place in enumerate(places):
            one = (words.view(np.uint32) >> 4 * place) & 15
            np.testing.assert_array_equal(one, nibbles[j::8] if axis == 0 else nibbles[:, j::8])
        index = slice(1, 5), slice(2, 4)
        np.testing.assert_array_equal(found.read(f"{NAME}.words", index), words[index])


def refused(folder, match, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        checkpoint.open(folder)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"quant_method": "aqlm"}, r"quantized \(aqlm\)"),
        ({"version": "gemv"}, "layout 'gemv'"),
        ({"bits": 3}, "awq weights of 3 bits"),
        ({"group_size": 48}, r"down_proj|q_proj.*64 inputs.*groups of 48.*groups of 32"),
        ({"group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 2}, "gptq weights of 2 bits"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors of 0 groups"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 weights of type e5m2"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128"),
        ({"quant_method": "smooth_quant", "quant_dtype": "int4"}, "smooth_quant weights of type int4"),
        ({"quant_method": "smooth_quant"}, r"no tensor \*.weight is int8"),
        ({"bits": "4"}, "awq weights of '4' bits"),
        ({"bits": 4.0}, "awq weights of 4.0 bits"),
        ({"group_size": "32"}, "groups of '32'; a group has a whole number of inputs, or -1"),
        ({"group_size": 10**9}, "groups of 1000000000 do not divide; the largest that do are groups of 96"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq weights in the layout 'marlin'"),
        (
            {"quant_method": "gptq", "dynamic": {"-:.*lm_head": {}, "+:.*down_proj": {"bits": 8}}},
            r"several kinds \(dynamic: '\+:\.\*down_proj'",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": "all"}, "a value of the wrong kind"),
        (folders.group_of_layers(["int-quantized"], folders.BYTES), "a value of the wrong kind"),
        (folders.group_of_layers("int-quantized", folders.BYTES, "int8"), "a value of the wrong kind"),
        (folders.group_of_layers("pack-quantized", None), "1 groups of layers, 0 with weights"),
        (folders.group_of_layers("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}), "nvfp4.*4 bits, float"),
        (
            folders.group_of_layers("int-quantized", folders.BYTES | {"type": "int"}, {"num_bits": 4}),
            "activations of 4",
        ),
        (
            folders.group_of_layers("int-quantized", folders.BYTES, folders.STATIC | {"symmetric": False}),
            "static activations",
        ),
        (
            folders.group_of_layers("int-quantized", folders.BYTES | {"symmetric": False}, folders.DYNAMIC),
            "zero points and activations",
        ),
    ],
    ids=str,
)
def test_refusals(tmp_path, changes, match):
    folders.write(tmp_path, HF, "awq")
    refused(tmp_path, match, **changes)


def changed(folder, change):
    """Changes the tensors {name: array} of a folder."""
    with SafetensorsFolder(folder) as found:
        tensors = {name: found.read(name) for name in found.names}
    change(tensors)
    save(tensors, folder / "model.safetensors")


def put(part, array):
    """Of a map: a tensor in place of another."""
    return lambda tensors: tensors.__setitem__(f"{NAME}.{part}", np.asarray(array))


DAMAGED = [
    ("awq", put("scales", np.zeros((64, 2), np.float16)), r"scales is float16 \[64, 2\]; .*\[2, 64\] was expected"),
    ("awq", put("scales", np.zeros((2, 64), np.int32)), r"scales is int32 .*; .* or float32 \[2, 64\] was expected"),
    ("awq", put("qzeros", np.zeros((1, 8), np.int32)), r"qzeros is int32 \[1, 8\]; int32 \[2, 8\] was expected"),
    ("awq", put("qzeros", np.zeros((2, 8), np.float32)), r"qzeros is float32 \[2, 8\]; int32"),
    ("awq", put("qweight", np.zeros((0, 8), np.int32)), r"qweight is said to hold a map of shape \[64, 0\]"),
    ("gptq8", put("qzeros", np.zeros((2, 8), np.int32)), r"qzeros is int32 \[2, 8\]; int32 \[2, 16\] was expected"),
    ("gptq", put("g_idx", np.full(64, 2, np.int32)), "groups from 2 to 2, and there are 2"),
    ("gptq", put("g_idx", np.arange(64, dtype=np.int32) // 32 - 1), "groups from -1 to 0"),
    ("gptq", put("g_idx", np.zeros(63, np.int32)), r"g_idx is int32 \[63\]; int32 \[64\] was expected"),
    ("gptq", put("g_idx", np.zeros(64, np.float32)), "g_idx is float32"),
    ("act-order", lambda tensors: tensors.pop(f"{NAME}.g_idx"), r"tensor .*q_proj.g_idx is missing"),
    ("compressed", put("weight_packed", np.zeros((63, 8), np.int32)), r"\[63, 8\]; int32 \[64, 8\] was expected"),
    ("compressed", put("weight_shape", np.array([64])), r"a map of shape \[64\]"),
    ("compressed-asym", put("weight_zero_point", np.zeros((64, 2), np.int8)), r"int8 \[64, 2\]; int32 \[8, 2\]"),
    ("w8a8", put("weight", np.zeros((0, 64), np.int8)), r"weight is empty, \[0, 64\]"),
    ("w8a8", put("weight_scale", np.ones((64, 1), np.uint8)), "weight_scale is uint8, which no scale is"),
    ("fp8-static", put("input_scale", np.ones(2, np.float32)), r"input_scale has shape \[2\]; one number"),
]


@pytest.mark.parametrize("kind, change, match", DAMAGED)
def test_damaged_tensors_are_named(tmp_path, kind, change, match):
    folders.write(tmp_path, HF, kind)
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.open(tmp_path)


def test_damaged_zeros_of_bytes(tmp_path):
    folders.write(tmp_path, HF, "w8")
    changed(tmp_path, put("weight_zero_point", np.zeros((64, 1), np.int8)))
    config = json.loads((tmp_path / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"] | {"symmetric": False}
    refused(tmp_path, r"zero_point has shape \[64, 1\]; \[64, 2\]", **folders.group_of_layers("int-quantized", weights))


def test_groups_that_nobody_chose(tmp_path):
    """compressed-tensors keeps -1 for every input until an order of the groups has been found."""
    want = folders.write(tmp_path, HF, "compressed")
    changed(tmp_path, put("weight_g_idx", np.full(64, -1, np.int32)))
    with checkpoint.open(tmp_path) as found:
        assert found.packed[NAME] == found.packed["model.layers.0.self_attn.k_proj"]
        np.testing.assert_array_equal(found.read(f"{NAME}.weight"), want[f"{NAME}.weight"].astype(np.float16))


@pytest.mark.parametrize("place, read", [("weight_output", True), ("input", False)])
def test_transforms(tmp_path, place, read):
    """A rotation that is not in the weights would have to be computed."""
    want = folders.write(tmp_path, HF, "compressed")
    config = json.loads((tmp_path / "config.json").read_text())
    rotation = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": place, "inverse": False}]}
    config["quantization_config"]["transform_config"] = {"config_groups": {"R1": rotation}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not read:
        with pytest.raises(CheckpointError, match=r"activations go through transforms \(input\)"):
            checkpoint.open(tmp_path)
        return
    with checkpoint.open(tmp_path) as found:
        np.testing.assert_array_equal(found.read(f"{NAME}.weight"), want[f"{NAME}.weight"].astype(np.float16))


def test_not_announced(tmp_path, kind):
    """Elements without what they mean are no weights."""
    folders.write(tmp_path, HF, kind)
    (tmp_path / "config.json").write_text(json.dumps(HF))
    with pytest.raises(CheckpointError, match="is of quantized weights, and config.json has no quantization_config"):
        checkpoint.open(tmp_path)


def test_announced_and_not_there(tmp_path):
    tiny_checkpoint.write(tmp_path, HF | {"quantization_config": folders.CONFIGS["awq"]})
    with pytest.raises(CheckpointError, match="no tensor is called"):
        checkpoint.open(tmp_path)


def test_a_file_of_its_own(tmp_path):
    """Before config.json had an entry for it, AutoAWQ wrote quant_config.json."""
    want = folders.write(tmp_path, HF, "awq")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "version": "GEMM"}')
    with checkpoint.open(tmp_path) as found:
        np.testing.assert_array_equal(found.read(f"{NAME}.weight"), want[f"{NAME}.weight"].astype(np.float16))


def test_elements_make_the_values(tmp_path, kind):
    """Integers, scales, zeros and the order of inputs say the same as the values."""
    folders.write(tmp_path, HF, kind)
    with checkpoint.open(tmp_path) as found:
        how = found.packed[NAME]
        order = found.read(f"{NAME}.order") if how.order else np.arange(64)
        q = found.read(f"{NAME}.{'nibbles' if how.kind == 'int4' else 'bytes'}").astype(np.float32)
        zero = found.read(f"{NAME}.zero") if how.zero else np.zeros((64, 64 // how.group))
        values = found.read(f"{NAME}.weight")
        for place, k in enumerate(order):
            scale = found.read(f"{NAME}.scale")[:, place // how.group].astype(np.float32)
            mine = (q[:, place] - zero[:, place // how.group]) * scale
            np.testing.assert_array_equal(mine.astype(values.dtype), values[:, k])
        assert how.order == kind.startswith("act-order") and (how.activations == "static") == (
            f"{NAME}.input_scale" in found.source.names
        )


def test_blocks_that_do_not_divide(tmp_path, caplog):
    """The last block of inputs is a part of one: such a map is held as values."""
    want = folders.write(tmp_path, HF | {"intermediate_size": 160}, "fp8-large-block")
    with checkpoint.open(tmp_path) as found:
        down = "model.layers.0.mlp.down_proj"
        assert down not in found.packed and NAME in found.packed and "1 of its maps" in caplog.text
        np.testing.assert_array_equal(found.read(f"{down}.weight"), want[f"{down}.weight"])
        np.testing.assert_array_equal(
            found.read(f"{down}.weight", (slice(3, 9), slice(120, 150))), want[f"{down}.weight"][3:9, 120:150]
        )
