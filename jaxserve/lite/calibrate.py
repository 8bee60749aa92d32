"""A model's layers one after the other, over windows of text, without a cache: what every quantizer needs.

One layer's weights are on the device at a time, in float32, and the next one's on their way, so that a model larger
than the device can be done.  Knows no quantization: a caller looks at a layer's inputs, and says with `Block.follow`
what the layers behind it shall see.
N windows, B windows at a time, T tokens of a window, D width, K kv heads, G queries a kv head, H head dim.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import mesh as meshes
from jaxserve import weights
from jaxserve.models import family, rope
from jaxserve.models.attention import GQA
from jaxserve.models.config import ModelConfig
from jaxserve.models.decoder import Layer
from jaxserve.models.layers import GatedMLP, rms_norm
from jaxserve.models.moe import MoE
from jaxserve.models.table import Row
from jaxserve.quant.dense import Dense

MAPS = ("mixer.qkv", "mixer.o", "ffn.gate_up", "ffn.down")  # a layer's linear maps, by their place in a Layer
CROWDED = 1 / 24  # of the device's memory, that one copy of the hidden states may take; there are up to six
# cuBLAS is quick with many tokens.  Of its own kernels XLA would try many; those of float32 take minutes to compile.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
EXPERT_ARRANGES = ("experts", "experts_gate_up")


@dataclass
class Block:
    """A layer, and the hidden states that come to it.

    hidden: a list of [B, T, D], computed by the layers before as `follow` left them; exact: by the unquantized ones,
    where `layers` was asked for both, else the same list.
    """

    index: int
    layer: Layer  # of Dense, float32
    hidden: list
    exact: list
    rows: dict[str, Row]  # place in a Layer -> its row of the family's table
    cfg: ModelConfig
    mesh: object
    on_host: bool = False  # hidden states are kept there, for they take much of the device
    quick: bool = False  # a GPU: time counts, the last bits do not
    roomy: bool = False  # the device has room for what comes into down, of all windows
    precision: str | None = None  # of products of float32 (jax.default_matmul_precision)
    narrow: bool = False  # a model of 16 bits: products take bfloat16, and add up float32
    _followed: Layer | None = field(default=None, repr=False)
    _outputs: tuple | None = field(default=None, repr=False)

    def inputs(self, *paths: str, layer: Layer | None = None, exact: bool = False) -> Iterator[dict[str, jax.Array]]:
        """For each batch of windows {path: what comes into this map, float32[tokens, inputs]}.

        layer: one with other weights (the block's own unless given); exact: from the unquantized model's hidden states.
        """
        of = self.factors(layer or self.layer)
        for x in self.exact if exact else self.hidden:
            with meshes.on(self.mesh), jax.default_matmul_precision(self.precision):
                _, taken = forward(self.cfg, self.cfg.window_at(self.index), paths, of, jnp.asarray(x))
            yield taken

    def outputs(self, layer: Layer | None = None, exact: bool = False) -> Iterator[jax.Array]:
        """What the layer makes of each batch of its inputs, float32[B, T, D]."""
        of = self.factors(layer or self.layer)
        for x in self.exact if exact else self.hidden:
            with meshes.on(self.mesh), jax.default_matmul_precision(self.precision):
                out, _ = forward(self.cfg, self.cfg.window_at(self.index), (), of, jnp.asarray(x))
            yield out  # outside: whoever stops asking would leave the mesh on

    def factors(self, layer: Layer) -> Layer:
        """A layer whose maps are as products take them here; those of experts stay."""
        return narrowed(layer) if self.narrow and isinstance(layer.ffn, GatedMLP) else layer

    def keep(self, x):
        """A batch that is needed again later, where such batches are kept."""
        return np.asarray(x) if self.on_host else x

    def follow(self, layer: Layer, outputs: tuple | None = None) -> None:
        """The layers behind this one shall see what `layer` makes of `hidden`.

        outputs: (that, and what the unquantized layer makes of `exact`), lists, where they are known.
        """
        self._followed, self._outputs = layer, outputs

    def tensors(self, path: str, array) -> dict[str, np.ndarray]:
        """{name in the checkpoint, without ".weight": [out, ...]} of an array [inputs, *outputs] at `path`.

        The first axis may have any length (groups of inputs), and becomes the last.
        """
        return {
            source.format(self.index, "{}"): part
            for source, part in zip(self.rows[path].sources, split(self.cfg, self.rows[path], np.asarray(array)))
        }


def layers(model, windows, progress: Callable | None = None, batch: int = 1, both: bool = False) -> Iterator[Block]:
    """The Blocks of a model, in order; beside each only the next one's weights are on the device.

    model: of `engine.loading.open_model`, unquantized.  windows: int32[N, T] token ids.  progress(done, total) counts
    layers.  both: keep what the unquantized layers make of the windows, too, as `exact`.  ValueError names the layer
    behind which a hidden state is no number, or overflows.
    """
    cfg, found = model.cfg, weights.check(model.source, model.cfg, model.mesh)
    rows = [row for row in family(cfg.family).weights(cfg) if "{}" in row.path]
    quick = hurries(model.mesh)
    wide = model.dtype == np.float32
    precision, narrow = "highest" if quick and wide else None, quick and not wide
    how = _crowded(model, windows), quick, _roomy(model, windows), precision, narrow
    hidden = exact = embedded(model, found, windows, batch)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read_layer, model, found, 0)
        for index in range(cfg.layers):
            here = [row for row in rows if row.layers is None or index in row.layers]
            mine = {row.path.split(".{}.")[1]: row for row in here}
            block = Block(index, coming.result(), hidden, exact, mine, cfg, model.mesh, *how)
            if index + 1 < cfg.layers:
                coming = ahead.submit(read_layer, model, found, index + 1)
            yield block
            hidden, exact = _behind(block, both)
            progress and progress(index + 1, cfg.layers)


def _behind(block, both):
    """The hidden states behind a layer, and, if `both`, those behind the unquantized one."""
    quantized = block._followed is not None and block._followed is not block.layer
    when = " after quantization" if quantized else ""
    if block._outputs is not None:
        hidden, exact = block._outputs
        return _sound(block, hidden, when), _sound(block, exact, "")
    exact = _sound(block, block.outputs(exact=True), "") if both else None
    if both and block.exact is block.hidden and not quantized:
        return exact, exact
    hidden = _sound(block, block.outputs(block._followed), when)
    return hidden, exact if both else hidden


def hurries(mesh) -> bool:
    """Whether time counts more than the same last bits: on a GPU, where large models are done."""
    return mesh.devices.flat[0].platform != "cpu"


def _crowded(model, windows) -> bool:
    """Whether the hidden states of all windows are too many to stay on the device, beside all else that comes."""
    limit = (model.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    return limit is not None and 4 * windows.size * model.cfg.width > CROWDED * limit


def _roomy(model, windows) -> bool:
    """Whether what comes into all windows' down, twice, leaves enough of the device for all else."""
    limit, cfg = (model.mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit"), model.cfg
    return limit is not None and 4 * windows.size * (8 * cfg.width + 2 * cfg.ffn) < limit / 2


def _sound(block, batches, when):
    """The batches as a list; ValueError where one holds what is no number."""
    out, sound = [], []
    for x in batches:
        sound.append(_finite(x))
        out.append(block.keep(x))
    if not all(map(bool, sound)):  # asked in the end: the device need not wait
        raise ValueError(
            f"layer {block.index}{when}: its output has values that are no numbers, or too large; the weights of "
            "this layer are damaged, or the calibration text is nothing that the model can read"
        )
    return out


@jax.jit
def _finite(x):
    return jnp.isfinite(x).all()


def embedded(model, found, windows, batch):
    """Hidden states before the first layer, a list of float32[B, T, D]."""
    leaf = found["embed", "weight"]
    table, _ = leaf.finish(leaf.load(model.source), np.float32)
    windows = np.asarray(windows)
    return [table[windows[at : at + batch]] for at in range(0, len(windows), batch)]


def read_layer(model, found, index) -> Layer:
    """A layer's weights on the device in float32, as Dense nodes.  ValueError names a tensor that holds no numbers."""
    tree: dict = {}
    for (path, part), leaf in found.items():
        if not path.startswith(prefix := f"layers.{index}."):
            continue
        array, _ = leaf.finish(leaf.load(model.source), np.float32)
        if not _finite(array):
            names = " or ".join(f"{source.format('*')}.{part}" for source in leaf.sources)
            raise ValueError(f"layer {index}: tensor {names} has values that are no numbers; get the model again")
        node = tree
        for name in path.removeprefix(prefix).split("."):
            node = node.setdefault(name, {})
        node[part] = array
    mixer, ffn = tree["mixer"], {name: Dense(**node) for name, node in tree["ffn"].items()}
    norms = {name: mixer[name]["weight"] for name in ("q_norm", "k_norm") if name in mixer}
    return Layer(
        norm1=tree["norm1"]["weight"],
        mixer=GQA(qkv=Dense(**mixer["qkv"]), o=Dense(**mixer["o"]), **norms),
        norm2=tree["norm2"]["weight"],
        ffn=MoE(**ffn) if "router" in ffn else GatedMLP(**ffn),
    )


@partial(jax.jit, static_argnames=("cfg", "window", "paths"), compiler_options=OPTIONS)
def forward(cfg, window, paths, layer, x):
    """A layer over whole windows: x [B, T, D] to the same shape, and {path: [B*T, inputs]} of the maps in `paths`."""
    taken = {"mixer.qkv": normed(cfg, layer, x), "mixer.o": attended(cfg, window, layer, x)}
    middle = mixed(layer, x, taken["mixer.o"])
    taken |= dict.fromkeys(("ffn.gate_up", "ffn.router"), ready(cfg, layer, middle))
    if isinstance(layer.ffn, GatedMLP):
        taken["ffn.down"] = inner(cfg, layer, middle)
    return fed(cfg, layer, middle), {path: taken[path].reshape(-1, taken[path].shape[-1]) for path in paths}


def product(node, x):
    """A map of x, in the type of x; the map's type is that of the factors."""
    return node.dot(x.astype(node.weight.dtype), x.dtype)


@jax.jit
def narrowed(layer):
    """A layer whose maps are bfloat16; norms and biases stay."""
    return jax.tree.map_with_path(
        lambda path, x: x.astype(jnp.bfloat16) if getattr(path[-1], "name", "") == "weight" else x, layer
    )


# The parts of a layer, each [B, T, ...] of what the one before gives.


def normed(cfg, layer, x):
    """What comes into `mixer.qkv`: of the hidden states x."""
    return rms_norm(x, layer.norm1, cfg.eps)


def attended(cfg, window, layer, x):
    """What comes into `mixer.o`: of the hidden states x."""
    return attend(cfg, window, layer.mixer, product(layer.mixer.qkv, normed(cfg, layer, x)))


def mixed(layer, x, attended):
    """The hidden states in the middle of the layer."""
    return x + product(layer.mixer.o, attended)


def ready(cfg, layer, middle):
    """What comes into `ffn.gate_up`, or into the router and the experts."""
    return rms_norm(middle, layer.norm2, cfg.eps)


def inner(cfg, layer, middle):
    """What comes into `ffn.down`."""
    both = product(layer.ffn.gate_up, ready(cfg, layer, middle))
    return jax.nn.silu(both[..., 0, :]) * both[..., 1, :]


def fed(cfg, layer, middle):
    """The layer's output."""
    if isinstance(layer.ffn, GatedMLP):
        return middle + product(layer.ffn.down, inner(cfg, layer, middle))
    flat = ready(cfg, layer, middle).reshape(-1, middle.shape[-1])
    return middle + layer.ffn.mix(cfg, flat).reshape(middle.shape)


def attend(cfg, window, mixer, qkv):
    """Causal attention over whole windows: qkv [B, T, K, G+2, H] to [B, T, K*G*H]."""
    batch, length = qkv.shape[:2]
    q, k, v = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1, :]
    if mixer.q_norm is not None:
        q, k = rms_norm(q, mixer.q_norm, cfg.eps), rms_norm(k, mixer.k_norm, cfg.eps)
    at = jnp.arange(length)
    spans = SimpleNamespace(position=at, rope_len=jnp.full(1, length), row=jnp.zeros(length, jnp.int32))
    cos, sin = (a[None, :, None, None] for a in rope.rotation(cfg, spans))  # [1, T, 1, 1, H/2]
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)[..., 0, :]
    kind = mixer.qkv.weight.dtype
    scores = jnp.einsum("btkgh,bskh->bkgts", *(a.astype(kind) for a in (q, k)), preferred_element_type=qkv.dtype)
    scores = scores * cfg.head_dim**-0.5
    back = at[:, None] - at[None]  # how far before the query a key is
    seen = (back >= 0) & (back < (window or length))
    share = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), -1)
    out = jnp.einsum("bkgts,bskh->btkgh", *(a.astype(kind) for a in (share, v)), preferred_element_type=qkv.dtype)
    return out.reshape(batch, length, -1)


