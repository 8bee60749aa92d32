"""SmoothQuant: weights and activations of 8 bits, the activations' outliers moved into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant, accurate and efficient post-training quantization for large language
models, 2022 (arXiv 2211.10438).  An input that is large everywhere leaves the others of its token few of the 256
steps.  It is divided by a factor, which the weights that it meets take up, and the factor is put where it costs
nothing: into the norm before, or into the outputs of the map before, as far as nothing but a product is in between.

The folder is LMDeploy's: `weight` int8 or float8_e4m3fn [out, in], `scale` [out, 1], and `quant_method: smooth_quant`.
Activations are rounded when the model runs, each token with a scale of its own.
"""

from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxserve.lite import calibrate
from jaxserve.lite.folder import Folder
from jaxserve.models.config import ModelConfig

ALPHA = 0.5  # 0: the weights keep their ranges, 1: the activations lose theirs
DTYPES = {"int8": np.dtype(np.int8), "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
SPELLINGS = {"fp8": "float8_e4m3fn"} | {name: name for name in DTYPES}
MOST = {"int8": 127.0, "float8_e4m3fn": 448.0}
NORMS = {"mixer.qkv": "norm1", "ffn.gate_up": "norm2"}  # what comes from a norm
LEAST = 1e-5
LARGEST = 65504  # of float16


def in_config(cfg: ModelConfig, dtype: str) -> dict:
    """quantization_config of config.json; ValueError for models that cannot be done."""
    calibrate.must_be_dense(cfg)
    return {"quant_method": "smooth_quant", "quant_dtype": dtype}


def quantize(
    model,
    windows,
    folder: Folder,
    dtype: str = "int8",
    *,
    alpha: float = ALPHA,
    batch: int = 1,
    progress: Callable | None = None,
):
    """Writes all layers of a model into `folder`; the caller finishes it.

    model, windows, batch, progress: as for `gptq_folder.quantize`.  dtype: a key of DTYPES.  Inputs are those of the
    unquantized model.  Layers that `folder` has already are left as they are.  ValueError names what is too large.
    """
    for block in calibrate.layers(model, windows, progress, batch):
        if folder.done(block.index):
            continue
        with np.errstate(over="ignore"):
            layer = smoothed(block, largest(block), alpha)
        tensors, errors = {}, {}
        for path in calibrate.MAPS:
            weight = np.asarray(calibrate.at(layer, path).weight)
            if (size := float(np.abs(weight).max())) > MOST[dtype] * LARGEST:
                raise ValueError(f"layer {block.index}, {path}: weights of {size:.3g} are too large for float16 scales")
            q, scale = rounded(weight, dtype)
            value = q.astype(np.float32) * scale
            errors[path] = float(np.sum((value - weight) ** 2) / max(float(np.sum(weight**2)), 1e-30))
            scales = block.tensors(path, scale[None])
            for name, array in block.tensors(path, q).items():
                tensors[f"{name}.weight"] = array
                tensors[f"{name}.scale"] = scales[name].astype(np.float16)
            bias = calibrate.at(layer, path).bias
            if bias is not None:
                tensors |= {f"{name}.bias": b[:, 0] for name, b in block.tensors(path, np.asarray(bias)[None]).items()}
        for path in set(NORMS.values()):
            tensors[f"{block.rows[path].sources[0].format(block.index)}.weight"] = np.asarray(getattr(layer, path))
        folder.write(block.index, tensors, {"errors": errors})


def largest(block) -> dict:
    """{path: float32[inputs], the largest magnitude of each input of a map over all windows}."""
    found: dict = {}
    for taken in block.inputs(*calibrate.MAPS):
        for path, x in taken.items():
            most = jnp.abs(x).max(0)
            found[path] = jnp.maximum(found[path], most) if path in found else most
    return {path: np.asarray(most) for path, most in found.items()}


def smoothed(block, most: dict, alpha: float = ALPHA):
    """The layer with every map's inputs divided by factors that its weights are multiplied by.

    Those of qkv and gate_up go into the norm before, those of down into the outputs of up, and those of o into those of
    v, where the query heads of a kv head share them.  What the layer computes stays the same.
    """
    layer, cfg = block.layer, block.cfg
    mixer, ffn = layer.mixer, layer.ffn
    by = {
        path: factors(most[path], np.asarray(calibrate.at(layer, path).weight), alpha)
        for path in ("mixer.qkv", "ffn.gate_up")
    }
    qkv, gate_up = np.array(mixer.qkv.weight), np.array(ffn.gate_up.weight)
    qkv *= by["mixer.qkv"].reshape(-1, 1, 1, 1)
    gate_up *= by["ffn.gate_up"].reshape(-1, 1, 1)
    norms = {name: np.asarray(getattr(layer, name)) / by[path] for path, name in NORMS.items()}

    down = np.array(ffn.down.weight)
    inner = factors(most["ffn.down"], down, alpha)
    down *= inner[:, None]
    gate_up[:, 1] /= inner
    gate_up_bias = _divided(ffn.gate_up.bias, (1,), inner)

    o = np.array(mixer.o.weight)
    heads = (cfg.kv_heads, -1, cfg.head_dim)
    ranges = np.abs(o).reshape(*heads, o.shape[1]).max((1, 3))
    shared = factors(most["mixer.o"].reshape(heads).max(1).reshape(-1), ranges.reshape(-1, 1), alpha)
    shared = shared.reshape(cfg.kv_heads, cfg.head_dim)
    o *= np.broadcast_to(shared[:, None], o.reshape(*heads, o.shape[1]).shape[:3]).reshape(-1, 1)
    qkv[:, :, -1] /= shared
    qkv_bias = _divided(mixer.qkv.bias, (slice(None), -1), shared)
    return layer.replace(
        **norms,
        mixer=mixer.replace(qkv=mixer.qkv.replace(weight=qkv, bias=qkv_bias), o=mixer.o.replace(weight=o)),
        ffn=ffn.replace(
            gate_up=ffn.gate_up.replace(weight=gate_up, bias=gate_up_bias), down=ffn.down.replace(weight=down)
        ),
    )


def _divided(bias, index, by):
    if bias is None:
        return None
    bias = np.array(bias)
    bias[index] /= by
    return bias


def factors(most, weight, alpha: float = ALPHA) -> np.ndarray:
    """What to divide inputs by, float32[inputs], of their largest magnitudes and the weights [inputs, ...] they meet.

    An input that never was anything but 0 is left alone.
    """
    ranges = np.maximum(np.abs(weight).reshape(len(weight), -1).max(1), LEAST)
    found = np.maximum(most, LEAST) ** alpha / ranges ** (1 - alpha)
    return np.where(most > 0, np.clip(found, LEAST, 1 / LEAST), 1).astype(np.float32)


def rounded(weight: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(q [inputs, *outputs] of `dtype`, scale float32[*outputs]) of a weight; float16 holds the scale."""
    most = MOST[dtype]
    scale = np.maximum(np.abs(weight).max(0) / most, 2.0**-24).astype(np.float16).astype(np.float32)
    steps = np.clip(weight / scale, -most, most)
    return (np.rint(steps) if dtype == "int8" else steps).astype(DTYPES[dtype]), scale
