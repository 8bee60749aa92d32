"""Compiles an engine's programs for an H200, without a GPU, and counts what a step launches.

    python scripts/count_kernels.py [--tokens 16 --rows 16]

Needs jax's CUDA plugin (`pip install jax[cuda13]`), triton and jax-triton, on any machine.  The model is a Llama of
1.8B shapes; a program of two and one of four layers tell what a layer costs.  A line of JSON for each program: command
buffers (CUDA graphs: one is what we want), launches outside of them, launches that are there once, launches of a layer,
copies among them by kind, and the bytes that the program needs beside its arguments (a copied pool would show there).
"""

import argparse
import glob
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TARGET = PROJECT / "tests" / "data" / "h200.txtpb"
THUNK = re.compile(r"^( *)\d+: (k\w+)", re.M)  # what is in another one is indented
COPIES = ("kCopy", "kMemcpy", "kDeviceToDeviceCopy", "kMemzero", "kMemset32BitValue")
PROGRAMS = ((16, 16), (256, 256), (640, 256), (4096, 256))  # tokens, rows: decoding, prompts among it, prompts alone
LAYERS = (2, 4)
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 92544,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def h200():
    """A mesh of one H200 that is not there."""
    from jax.experimental import topologies

    one = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
    )
    return topologies.make_mesh(one, (1,), ("tp",))


def runner(mesh, layers):
    """The engine's runner for a model without weights."""
    import jax.numpy as jnp

    from jaxserve import ops, weights
    from jaxserve.engine.memory import MemoryPlan
    from jaxserve.engine.runner import Runner
    from jaxserve.models.config import from_hf

    ops.kernels = lambda: True
    cfg = from_hf(MODEL | {"num_hidden_layers": layers})
    plan = MemoryPlan("NVIDIA H200", 1, 139 << 30, 4 << 30, 80 << 30, 1 << 30, 64, 8000, 4096, 256, 4096)
    return Runner(cfg, mesh, plan, jnp.dtype("bfloat16"), weights.shapes(cfg, mesh, set(), jnp.bfloat16))


def thunks(mesh, layers, tokens, rows, folder):
    """([kinds of what a step launches within a command buffer], [kinds outside], bytes beside the arguments)."""
    import jax

    from jaxserve.step import Shape, step

    made = runner(mesh, layers)
    shape = Shape(tokens, rows, 64, False)
    for path in glob.glob(f"{folder}/*"):
        os.unlink(path)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = step.lower(*made._arguments(shape)).compile(compiler_options=made._options(tokens))
    (path,) = glob.glob(f"{folder}/*jit_step*thunk_sequence_after_thunk_passes.txt")
    found = [(len(indent), kind) for indent, kind in THUNK.findall(Path(path).read_text())]
    # Between a command buffer and a launch there may be a wrapper that says where in an array its argument begins.
    leaves = [a for a, b in zip(found, [*found[1:], (0, "")], strict=True) if b[0] <= a[0]]
    outside = [kind for depth, kind in found if depth == 0]
    return [kind for depth, kind in leaves if depth], outside, compiled.memory_analysis().temp_size_in_bytes


def count(mesh, tokens, rows, folder):
    """The figures of one program."""
    few, many = (thunks(mesh, layers, tokens, rows, folder) for layers in LAYERS)
    once, all_, outside = Counter(few[0]), Counter(many[0]), Counter(many[1])
    more = LAYERS[1] - LAYERS[0]
    layer = (all_.total() - once.total()) / more
    return {
        "tokens": tokens,
        "rows": rows,
        "command_buffers": outside.pop("kCommandBuffer", 0),
        "outside": dict(outside),
        "once": once.total() - LAYERS[0] * layer,
        "layer": layer,
        "layer_kinds": {kind: n / more for kind, n in (all_ - once).items()},
        "copies": {kind: n for kind, n in all_.items() if kind in COPIES},
        "temp_bytes": many[2],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, help="of one program; as many as rows: a decode step")
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    programs = PROGRAMS if options.tokens is None else ((options.tokens, min(options.rows, options.tokens)),)
    with tempfile.TemporaryDirectory() as folder:
        # Read when XLA starts, so before jax is imported.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text".strip()
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver is no obstacle
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TRITON_INTERPRET"] = "0"
        sys.path.insert(0, str(PROJECT))
        mesh = h200()
        for tokens, rows in programs:
            print(json.dumps(count(mesh, tokens, rows, folder)), flush=True)


if __name__ == "__main__":
    main()