def _rotate(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def must_be_dense(cfg: ModelConfig) -> None:
    """ValueError for a mixture of experts, whose experts each see a part of the text."""
    if any(row.arrange in EXPERT_ARRANGES for row in family(cfg.family).weights(cfg)):
        raise ValueError("a mixture of experts: only `jaxserve lite auto_awq` takes it")


def at(layer, path: str):
    """The linear map at a path of a layer."""
    part, name = path.split(".")
    return getattr(getattr(layer, part), name)


def placed(layer, path: str, weight):
    """The layer with another weight at `path`."""
    part, name = path.split(".")
    node = getattr(layer, part)
    return layer.replace(**{part: node.replace(**{name: getattr(node, name).replace(weight=weight)})})


def join(cfg, row, parts):
    """How a row's sources are arranged (models/table.py): [out, in] of each source to [in, *out]; see `split`."""
    inputs, width = parts[0].shape[-1], cfg.head_dim
    if row.arrange == "qkv":
        heads = [part.reshape(cfg.kv_heads, -1, width, inputs) for part in parts]
        flat = np.concatenate(heads, 1)
    elif row.arrange == "wqkv":
        flat = parts[0].reshape(cfg.kv_heads, -1, width, inputs)
    else:
        flat = np.stack(parts) if row.arrange == "gate_up" else parts[0]
    return np.moveaxis(flat, -1, 0)


def split(cfg, row, array):
    """The inverse of how a row's sources are arranged (models/table.py): [in, *out] to one [out, in] for each source.

    The first axis may have any length.  Arrays of NumPy or JAX.
    """
    flat = array.transpose(*range(1, array.ndim), 0)
    inputs = flat.shape[-1]
    if row.arrange == "qkv":
        return [part.reshape(-1, inputs) for part in (flat[:, :-2], flat[:, -2], flat[:, -1])]
    if row.arrange == "gate_up":
        return [flat[0], flat[1]]
    assert row.arrange not in EXPERT_ARRANGES, row
    return [flat.reshape(-1, inputs)]
