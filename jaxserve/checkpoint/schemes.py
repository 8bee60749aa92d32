"""What a checkpoint's quantization_config says: which of the known schemes its linear maps are stored in.

Imports no jax, reads no weights.
"""

from typing import NamedTuple

from jaxserve.checkpoint import CheckpointError

READ = (
    "jaxserve reads AWQ (gemm, 4 bits), GPTQ (4 and 8 bits), compressed-tensors (pack-quantized, int-quantized and "
    "float-quantized), fp8 (e4m3) and smooth_quant (int8); take one of these or the unquantized version of the model"
)
WORDS = ("awq", "gptq")  # whose integers share int32s


class Scheme(NamedTuple):
    """How a checkpoint's maps are stored."""

    method: str  # of quantization_config
    kind: str  # "int4", "int8" or "fp8": what an element is
    packed: bool  # elements share int32s
    group: int = -1  # inputs that share a scale; -1: all
    rows: int = 1  # outputs that share one
    symmetric: bool = True
    zero_offset: int = 0  # what is added to a stored zero
    activations: str | None = None  # "dynamic" or "static": they are quantized too
    ordered: bool = False  # a tensor says which group an input is in

    @property
    def bits(self):
        return 4 if self.kind == "int4" else 8


class Packed(NamedTuple):
    """A map that may stay as the checkpoint has it."""

    kind: str
    group: int  # inputs that share a scale
    dtype: str  # of its scales
    zero: bool = False  # there are zero points
    order: bool = False  # inputs are to be taken in an order of their own
    activations: str | None = None
    spread: bool = False  # its elements are held in the type that the model computes in


def scheme(path, found):
    """The Scheme of a quantization_config; CheckpointError, with what was found, where it is not one that is read."""
    if not isinstance(found, dict):
        raise _unread(path, f"quantized ({found!r})")
    method = str(found.get("quant_method", ""))
    known = {
        "awq": _words,
        "gptq": _words,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "smooth_quant": _smooth_quant,
    }
    if method not in known:
        raise _unread(path, f"quantized ({method or 'an unnamed method'})")
    try:
        out = known[method](path, method, found)
    except (AttributeError, TypeError) as error:  # a stranger wrote it
        raise CheckpointError(f"{path}: quantization_config holds a value of the wrong kind: {error}") from error
    if any(type(n) is not int or (n < 1 and n != -1) for n in (out.group, out.rows)):
        raise CheckpointError(
            f"{path}: {method} weights in groups of {out.group!r}; a group has a whole number of inputs, or -1: all"
        )
    return out


def _unread(path, what):
    return CheckpointError(f"{path}: its weights are {what}, which jaxserve does not read; {READ}")


def _words(path, method, found):
    bits, group = (found.get(a, found.get(b)) for a, b in (("bits", "w_bit"), ("group_size", "q_group_size")))
    version = str(found.get("version") or "gemm").lower()
    if method == "awq" and version != "gemm":
        raise _unread(path, f"AWQ weights in the layout {version!r}")
    if type(bits) is not int or bits not in ((4,) if method == "awq" else (4, 8)):
        raise _unread(path, f"{method} weights of {bits!r} bits")
    group, offset, ordered = 128 if group is None else group, 0, False
    if method == "gptq":
        if (stored := found.get("checkpoint_format") or "gptq") not in ("gptq", "gptq_v2"):
            raise _unread(path, f"gptq weights in the layout {stored!r}")
        for maps, own in (found.get("dynamic") or {}).items():
            if not maps.startswith("-:") and (own.get("bits", bits), own.get("group_size", group)) != (bits, group):
                raise _unread(path, f"gptq weights of several kinds (dynamic: {maps!r} has its own)")
        offset, ordered = int(stored == "gptq"), bool(found.get("desc_act"))
    return Scheme(
        method, f"int{bits}", True, group, symmetric=bool(found.get("sym")), zero_offset=offset, ordered=ordered
    )


def _compressed(path, method, found):
    groups = [g for g in (found.get("config_groups") or {}).values() if isinstance(g, dict)]
    weights: list[dict] = [g["weights"] for g in groups if isinstance(g.get("weights"), dict)]
    if len(weights) != 1 or len(groups) != 1:
        raise _unread(path, f"compressed-tensors of {len(groups)} groups of layers, {len(weights)} with weights")
    transforms = ((found.get("transform_config") or {}).get("config_groups") or {}).values()
    places = {str(apply.get("location")) for transform in transforms for apply in transform.get("apply") or ()}
    if online := sorted(place for place in places if not place.startswith("weight_")):  # those of weights are in them
        raise _unread(path, f"compressed-tensors whose activations go through transforms ({', '.join(online)})")
    stored, w, inputs = groups[0].get("format") or found.get("format"), weights[0], groups[0].get("input_activations")
    bits, of = w.get("num_bits"), w.get("type", "int")
    strategy = w.get("strategy") or ("group" if w.get("group_size") else "channel")
    what = f"compressed-tensors of format {stored!r} ({bits} bits, {of}, a scale for each {strategy})"
    kinds: dict[tuple, str] = {
        ("pack-quantized", 4, "int"): "int4",
        ("pack-quantized", 8, "int"): "int8",
        ("int-quantized", 8, "int"): "int8",
        ("naive-quantized", 8, "int"): "int8",
        ("float-quantized", 8, "float"): "fp8",
        ("naive-quantized", 8, "float"): "fp8",
    }
    kind, packed = kinds.get((stored, bits, of)), stored == "pack-quantized"
    if kind is None or strategy not in (("group", "channel") if packed else ("group", "channel", "tensor", "block")):
        raise _unread(path, what)
    activations = None
    if inputs:
        if packed or inputs.get("num_bits") != 8 or inputs.get("type", "int") != of:
            raise _unread(path, f"{what} with activations of {inputs.get('num_bits')} bits, {inputs.get('type')}")
        if not w.get("symmetric", True):
            raise _unread(path, f"{what} with zero points and activations of 8 bits")
        activations = "dynamic" if inputs.get("dynamic") else "static"
        if activations == "static" and (inputs.get("strategy") != "tensor" or not inputs.get("symmetric", True)):
            raise _unread(path, f"{what} with static activations that are not symmetric by tensor")
    rows, group = _block(path, w.get("block_structure")) if strategy == "block" else (1, -1)
    group = w.get("group_size", 0) if strategy == "group" else group
    return Scheme(method, kind, packed, group, rows, bool(w.get("symmetric", True)), 0, activations)


def _block(path, block):
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise _unread(path, f"quantized in blocks of {block!r}")
    return tuple(block)


def _fp8(path, method, found):
    element = str(found.get("fmt") or found.get("weight_dtype") or "e4m3").lower()
    if "e4m3" not in element:
        raise _unread(path, f"fp8 weights of type {element}")
    activations = str(found.get("activation_scheme") or "dynamic")
    if activations not in ("dynamic", "static"):
        raise _unread(path, f"fp8 weights with activations {activations!r}")
    block = found.get("weight_block_size")
    rows, group = _block(path, block) if block else (1, -1)
    return Scheme(method, "fp8", False, group, rows, activations=activations)


def _smooth_quant(path, method, found):
    element = str(found.get("quant_dtype") or "int8").lower()
    kind = "int8" if element == "int8" else "fp8" if "e4m3" in element else None
    if kind is None:
        raise _unread(path, f"smooth_quant weights of type {element}")
    return Scheme(method, kind, False, activations="dynamic")
