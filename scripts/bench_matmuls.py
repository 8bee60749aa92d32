"""Times the matmuls of quantized weights inside one CUDA graph, over more weights than the L2 holds, beside bf16's.

    python scripts/bench_matmuls.py [--model il18 l8b experts] [--tokens 1 16 256] [--only int4 fp8]

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
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import pallas_kernels as pk

LIMITS = {"NVIDIA H200": (4.3e12, 790e12)}  # bytes/s of a copy and bf16 FLOP/s of a matmul, measured
L2 = 60e6
SPAN = 2e-3  # seconds that a graph takes, at least, so that the next one is dispatched before it ends
CALLS = 256  # at most, in a graph
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
        return {"int4": functools.partial(pk.int4_grouped, group=GROUP)}

    def run(x, weight, scale, *rest):
        return pk.grouped_eight_bit(x, weight, scale, rest[-1], *rest[:-1], **eight(kind, D))

    return {kind: run}


def chain(way, total, x, matrices, calls, extra=()):
    """`calls` products one after the other, each waiting for the one before; total [8] plus some of their elements."""
    way, found = jax.jit(way), [x[:1]]  # lowered once
    for i in range(calls):
        # The matrix too, or XLA writes its values out but once.
        x, matrix, found[-1] = jax.lax.optimization_barrier((x, matrices[i % len(matrices)], found[-1]))
        found.append(way(x, *matrix, *extra))
    found = jax.lax.optimization_barrier(found)
    return functools.reduce(jnp.add, [y.reshape(-1)[:8].astype(jnp.float32) for y in found], total)


def seconds(way, x, matrices, calls, extra=()):
    """Of a call: the state is donated, and several graphs are dispatched before one is waited for."""
    run = jax.jit(functools.partial(chain, way), static_argnums=3, donate_argnums=0, keep_unused=True)

    def several(count):
        total = jnp.zeros(8)
        begun = time.perf_counter()
        for _ in range(count):
            total = run(total, x, matrices, calls, extra)
        total.block_until_ready()
        return (time.perf_counter() - begun) / count

    several(3)  # compiles, and records the graph
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


def measure(name, kind, T, x, matrices, extra, D, parameters, flops, base, rows):
    """Lines and rows of a kind's ways; the time of bf16."""
    bandwidth, peak = LIMITS.get(jax.devices()[0].device_kind, (None, None))
    bytes_ = parameters * BYTES[kind]
    limit = bandwidth and max(bytes_ / bandwidth, flops / peak)
    calls = min(CALLS, max(4, int(SPAN / ((limit or 1e-5) + START))))
    for label, way in (expert_ways(kind, D) if extra else ways(kind, T, D, parameters // D)).items():
        took = seconds(way, x, matrices, calls, extra)
        base = took if label == "bf16" else base
        want, error = reference(kind, x, matrices[0], extra, D), None
        if want is not None:
            found = way(x, *matrices[0], *extra).astype(jnp.float32)
            error = float(jnp.linalg.norm(found - want.astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32)))
        share = limit and limit / took
        row = {"matrix": name, "tokens": T, "way": label, "us": took * 1e6, "gb_s": bytes_ / took / 1e9}
        row |= {"tflop_s": flops / took / 1e12, "share": share, "of_bf16": base and base / took, "error": error}
        rows.append(row)
        figures = f"{row['us']:9.1f} us {row['gb_s']:7.0f} GB/s {row['tflop_s']:6.1f} TFLOP/s"
        rest = "".join(f"  {key} {row[key]:.3g}" for key in ("share", "of_bf16", "error") if row[key] is not None)
        print(f"{name:>22} {T:5d} {label:<18}{figures}{rest}", flush=True)
    return base


def cases(models):
    """(name, experts or None, experts of a token, inputs, outputs) of what is asked for."""
    for model in models:
        if model == "experts":
            yield from ((f"{E}x {D}x{F}", E, X, D, F) for E, X, D, F in EXPERTS)
        else:
            yield from ((f"{model} {D}x{F}", None, 1, D, F) for D, F in MODELS[model])


def main():
    parser = argparse.ArgumentParser(description="Times the matmuls of quantized weights.")
    parser.add_argument("--model", nargs="+", choices=[*MODELS, "experts"], default=[*MODELS, "experts"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", nargs="+", choices=BYTES, default=list(BYTES))
    options, rows = parser.parse_args(), []
    if reason := pk.available():
        sys.exit(f"the kernels cannot run: {reason}")
    for name, E, X, D, F in cases(options.model):
        lead, times = () if E is None else (E,), {}
        for kind in dict.fromkeys(["bf16", *options.only]):
            parameters = (E or 1) * D * F
            copies = max(2, int(2 * L2 / (parameters * BYTES[kind])) + 1)
            keys = jax.random.split(jax.random.key(0), copies)
            matrices = [jax.jit(draw, static_argnums=(0, 1, 2, 3))(kind, lead, D, F, key) for key in keys]
            for T in options.tokens:
                x = jax.random.normal(jax.random.key(T), (T * X, D), jnp.bfloat16)
                extra = ()
                if E:
                    expert = np.random.default_rng(T).integers(0, E, T * X)
                    extra = (jnp.asarray(np.bincount(expert, minlength=E), jnp.int32),)
                used = int((extra[0] > 0).sum()) if E else 1
                at = name, kind, T, x, matrices, extra, D, used * D * F, 2 * T * X * D * F
                times[T] = measure(*at, times.get(T), rows)
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))


if __name__ == "__main__":
    main()
