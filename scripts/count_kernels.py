"""Compiles an engine's programs for an H200, without a GPU, and counts what a step launches.

    python scripts/count_kernels.py [--tokens 16 --rows 16 [--steps 4] [--full]] [--tp 2]

Needs jax's CUDA plugin (`pip install jax[cuda13]`), triton and jax-triton, on any machine.  The model is a Llama of
1.8B shapes; a program of two and one of four layers tell what a layer costs.  A line of JSON for each program: command
buffers (CUDA graphs: one is what we want) and launches outside of them; of both, launches that are there once, launches
of a layer, copies by kind; and the bytes that the program needs beside its arguments (a copied pool would show there).
Of a program of several steps these are one step's, as often as the loop turns, and `before` is launched ahead of it.
"""

import argparse
import glob
import json
import os
import re
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TARGET = PROJECT / "tests" / "data" / "h200.txtpb"
THUNK = re.compile(r"^( *)\d+: (k\w+)", re.M)  # what is in another one is indented
LOOP = re.compile(r"^\d+: kWhile.*\n(?:.*\n)*?  body:\n((?:    .*\n)*)", re.M)
TURNS = re.compile(r'known_trip_count":\{"n":"(\d+)"')  # unknown to XLA, the host would ask the device in each turn
COPIES = ("kCopy", "kMemcpy", "kDeviceToDeviceCopy", "kMemzero", "kMemset32BitValue")
# Tokens, rows, steps, whether by the full sampler: decoding, the same several steps at a time, prompts among it,
# prompts alone, and what draws for these.
PROGRAMS = (
    (16, 16, 1, False),
    (256, 256, 1, False),
    (16, 16, 4, False),
    (16, 16, 4, True),
    (640, 256, 1, False),
    (4096, 256, 1, False),
    (0, 256, 1, False),
    (0, 256, 1, True),
)
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


def h200(tp=1):
    """A mesh of H200s that are not there."""
    from jax.experimental import topologies

    all_ = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=TARGET.read_text(), topology=f"1x1x{tp}"
    )
    return topologies.make_mesh(all_, (tp,), ("tp",))


def runner(mesh, layers, kv=None):
    """The engine's runner for a model without weights."""
    import jax.numpy as jnp

    from jaxserve import ops, weights
    from jaxserve.engine.memory import MemoryPlan
    from jaxserve.engine.runner import Runner
    from jaxserve.models.config import from_hf

    ops.kernels = lambda: True
    cfg = weights.padded(from_hf(MODEL | {"num_hidden_layers": layers}), mesh.size)
    plan = MemoryPlan("NVIDIA H200", mesh.size, 139 << 30, 4 << 30, 80 << 30, 1 << 30, 64, 8000, 4096, 256, 4096, kv=kv)
    return Runner(cfg, mesh, plan, jnp.dtype("bfloat16"), weights.shapes(cfg, mesh, set(), jnp.bfloat16))


def job(made, tokens, rows, steps, full):
    """(key, jitted function, arguments, compiler options) of one program; without tokens, of one that draws."""
    from jaxserve.ops import waiting
    from jaxserve.step import Shape, advance, sampled, step

    if not tokens:
        key = ("draw", rows) if full else ("pick", rows, rows)
        return key, *made._jobs()[key]
    if full and steps == 1:
        shape, ticket = Shape(tokens, rows, 64), made._struct((waiting.TICKET,))
        return ("sampled", shape), sampled, (*made._arguments(shape), ticket), made._options(tokens)
    shape, function = Shape(tokens, rows, 64, full, steps), step if tokens == rows else advance
    return (function.__name__, shape), function, made._arguments(shape), made._options(tokens)


def parts(text):
    """([kinds of what is launched within a command buffer], [kinds outside])."""
    found = [(len(indent), kind) for indent, kind in THUNK.findall(text)]
    # Between a command buffer and a launch there may be a wrapper that says where in an array its argument begins.
    leaves = [a for a, b in zip(found, [*found[1:], (0, "")], strict=True) if b[0] <= a[0]]
    return [kind for depth, kind in leaves if depth], [kind for depth, kind in found if depth == 0]


def _launches(outside):
    """What is outside of command buffers, counted, without what only marks where it begins and ends."""
    return Counter(kind for kind in outside if kind not in ("kCommandBuffer", "kAsyncStart", "kAsyncDone"))


def thunks(mesh, layers, program, folder, kv=None):
    """(name, `parts` of what a step launches, launches before a loop, turns of it, bytes beside the arguments)."""
    import jax

    for path in glob.glob(f"{folder}/*"):
        os.unlink(path)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        (name, *_), function, arguments, options = job(runner(mesh, layers, kv), *program)
        compiled = function.lower(*arguments).compile(compiler_options=options)
    (path,) = glob.glob(f"{folder}/*jit_{name}*thunk_sequence_after_thunk_passes.txt")
    text, before, turns = Path(path).read_text(), 0, 1
    if loop := LOOP.search(text):
        inside, outside = parts(text[: loop.start()])
        before, turns = len(inside) + len(outside) - outside.count("kCommandBuffer"), TURNS.search(compiled.as_text())
        text, turns = textwrap.dedent(loop[1]), turns and int(turns[1])
    return name, parts(text), before, turns, compiled.memory_analysis().temp_size_in_bytes


def count(mesh, program, folder, kv=None):
    """The figures of one program."""
    _, few, *_ = thunks(mesh, LAYERS[0], program, folder, kv)
    name, many, before, turns, size = thunks(mesh, LAYERS[1], program, folder, kv)
    once, all_ = (Counter(found[0]) + _launches(found[1]) for found in (few, many))
    buffers, outside = many[1].count("kCommandBuffer"), _launches(many[1])
    more = LAYERS[1] - LAYERS[0]
    layer = (all_.total() - once.total()) / more
    return {
        "program": name,
        **dict(zip(("tokens", "rows", "steps", "full"), program, strict=True)),
        "turns": turns,
        "before": before,
        "command_buffers": buffers,
        "outside": dict(outside),
        "once": once.total() - LAYERS[0] * layer,
        "layer": layer,
        "layer_kinds": {kind: n / more for kind, n in (all_ - once).items()},
        "copies": {kind: n for kind, n in all_.items() if kind in COPIES},
        "temp_bytes": size,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, help="of one program; as many as rows: a decode step; 0: of what draws")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1, help="of decoding in one launch [1]")
    parser.add_argument("--full", action="store_true", help="by the full sampler: a decode step, or what draws")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that the model is split over [1]")
    parser.add_argument("--kv", choices=("int8", "int4", "fp8"), help="of a quantized KV cache")
    options = parser.parse_args()
    one = (options.tokens, options.rows, options.steps, options.full)
    programs = PROGRAMS if options.tokens is None else (one,)
    with tempfile.TemporaryDirectory() as folder:
        # Read when XLA starts, so before jax is imported.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder} --xla_dump_hlo_as_text".strip()
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver is no obstacle
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TRITON_INTERPRET"] = "0"
        sys.path.insert(0, str(PROJECT))
        try:
            mesh = h200(options.tp)
        except NotImplementedError:  # of jax, which knows no such platform
            parser.error("jax's CUDA plugin is not installed here: pip install '.[cuda13]'")
        for program in programs:
            print(json.dumps(count(mesh, program, folder, options.kv)), flush=True)


if __name__ == "__main__":
    main()
