"""Times the matmuls of quantized weights inside one CUDA graph, over more weights than the L2 holds, beside bf16's.

    python scripts/bench_matmuls.py [--model il18 l8b experts] [--matrix 4096x6144] [--tokens 1 16] [--only int4 fp8]

A line for a matrix, a number of tokens and a way: microseconds a call, GB/s of weights, TFLOP/s, the share of the
device's limit (whichever of the two is nearer), times as fast as bf16, the error against the definition.  Ways of
`int4` show each kernel by itself where it takes so many tokens, so that the borders between them can be moved; that by
wgmma puts the tokens' inputs in order in a kernel of its own here, which in a model is part of the norm.  `bf16 gated`
has SiLU and product of the matrix's halves in it.  The last line is all of it as JSON.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import pallas_kernels as pk

LIMITS = {"NVIDIA H200": (4.3e12, 790e12)}  # bytes/s of a copy and bf16 FLOP/s of a matmul, measured
L2 = 60e6
SPAN = 2e-3  # seconds that a graph takes, at least, so that the next one is dispatched before it ends
CALLS = 96  # at most, in a graph: more take long to compile
START = 1.5e-6  # seconds a kernel takes besides its work
MODELS = {  # inputs, outputs
    "il18": [(2048, 4096), (2048, 2048), (2048, 16384), (8192, 2048)],
    "l8b": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)],
}
EXPERTS = [(128, 8, 2048, 1536), (128, 8, 768, 2048), (8, 2, 4096, 28672)]  # experts, those of a token, inputs, outputs
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
BYTES = {"bf16": 2, "int4": 0.5 + 3 / GROUP, "int8": 1, "fp8": 1, "w8": 1 + 6 / GROUP, "fp8-block": 1 + 4 / GROUP}


def draw(kind, lead, D, F, key):
    """Arrays of a random matrix [D, *lead, F], as the kernels take them."""
    keys, small = jax.random.split(key, 2), 0.5 * D**-0.5
    if kind == "bf16":
        return (jax.random.normal(keys[0], (*lead, D, F), jnp.bfloat16) * small,)
    groups = 1 if kind in ("int8", "fp8") else D // GROUP
    scale = jax.random.uniform(keys[1], (groups, *lead, F), jnp.float32, 0.5, 1) * small
    if kind == "int4":
        q = jax.random.randint(keys[0], (D, *lead, F), 0, 16, jnp.uint8)
        return pk.int4_tiles(q), (scale / 4).astype(jnp.float16), jnp.full(scale.shape, 8, jnp.uint8)
    if kind in ("int8", "w8"):
        q = jax.random.randint(keys[0], (*lead, F, D), -127, 128, jnp.int8)
        zero = (jnp.ones(scale.shape, jnp.int16),) if kind == "w8" else ()
        return q, scale / 64, *zero
    return jax.random.normal(keys[0], (*lead, F, D), jnp.bfloat16).astype(jnp.float8_e4m3fn), scale


def eight(kind, D):
    """How a kind's 8-bit products are computed."""
    return {
        "group": D if kind in ("int8", "fp8") else GROUP,
        "activations": {"int8": "int8", "w8": None}.get(kind, "fp8"),
    }


