"""Times every kernel inside one CUDA graph, over more data than the L2 holds, and compares it with its definition.

    python scripts/bench_kernels.py [--only paged_decode] [--reference]

A line a case: microseconds a call, GB/s or TFLOP/s, the share of what the device was measured to reach, the error
against the definition (the norm of the difference over the norm), and on Hopper what the Triton kernel takes for the
same prompts.  The last line is all of it as JSON.
"""

import argparse
import functools
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
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
PAGE = 64
DECODE = {  # rows' lengths, kv heads, query heads a kv head, head dim
    "1 x 4k, 32/8x128": ([4096], 8, 4, 128),
    "1 x 32k, 32/8x128": ([32768], 8, 4, 128),
    "16 x 1k, 16/8x128": ([1024] * 16, 8, 2, 128),
    "16 x 0.5k, 9/3x64": ([500] * 16, 3, 3, 64),
    "64 x 1k, 32/8x128": ([1024] * 64, 8, 4, 128),
    "64 x 4k, 32/8x128": ([4096] * 64, 8, 4, 128),
    "63 x 0.3k + 1 x 16k, 32/8x128": ([300] * 63 + [16384], 8, 4, 128),
    "256 x 1k, 16/8x128": ([1024] * 256, 8, 2, 128),
    "16 x 2k, 32/8x80": ([2048] * 16, 8, 4, 80),
    "16 x 2k, 8/4x256": ([2048] * 16, 4, 2, 256),
}
PREFILL = {  # (cached tokens, new tokens) of the rows, kv heads, query heads a kv head, head dim
    "250 single after 0.6k and 2 x 0.2k, 16/8x128": ([(600, 1)] * 250 + [(0, 200)] * 2, 8, 2, 128),
    "2 x 2k, 16/8x128": ([(0, 2048)] * 2, 8, 2, 128),
    "1 x 2k, 32/8x128": ([(0, 2048)], 8, 4, 128),
    "1 x 16k, 32/8x128": ([(0, 16384)], 8, 4, 128),
    "4 x 2k, 16/8x128": ([(0, 2048)] * 4, 8, 2, 128),
    "0.5k after 8k, 32/8x128": ([(8192, 512)], 8, 4, 128),
    "1k and 64 single after 1k, 32/8x128": ([(0, 1024)] + [(1023, 1)] * 64, 8, 4, 128),
    "1 x 2k, 9/3x64": ([(0, 2048)], 3, 3, 64),
    "1 x 4k, 8/4x256": ([(0, 4096)], 4, 2, 256),
}
WRITE = {f"{tokens} tokens, 32/8x128": (tokens, 8, 4, 128) for tokens in (1, 16, 256, 2048)}
# Keys and values as codes: the name of a kernel and one of these.
KINDS = {"_int8": "int8", "_int4": "int4", "_fp8": "fp8"}
SMALL = {  # what the definitions are timed on: the default model on a CPU
    "paged_decode": {f"{n} x {c}, 9/3x64": ([c] * n, 3, 3, 64) for n, c in ((1, 100), (1, 1000), (1, 8000), (16, 500))},
    "paged_prefill": {f"256 after {c}, 9/3x64": ([(c, 256)], 3, 3, 64) for c in (0, 3840)},
    "kv_write": {f"{tokens} tokens, 9/3x64": (tokens, 3, 3, 64) for tokens in (1, 16, 256)},
}


