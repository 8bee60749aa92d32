"""Folders of quantized tiny models, packed as the formats' specifications say, and what they mean.

It shares no code with jaxserve: loops, and no tricks.
"""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from scripts import tiny_checkpoint

# AutoAWQ, gemm: the int32 of columns 8c .. 8c+7 has, from its lowest bits, columns 0, 2, 4, 6, 1, 3, 5, 7 of them.
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
PLAIN = (0, 1, 2, 3, 4, 5, 6, 7)


def pack(values, axis, bits=4, order=PLAIN):
    """Non-negative integers [a, b] as int32, 32 / bits neighbours along `axis` in each."""
    each = 32 // bits
    values = np.moveaxis(np.asarray(values), axis, -1)
    rows, columns = values.shape
    out = np.zeros((rows, columns // each), np.uint32)
    for r in range(rows):
        for c in range(columns // each):
            for place in range(each):
                out[r, c] |= np.uint32(
                    int(values[r, each * c + (order[place] if bits == 4 else place)]) << bits * place
                )
    return np.ascontiguousarray(np.moveaxis(out.view(np.int32), -1, axis))


def quantize(weight, group, bits=4, symmetric=False, groups=None):
    """(q [out, in], scale float16 [out, in/group], zero) of a weight [out, in], rounded to nearest."""
    out, inputs = weight.shape
    most, count = 2**bits - 1, inputs // group
    groups = np.arange(inputs) // group if groups is None else groups
    q, zero = np.zeros((out, inputs), int), np.zeros((out, count), int)
    scale = np.zeros((out, count), np.float16)
    for g in range(count):
        part = weight[:, groups == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scale[:, g] = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
            zero[:, g] = 2 ** (bits - 1)
        else:
            scale[:, g] = (high - low) / most
            zero[:, g] = np.clip(np.round(-low / scale[:, g]), 0, most)
        q[:, groups == g] = np.clip(np.round(part / scale[:, g, None]) + zero[:, g, None], 0, most)
    return q, scale, zero


def dequantize(q, scale, zero, groups):
    """float32[out, in], rounded to the scales' type as the packages of these formats do."""
    value = np.empty(q.shape, np.float32)
    for k in range(q.shape[1]):
        value[:, k] = (q[:, k] - zero[:, groups[k]]) * scale[:, groups[k]].astype(np.float32)
    return value


def awq(name, q, scale, zero, **_):
    return {
        f"{name}.qweight": pack(q.T, 1, order=AWQ),
        f"{name}.qzeros": pack(zero.T, 1, order=AWQ),
        f"{name}.scales": scale.T,
    }


def gptq(name, q, scale, zero, bits=4, groups=None, offset=1):
    return {
        f"{name}.qweight": pack(q.T, 0, bits),
        f"{name}.qzeros": pack((zero.T - offset) % 2**bits, 1, bits),
        f"{name}.scales": scale.T,
        f"{name}.g_idx": groups.astype(np.int32),
    }


def compressed(name, q, scale, zero, bits=4, symmetric=False, **_):
    out = {
        f"{name}.weight_packed": pack(q, 1, bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": np.array(q.shape, np.int64),
    }
    return out if symmetric else out | {f"{name}.weight_zero_point": pack(zero, 0, bits)}


def group_of_layers(format_, weights, activations=None):
    """quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "format": format_, "ignore": ["lm_head"]}
    return config | {"config_groups": {"group_0": group}}


E4M3 = ml_dtypes.float8_e4m3fn
DYNAMIC = {"dynamic": True, "strategy": "token", "symmetric": True, "num_bits": 8}
STATIC = {"dynamic": False, "strategy": "tensor", "symmetric": True, "num_bits": 8}
BYTES = {"num_bits": 8, "symmetric": True, "dynamic": False}
FLOATS = BYTES | {"type": "float"}
EIGHT = {  # kind: element, (outputs, inputs) that share a scale (0: all), name of the scale, quantization_config
    "smooth": (np.int8, (1, 0), "scale", {"quant_method": "smooth_quant", "quant_dtype": "int8"}),
    "w8a8": (
        np.int8, (1, 0), "weight_scale",
        group_of_layers("int-quantized", BYTES | {"type": "int", "strategy": "channel"}, DYNAMIC | {"type": "int"}),
    ),
    "w8": (
        np.int8, (1, 32), "weight_scale",
        group_of_layers("int-quantized", BYTES | {"type": "int", "strategy": "group", "group_size": 32}),
    ),
    "fp8": (E4M3, (0, 0), "weight_scale", {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-static": (E4M3, (0, 0), "weight_scale", {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-block": (
        E4M3, (32, 32), "weight_scale_inv",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [32, 32]},
    ),
    "fp8-large-block": (
        E4M3, (128, 128), "weight_scale_inv",
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "fp8-channel": (
        E4M3, (1, 0), "weight_scale",
        group_of_layers("float-quantized", FLOATS | {"strategy": "channel"}, DYNAMIC | {"type": "float"}),
    ),
    "fp8-tensor": (
        E4M3, (0, 0), "weight_scale",
        group_of_layers("float-quantized", FLOATS | {"strategy": "tensor"}, STATIC | {"type": "float"}),
    ),
}  # fmt: skip
MOST = {np.int8: 127, E4M3: 448}
INPUT_SCALE = 8.0  # of static activations: times MOST, more than any


def eight_bit(name, weight, element, block, scale_name, static):
    """Tensors of a map whose elements have 8 bits, and its values, element by element."""
    out, inputs = weight.shape
    rows, columns = block[0] or out, block[1] or inputs
    scale = np.zeros((-(-out // rows), -(-inputs // columns)), np.float32)
    q, value = np.zeros(weight.shape, element), np.zeros(weight.shape, np.float32)
    for i, j in np.ndindex(scale.shape):
        here = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale[i, j] = np.abs(weight[here]).max() / MOST[element]
        part = weight[here] / scale[i, j]
        q[here] = np.round(part) if element is np.int8 else part
        value[here] = q[here].astype(np.float32) * scale[i, j]
    stored = scale[0, 0] if block == (0, 0) else scale
    found = {f"{name}.weight": q, f"{name}.{scale_name}": np.asarray(stored, np.float32)}
    if static:
        found[f"{name}.input_scale"] = np.array([INPUT_SCALE / MOST[element]], np.float32)
    return found, value


CONFIGS = {
    "awq": {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "gptq-sym": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 32, "sym": False},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False},
    "gptq8-asym": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False, "desc_act": False},
    "act-order": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    "act-order8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False, "desc_act": True},
    **{
        kind: group_of_layers(
            "pack-quantized",
            {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32},
        )
        for kind, bits, symmetric in (("compressed", 4, True), ("compressed-asym", 4, False), ("compressed8", 8, True))
    },
    **{kind: config for kind, (*_, config) in EIGHT.items()},
}


def write(folder, hf, kind, group=32):
    """A tiny model of config `hf` with its linear maps packed as `kind` says; its tensors as values {name: float32}."""
    tiny_checkpoint.write(folder, hf)
    tensors, out, values = load_file(folder / "model.safetensors"), {}, {}
    config = json.loads(json.dumps(CONFIGS[kind]))
    if kind in EIGHT:
        pass
    elif kind.startswith("compressed"):
        of = config["config_groups"]["group_0"]["weights"]
        symmetric, bits, make = of["symmetric"], of["num_bits"], compressed
        of |= {"group_size": group} if group != -1 else {
            "strategy": "channel", "group_size": None}  # fmt: skip
    else:
        config["group_size"] = group
        symmetric, bits, make = config.get("sym", False), config["bits"], awq if kind == "awq" else gptq
    for name, weight in tensors.items():
        packed = ".layers." in name and name.endswith(".weight") and weight.ndim == 2 and "gate.weight" not in name
        if not packed:
            out[name] = values[name] = weight
            continue
        if kind in EIGHT:
            static = kind in ("fp8-static", "fp8-tensor")
            found, values[name] = eight_bit(name.removesuffix(".weight"), weight, *EIGHT[kind][:3], static)
            out |= found
            continue
        size = weight.shape[1] if group == -1 else group
        groups = np.arange(weight.shape[1]) // size
        if kind.startswith("act-order"):
            np.random.default_rng(size * len(groups)).shuffle(groups)
        q, scale, zero = quantize(weight, size, bits, symmetric, groups)
        extra = {"symmetric": symmetric} if make is compressed else {"groups": groups}
        if kind == "gptq-v2":
            extra["offset"] = 0
        out |= make(name.removesuffix(".weight"), q, scale, zero, bits=bits, **extra)
        values[name] = dequantize(q, scale, zero, groups)
    save_file(
        {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in out.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(hf | {"quantization_config": config}))
    return values