def ways(kind, T, D, F):
    """{name: function(x, *arrays)} of a matrix."""
    if kind == "bf16":
        out = {"bf16": lambda x, w: x @ w}
        if pk.gates(T, D, F // 2, jnp.bfloat16) and F > 4 * D:  # two maps of a feed-forward layer
            out["bf16, then gate"] = lambda x, w: jax.nn.silu((y := x @ w)[:, : F // 2]) * y[:, F // 2 :]
            out["bf16 gated"] = lambda x, w: pk.gated_matmul(x, w.reshape(D, 2, F // 2))
        return out
    if kind != "int4":
        return {kind: functools.partial(pk.eight_bit_matmul, **eight(kind, D))}
    from pallas_kernels.hopper_int4 import int4_wgmma
    from pallas_kernels.int4_few import int4_few
    from pallas_kernels.int4_mma import int4_by_values

    out = {"int4": functools.partial(pk.int4_matmul, group=GROUP)}
    if T <= 32:
        out["int4 by integers"] = functools.partial(int4_few, group=GROUP)
    if T > 8:
        out["int4 by wgmma"] = functools.partial(int4_wgmma, group=GROUP)
    if T >= 128:
        out["int4 by values"] = functools.partial(int4_by_values, group=GROUP)
    return out


def expert_ways(kind, D):
    """The same of experts: function(x, *arrays, sizes)."""
    if kind == "bf16":
        return {"bf16": pk.grouped_matmul}
    if kind == "int4":
        from pallas_kernels.hopper_int4 import int4_experts
        from pallas_kernels.int4_few import int4_few

        out = {"int4": functools.partial(pk.int4_grouped, group=GROUP)}
        for name, kernel in (("int4 by integers", int4_few), ("int4 by wgmma", int4_experts)):
            out[name] = functools.partial(_flat, kernel)
        return out

    def run(x, weight, scale, *rest):
        return pk.grouped_eight_bit(x, weight, scale, rest[-1], *rest[:-1], **eight(kind, D))

    return {kind: run}


def _flat(kernel, x, tiles, scale, zero, sizes):
    """A kernel that takes experts' matrices side by side."""
    scale, zero = (a.reshape(len(a), -1) for a in (scale, zero))
    return kernel(x, tiles.reshape(-1, *tiles.shape[2:]), scale, zero, sizes, group=GROUP)


def chain(way, total, x, matrices, calls, extra=()):
    """`calls` products one after the other, each waiting for the one before; total [8] plus some of their elements."""
    way, found = jax.jit(way), [x[:1]]  # lowered once
    for i in range(calls):
        # The matrix too, or XLA writes its values out but once.
        x, matrix, found[-1] = jax.lax.optimization_barrier((x, matrices[i % len(matrices)], found[-1]))
        found.append(way(x, *matrix, *extra))
    found = jax.lax.optimization_barrier(found)
    return functools.reduce(jnp.add, [y.reshape(-1)[:8].astype(jnp.float32) for y in found], total)


def compiled(way, x, matrices, calls, extra=()):
    """A function of `total` that runs a graph of so many calls: the state is donated."""
    run = jax.jit(functools.partial(chain, way), static_argnums=3, donate_argnums=0, keep_unused=True)
    made = run.lower(jnp.zeros(8), x, matrices, calls, extra).compile()
    return lambda total: made(total, x, matrices, extra)


def seconds(run, calls):
    """Of a call; several graphs are dispatched before one is waited for."""

    def several(count):
        total = jnp.zeros(8)
        begun = time.perf_counter()
        for _ in range(count):
            total = run(total)
        total.block_until_ready()
        return (time.perf_counter() - begun) / count

    several(3)  # records the graph
    count = max(5, int(0.02 / several(3)))
    return statistics.median(several(count) for _ in range(5)) / calls


def reference(kind, x, arrays, extra, D):
    """By the definition, for the first matrix; int4 through its values."""
    if kind == "bf16":
        return None
    if kind == "int4":
        from pallas_kernels.int4_mma import int4_untile

        tiles, scale, zero = arrays
        q = int4_untile(tiles.reshape(-1, *tiles.shape[-2:])).astype(jnp.float32).reshape(D, *scale.shape[1:])
        w = (q - jnp.repeat(zero.astype(jnp.float32), GROUP, 0)) * jnp.repeat(scale.astype(jnp.float32), GROUP, 0)
        if extra:
            return pk.grouped_matmul_reference(x, jnp.moveaxis(w, 0, 1).astype(x.dtype), *extra)
        return x.astype(jnp.float32) @ w
    if extra:
        return pk.grouped_eight_bit_reference(x, *arrays[:2], *extra, *arrays[2:], **eight(kind, D))
    return pk.eight_bit_matmul_reference(x, *arrays, **eight(kind, D))


class Case(NamedTuple):
    """A matrix of a kind and a number of tokens, and what a call of it is."""

    name: str
    kind: str
    T: int
    x: jax.Array
    matrices: list
    extra: tuple  # sizes of experts
    D: int
    parameters: int  # that are used
    flops: int

    @property
    def limit(self):
        """Seconds, or None on a device that is not known."""
        bandwidth, peak = LIMITS.get(jax.devices()[0].device_kind, (None, None))
        return bandwidth and max(self.bytes / bandwidth, self.flops / peak)

    @property
    def bytes(self):
        return self.parameters * BYTES[self.kind]

    @property
    def calls(self):
        """In a graph."""
        return min(CALLS, max(4, int(SPAN / ((self.limit or 1e-5) + START))))

    @property
    def ways(self):
        """{name: function}, see `ways`."""
        return (
            expert_ways(self.kind, self.D) if self.extra else ways(self.kind, self.T, self.D, self.parameters // self.D)
        )


def measure(case, label, way, run, base):
    """The row of one way; prints it.  base: seconds of bf16, if known."""
    took, error = seconds(run, case.calls), None
    base = took if label == "bf16" else base
    want = reference(case.kind, case.x, case.matrices[0], case.extra, case.D)
    if want is not None:
        found = way(case.x, *case.matrices[0], *case.extra).astype(jnp.float32)
        error = float(jnp.linalg.norm(found - want.astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32)))
    row = {"matrix": case.name, "tokens": case.T, "way": label, "us": took * 1e6, "gb_s": case.bytes / took / 1e9}
    row |= {"tflop_s": case.flops / took / 1e12, "share": case.limit and case.limit / took}
    row |= {"of_bf16": base and base / took, "error": error}
    figures = f"{row['us']:9.1f} us {row['gb_s']:7.0f} GB/s {row['tflop_s']:6.1f} TFLOP/s"
    rest = "".join(f"  {key} {row[key]:.3g}" for key in ("share", "of_bf16", "error") if row[key] is not None)
    print(f"{case.name:>22} {case.T:5d} {label:<18}{figures}{rest}", flush=True)
    return row


def cases(models):
    """(name, experts or None, experts of a token, inputs, outputs) of what is asked for."""
    for model in models:
        if model == "experts":
            yield from ((f"{E}x {D}x{F}", E, X, D, F) for E, X, D, F in EXPERTS)
        else:
            yield from ((f"{model} {D}x{F}", None, 1, D, F) for D, F in MODELS[model])


def draw_cases(kind, matrix, tokens):
    """A Case for each number of tokens, of copies of a matrix that do not fit into the L2."""
    name, E, X, D, F = matrix
    lead, parameters = () if E is None else (E,), (E or 1) * D * F
    copies = max(2, int(2 * L2 / (parameters * BYTES[kind])) + 1)
    keys = jax.random.split(jax.random.key(0), copies)
    matrices = [jax.jit(draw, static_argnums=(0, 1, 2, 3))(kind, lead, D, F, key) for key in keys]
    for T in tokens:
        x, extra, used = jax.random.normal(jax.random.key(T), (T * X, D), jnp.bfloat16), (), 1
        if E:
            expert = np.random.default_rng(T).integers(0, E, T * X)
            extra = (jnp.asarray(np.bincount(expert, minlength=E), jnp.int32),)
            used = int((extra[0] > 0).sum())
        yield Case(name, kind, T, x, matrices, extra, D, used * D * F, 2 * T * X * D * F)


def main():
    parser = argparse.ArgumentParser(description="Times the matmuls of quantized weights.")
    parser.add_argument("--model", nargs="+", choices=[*MODELS, "experts"], default=[*MODELS, "experts"])
    parser.add_argument("--matrix", nargs="+", default=[""], help="of these, inputs x outputs, as 14336x4096")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", nargs="+", choices=BYTES, default=list(BYTES))
    options, rows = parser.parse_args(), []
    matrices = [matrix for matrix in cases(options.model) if matrix[0].endswith(tuple(options.matrix))]
    if not matrices:
        parser.error(f"--matrix: there are {', '.join(name for name, *_ in cases(options.model))}")
    if reason := pk.available():
        parser.exit(2, f"the kernels cannot run: {reason}\n")
    for matrix in matrices:
        base: dict = {}  # seconds of bf16 by tokens
        for kind in dict.fromkeys(["bf16", *options.only]):
            drawn = list(draw_cases(kind, matrix, options.tokens))
            todo = [(case, label, way) for case in drawn for label, way in case.ways.items()]
            with ThreadPoolExecutor() as pool:  # nothing is timed beside a compiler
                runs = list(
                    pool.map(lambda at: compiled(at[2], at[0].x, at[0].matrices, at[0].calls, at[0].extra), todo)
                )
            for (case, label, way), run in zip(todo, runs, strict=True):
                rows.append(measure(case, label, way, run, base.get(case.T)))
                if label == "bf16":
                    base[case.T] = rows[-1]["us"] / 1e6
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