def dtype():
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def batch(spans, kv_heads, head_dim, layers):
    """Pools of `layers` layers and the rows' arrays for spans of (cached, new) tokens, their pages in random order."""
    cached, new = np.array(spans, np.int32).T
    used = -(-(cached + new) // PAGE)
    pages = np.zeros((len(spans), 1 << int(used.max() - 1).bit_length()), np.int32)  # as wide as a bucket
    ids = np.random.default_rng(0).permutation(np.arange(1, used.sum() + 1))
    for row, (n, at) in enumerate(zip(used, np.cumsum(used) - used, strict=True)):
        pages[row, :n] = ids[at : at + n]
    shape = (layers, int(used.sum()) + 1, PAGE, kv_heads, head_dim)
    k, v = (jax.random.normal(jax.random.key(i), shape, dtype()) for i in range(2))
    return k, v, [jnp.asarray(x, jnp.int32) for x in (pages, np.cumsum(new) - new, new, cached)]


def split_name(name):
    """A kernel's name and the kind of its pools: paged_decode_int4 -> paged_decode, int4."""
    for suffix, kind in KINDS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    return name, None


def random_codes(pool, kind):
    """Pools of codes in place of [L, N, S, K, H]."""
    (codes, _), (parameters, _) = pk.pool_shapes(pool.shape, kind)
    pair = jnp.broadcast_to(jnp.asarray([0.02, -1.0], jnp.float16), (*parameters, 2))
    codes = jax.random.bits(jax.random.key(5), codes, jnp.uint8) & 0x77  # no fp8 that is no number
    return pk.QuantizedPool(codes, jax.lax.bitcast_convert_type(pair, jnp.int32), kind)


def token_bytes(head_dim, kind):
    """Bytes of a key, or a value, of one kv head."""
    if kind is None:
        return head_dim * dtype().itemsize
    return sum(math.prod(shape) * jnp.dtype(of).itemsize for shape, of in pk.pool_shapes((1, 1, 1, 1, head_dim), kind))


class Work(NamedTuple):
    """Calls of a kernel, each of which needs the one before it."""

    chain: Callable  # (layers, *arrays)
    arrays: Callable  # () -> what the calls take; the first two are donated where that is said
    layers: int  # calls in a chain
    amount: float  # bytes or FLOPs of a call
    donate: tuple[int, ...] = ()

    def lower(self, layers=None):
        """`layers` calls as one program, lowered; its compile() may run in another thread."""
        run = jax.jit(functools.partial(self.chain, layers or self.layers), donate_argnums=self.donate)
        return run.lower(*jax.eval_shape(self.arrays))


def attention(name, suffix, spans, kv_heads, group, head_dim):
    """Chained calls over the layers."""
    name, kind = split_name(name)
    tokens = sum(new for _, new in spans)
    decode = name == "paged_decode"
    cached = 2 * sum(old + new for old, new in spans) * kv_heads * token_bytes(head_dim, kind)
    layers = max(8, min(64 if kind else 32, math.ceil(4 * L2 / cached))) if decode else 8
    attend = getattr(pk, name + suffix)

    def arrays():
        k, v, (pages, first, count, start) = batch(spans, kv_heads, head_dim, layers)
        q = jax.random.normal(jax.random.key(2), (tokens, kv_heads, group, head_dim), k.dtype)
        if kind:
            k, v = random_codes(k, kind), random_codes(v, kind)
        return q, k, v, *((pages, start + count) if decode else (pages, first, count, start))

    def chain(layers, q, k, v, *rows):
        for layer in range(layers):
            q = attend(q, k, v, layer, *rows, scale=head_dim**-0.5)
        return q

    flops = sum(4 * head_dim * kv_heads * group * new * (old + (new + 1) / 2) for old, new in spans)
    return Work(chain, arrays, layers, cached if decode else flops)


def writing(name, suffix, tokens, kv_heads, group, head_dim):
    """Chained writes over the layers of donated pools."""
    name, kind = split_name(name)
    layers = 16
    write = getattr(pk, name + suffix)
    fused = name == "rope_kv_write"

    def arrays():
        k, v, _ = batch([(0, max(tokens, 1024))], kv_heads, head_dim, layers)
        slot = PAGE + np.random.default_rng(0).permutation(k.shape[1] * PAGE - PAGE)[:tokens]
        qkv = jax.random.normal(jax.random.key(2), (tokens, kv_heads, group + 2, head_dim), k.dtype)
        if kind:
            k, v = random_codes(k, kind), random_codes(v, kind)
        angle = jax.random.uniform(jax.random.key(3), (tokens, head_dim // 2))
        return k, v, qkv, jnp.cos(angle), jnp.sin(angle), jnp.asarray(slot, jnp.int32)

    def chain(layers, k, v, qkv, cos, sin, slot):
        q = ()
        for layer in range(layers):
            if fused:
                q, k, v = write(k, v, qkv, cos, sin, layer, slot)
            else:
                k, v = write(k, v, qkv[:, :, 0], qkv[:, :, 1], layer, slot)
        return k, v, q

    moved = 2 * tokens * kv_heads * head_dim * dtype().itemsize * (2 if not fused else group + 2)
    if kind:
        moved += 2 * tokens * kv_heads * (token_bytes(head_dim, kind) - token_bytes(head_dim, None))
    return Work(chain, arrays, layers, moved, donate=(0, 1))


def work(name, case, suffix=""):
    """The calls of one case."""
    return (writing if "write" in name else attention)(name, suffix, *case)


def seconds(compiled, made, budget=0.05):
    """Median time of a call within the program of `made.layers` calls; five measurements of `budget` seconds."""
    args = made.arrays()
    state = args[:2] if made.donate else ()

    def times(n):
        nonlocal state
        out = ()
        begin = time.perf_counter()
        for _ in range(n):
            out = compiled(*state, *args[len(state) :])
            state = out[:2] if made.donate else ()
        jax.block_until_ready(out)
        return time.perf_counter() - begin

    times(3)
    n = max(2, min(100, int(budget / max(times(1), 1e-6))))
    return statistics.median(times(n) for _ in range(5)) / n / made.layers


def error(kernel, reference, arrays):
    """The first layer of the kernel against the definition's, both compiled."""
    got, expected = (
        [x.astype(jnp.float32) for x in jax.tree.leaves(compiled(*arrays()))] for compiled in (kernel, reference)
    )
    off, size = (
        math.sqrt(sum(float(jnp.sum(x * x)) for x in xs))
        for xs in ([a - b for a, b in zip(got, expected, strict=True)], expected)
    )
    return off / size


def without_hopper(function, *args):
    """function(*args), in which prompts go through the Triton kernel."""
    module = importlib.import_module("pallas_kernels.paged_prefill")
    kept, module.hopper = module.hopper, lambda *_: False
    try:
        return function(*args)
    finally:
        module.hopper = kept


def programs(name, case, reference):
    """{what: lowered} of one case."""
    if reference:
        return {"time": work(name, case, "_reference").lower()}
    made = work(name, case)
    found = {"time": made.lower(), "one": made.lower(1), "reference": work(name, case, "_reference").lower(1)}
    if name == "paged_prefill" and pk.triton_call.device()[1] == 90:
        found["triton"] = without_hopper(made.lower)
    return found


def measure(name, case, compiled):
    """Microseconds, rate in GB/s or TFLOP/s, share of the limit (None: unknown device), and error."""
    made = work(name, case)
    took = seconds(compiled["time"], made)
    compute = name.startswith("paged_prefill")
    limit = LIMITS.get(jax.devices()[0].device_kind, (None, None))[compute]
    row = {
        "us": took * 1e6,
        "TFLOP/s" if compute else "GB/s": made.amount / took / (1e12 if compute else 1e9),
        "share": made.amount / took / limit if limit else None,
    }
    if "one" in compiled:
        row["error"] = error(compiled["one"], compiled["reference"], made.arrays)
    if "triton" in compiled:
        row["triton_us"] = seconds(compiled["triton"], made) * 1e6
    return row


def cases(reference):
    if reference:
        return SMALL
    found = {"paged_decode": DECODE, "paged_prefill": PREFILL, "kv_write": WRITE, "rope_kv_write": WRITE}
    for suffix in KINDS:
        found |= {name + suffix: found[name] for name in ("paged_decode", "paged_prefill", "rope_kv_write")}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="one kernel, by name")
    parser.add_argument("--reference", action="store_true", help="time the definitions at the default model's shape")
    options = parser.parse_args()
    if options.only not in (None, *cases(options.reference)):
        parser.error(f"--only is one of {', '.join(cases(options.reference))}, not {options.only}")
    if not options.reference and (reason := pk.available()):
        parser.exit(2, f"the kernels cannot run: {reason}; --reference times their definitions\n")
    chosen = []
    for name, shapes in cases(options.reference).items():
        for label, case in shapes.items() if options.only in (None, name) else ():
            if name.startswith("paged_decode"):
                case = ([(length - 1, 1) for length in case[0]], *case[1:])
            chosen.append((name, label, case))
    # All are compiled before the first is timed: compiling takes cores, and throws the process's CUDA graphs away.
    with ThreadPoolExecutor(1 if options.reference else 8) as pool:
        jobs = [
            {what: pool.submit(lowered.compile) for what, lowered in programs(name, case, options.reference).items()}
            for name, _, case in chosen
        ]
        jobs = [{what: job.result() for what, job in job_of.items()} for job_of in jobs]
    rows = []
    for (name, label, case), compiled in zip(chosen, jobs, strict=True):
        row = measure(name, case, compiled)
        text = "  ".join(f"{k} {v:8.3g}" for k, v in row.items() if v is not None)
        print(f"{name:15} {label:46} {text}", flush=True)
        rows.append({"kernel": name, "case": label, **row})
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "cases": rows}))


if __name__ == "__main__":
    main()
