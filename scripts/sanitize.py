"""Runs every kernel once a dtype under compute-sanitizer, which sees reads and writes beside an allocation.

    python scripts/sanitize.py [--tool /usr/local/cuda/bin/compute-sanitizer]

Exit status 0: nothing found; 1: findings, which are printed; 2: the tool does not work here, so nothing is known (it
needs the device's debugging interface, which some containers do not pass on).  Two minutes.

So that a wrong address is not within somebody else's array, every array is an allocation of its own, and kernels are
launched one by one, outside of CUDA graphs.  Of JAX's allocators only cuda_async asks CUDA for so many bytes and no
more: "platform" is a pool, and "address" rounds up to 2 MiB.  Two controls write beside an array on purpose: `near`
right behind its last byte, `far` gigabytes away.  Where no allocator lets the tool see the first, the second says that
the tool works, and writes close by are not known; where neither is seen, the run says nothing and ends with 2.

The caller's settings of JAX and XLA do not matter.  What is no finding: errors that CUDA's functions return (XLA asks
for features that a driver may lack, hence --report-api-errors no), and TMA reads beyond an array's end, which are
defined to be zero and which the tool does not report.  Findings in kernels that are not of pallas_kernels (XLA's own)
are printed and do not count.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TOOLS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
DTYPES = ("bfloat16", "float16", "float32")
CODES = tuple((f"{kind}-{dtype}", kind, dtype) for kind in ("int8", "int4", "fp8") for dtype in DTYPES[:2])
CONTROLS, GROUPS = ("near", "far"), ("hopper", "triton", "int4", "others", *(name for name, *_ in CODES))
ALLOCATORS = ("cuda_async", "address")  # of JAX, the one that shows most first
SETTINGS = ("XLA_", "JAX_", "TF_GPU_", "TRITON_", "CUDA_LAUNCH", "CUDA_MODULE")  # of the caller, which do not matter
OURS = ("_attend", "attend_", "_cut", "_tiles", "_order", "_write", "_rope_write", "_skinny", "_few", "_grouped",
        "_spread", "_descend", "_wait", "_fetch", "_tell", "_plan", "mosaic", "prefill")  # fmt: skip
LIMIT, PATIENCE = 115, 50  # seconds of it all, and of a group, which is then tried once more
LENGTHS, NEW = [5, 700, 0, 128, 1, 300, 65], [5, 200, 0, 1, 1, 1, 65]


def launch(group):
    """Runs a group's kernels, here; the tool looks on."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    sys.path.insert(0, str(PROJECT))
    import pallas_kernels as pk
    from tests.kernels.cases import Case, quantized

    def attention(dtype, window=None):
        case = Case(LENGTHS, NEW, padding=20, kv_heads=2, group=3, head_dim=128, page_size=64, dtype=jnp.dtype(dtype))
        q, k, v = map(jnp.asarray, (case.q, case.k, case.v))
        prefill = jax.jit(lambda *x: pk.paged_prefill(*x[:3], 1, *x[3:], scale=0.1, window=window))
        out = [prefill(q, k, v, *case.rows())]
        if group == "triton":
            decode = jax.jit(lambda *x: pk.paged_decode(*x[:3], 1, *x[3:], scale=0.1, window=window))
            out.append(decode(q[: len(LENGTHS)], k, v, *map(jnp.asarray, (case.pages, case.length))))
        return out

    def codes(dtype, kind, window=None):
        case = Case(LENGTHS, NEW, padding=20, kv_heads=2, group=3, head_dim=80, page_size=64, dtype=jnp.dtype(dtype))
        q, pools = jnp.asarray(case.q), quantized(case, kind)
        prefill = jax.jit(lambda *x: pk.paged_prefill(*x[:3], 1, *x[3:], scale=0.1, window=window))
        decode = jax.jit(lambda *x: pk.paged_decode(*x[:3], 1, *x[3:], scale=0.1, window=window))
        qkv, angle = jnp.ones((37, 2, 5, 80), dtype), jnp.ones((37, 40))
        slot = jnp.arange(64, 101, dtype=jnp.int32)
        both = jax.jit(lambda k, v, qkv, cos, sin, slot: pk.rope_kv_write(k, v, qkv, cos, sin, 1, slot))
        out = [prefill(q, *pools, *case.rows()), both(*pools, qkv, angle, angle, slot)]
        return [*out, decode(q[: len(LENGTHS)], *pools, *map(jnp.asarray, (case.pages, case.length)))]

    def beside(first):
        """Writes 3 slots of 68 bytes, beginning at one behind the last; nobody rounds 3264 bytes up to 3468."""
        pools = [jnp.zeros((1, 3, 16, 1, 17)) for _ in range(2)]
        slot = jnp.arange(3, dtype=jnp.int32) + first
        return jax.jit(lambda k, v, x, slot: pk.kv_write(k, v, x, x, 0, slot))(*pools, jnp.ones((3, 1, 17)), slot)

    def writes(dtype):
        pools = [jnp.zeros((2, 5, 16, 3, 64), dtype) for _ in range(2)]
        qkv, angle = jnp.ones((37, 3, 5, 64), dtype), jnp.ones((37, 32))
        slot = jnp.arange(16, 53, dtype=jnp.int32)
        write = jax.jit(lambda k, v, qkv, slot: pk.kv_write(k, v, qkv[:, :, 0], qkv[:, :, 1], 1, slot))
        both = jax.jit(lambda k, v, qkv, cos, sin, slot: pk.rope_kv_write(k, v, qkv, cos, sin, 1, slot))
        return write(*pools, qkv, slot), both(*pools, qkv, angle, angle, slot)

    def int4(dtype):
        from pallas_kernels.hopper_int4 import int4_wgmma
        from pallas_kernels.int4_few import int4_few
        from pallas_kernels.int4_mma import int4_by_values

        ways = [(1, int4_few), (33, int4_few), (100, int4_by_values)]
        gated = functools.partial(int4_wgmma, gated=True)
        hopper = [(9, int4_wgmma), (300, int4_wgmma), (16, gated), (300, gated)]
        ways += hopper if pk.triton_call.device()[1] == 90 else []
        scale, zero = jnp.ones((3, 384), jnp.float16), jnp.ones((3, 384), jnp.uint8)
        tiles = jnp.ones((384 // 16, 3, 128), jnp.int32)
        out = [way(jnp.ones((T, 192), dtype), tiles, scale, zero, group=64) for T, way in ways]
        experts = [a.reshape(a.shape[0], 3, 128) for a in (scale, zero)]
        for rows in (3, 200):  # few and many tokens an expert
            sizes = jnp.array([rows, 0, 3], jnp.int32)
            x = jnp.ones((rows + 3, 192), dtype)
            product = jax.jit(lambda *a: pk.int4_grouped(*a, group=64))
            out.append(product(x, tiles.reshape(3, 8, 3, 128), *experts, sizes))
            out.append(pk.grouped_matmul(x, jnp.ones((3, 192, 128), dtype), sizes))
        return out

    def few(dtype):
        from pallas_kernels.skinny_matmul import skinny_matmul

        x, weight, both = (jnp.ones(shape, dtype) for shape in ((5, 192), (192, 320), (192, 2, 320)))
        norm, residual = jnp.ones(192, dtype), jnp.ones((5, 320), dtype)
        out = [skinny_matmul(x[:T], weight, norm=norm, eps=1e-3, residual=residual[:T]) for T in (1, 3)]
        return [*out, *(skinny_matmul(x[:T], both, norm=norm, eps=1e-3, gated=True) for T in (1, 5))]

    def rounded():
        from pallas_kernels import rounding

        rows, square, ends = jnp.ones((32, 75)), jnp.eye(32), jnp.ones((4, 2))
        scale, zero = rounding.cut(rows, rows[:, 0], ends, symmetric=False, most=15)
        q, _ = rounding.spread(rows, square, scale, zero, most=15)
        return rounding.descend(q, rows, square, scale, zero, most=15)

    def waited():
        from jaxserve.engine.gate import Gate
        from pallas_kernels.await_masks import await_masks, tell

        gate = Gate(jax.devices()[0], jax.device_put, 5, 1001)
        gate.bound[:], gate.masks[:] = 1, 7
        number, ticket = gate.next()
        gate.open(number)
        tokens = jnp.arange(5, dtype=jnp.int32)
        return jax.jit(lambda ticket: (await_masks(ticket, tokens, rows=5, words=1001), tell(ticket, tokens)))(ticket)

    def told(dtype, what):
        print(f"launched: {dtype}, {what}: {', '.join(sorted(names))}", flush=True)
        names.clear()

    names = _note_names(pk.triton_call)
    if group in CONTROLS:
        print("launched: a write beside an array", flush=True)  # JAX may end with it
        jax.block_until_ready(beside(48 if group == "near" else 1 << 30))
    for dtype in DTYPES if group == "triton" else ():
        jax.block_until_ready((attention(dtype, window=90), writes(dtype)))
        told(dtype, "all kernels but Hopper's")
    for name, kind, dtype in CODES:
        if group == name and (kind != "fp8" or pk.triton_call.device()[1] >= 89):
            jax.block_until_ready(codes(dtype, kind, window=90 if kind == "fp8" else None))
            told(dtype, f"kernels for {kind} keys and values")
    for dtype in DTYPES[:2] if group == "int4" else ():
        jax.block_until_ready(int4(dtype))
        told(dtype, "kernels for int4 weights")
    for dtype in DTYPES[:2] if group == "others" else ():
        jax.block_until_ready((few(dtype), rounded(), waited()))
        told(dtype, "kernels for few rows, for rounding, and for masks")
    for dtype in DTYPES[:2] if group == "hopper" else ():
        pk.tuning.lookup("hopper_prefill", dtype, 128)["tokens"] = 0  # for the smallest steps, too
        gated = jax.jit(pk.gated_matmul)(jnp.ones((300, 256), dtype), jnp.ones((256, 2, 384), dtype) / 16)
        for out in jax.block_until_ready((*attention(dtype), gated)):
            assert np.isfinite(np.asarray(out, np.float32)).all()
        told(dtype, "Hopper's kernels, and")


def _note_names(module):
    """A set that gets the names of the Triton kernels that are traced from now on."""
    names = set()

    def noting(launch):
        def note(kernel, *arguments):
            names.add(kernel.__name__)
            return launch(kernel, *arguments)

        return note

    module._launch_03, module._launch_04 = map(noting, (module._launch_03, module._launch_04))
    return names


def findings(log):
    """The tool's reports, each as a list of lines."""
    out, open_ = [], False
    for line in log.splitlines():
        text = line.removeprefix("=========").strip()
        if text.startswith(("Invalid ", "Misaligned ", "Out-of-range ", "Uninitialized ")):
            out.append([])
            open_ = True
        elif not text:
            open_ = False
        if open_:
            out[-1].append(text)
    return out


def run(tool, group, allocator, folder, until):
    """(findings in our kernels, others, what kept the group from being checked or None)."""
    log, began = Path(folder) / f"{group}-{allocator}.log", time.monotonic()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)} | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": allocator,
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
        "JAX_PLATFORMS": "cuda",
    }
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--track-stream-ordered-races", "no"]
    command += ["--log-file", str(log), sys.executable, __file__, "--launch", group]
    for patience in (PATIENCE, LIMIT):  # of many that begin at once one may hang under the tool, each time another
        begins = time.monotonic()
        limit = max(1, min(patience, until - begins))
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
            break
        except subprocess.TimeoutExpired as late:
            problem = f"it took more than {limit:.0f} s, after: {(late.stdout or b'nothing').decode().strip()}"
            print(f"--- {group}, allocator {allocator}: {problem}", flush=True)
    else:
        return [], [], problem
    text = log.read_text() if log.exists() else ""
    found = findings(text)
    ours = [report for report in found if any(name in line for line in report[1:4] for name in OURS)]
    others = [report for report in found if report not in ours]
    took = f"{time.monotonic() - began:.0f} s, exit status {done.returncode}, {len(ours)} findings"
    print(f"--- {group}, allocator {allocator}: {took}\n{done.stdout.strip()}", flush=True)
    last = "\n".join((text.strip().splitlines() + done.stderr.strip().splitlines())[-8:])
    unknown = done.returncode or "ERROR SUMMARY" not in text or group in CONTROLS
    return ours, others, last if unknown and not found else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", help="path of compute-sanitizer")
    parser.add_argument("--launch", choices=CONTROLS + GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch:
        return launch(options.launch)
    places = [options.tool] if options.tool else ["compute-sanitizer", *TOOLS]
    tool = next(filter(None, map(shutil.which, places)), None)
    if not tool:
        missing = "compute-sanitizer is not here; it comes with CUDA's toolkit"
        print(f"{options.tool} is no program" if options.tool else missing, file=sys.stderr)
        return 2
    until = time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(16) as pool:

        def begin(groups, allocator):
            return {group: pool.submit(run, tool, group, allocator, folder, until) for group in groups}

        controls = {allocator: begin(CONTROLS, allocator) for allocator in ALLOCATORS}
        running = begin(GROUPS, ALLOCATORS[0])
        seen = [(control, a) for control in CONTROLS for a in ALLOCATORS if controls[a][control].result()[0]]
        if seen and seen[0][1] != ALLOCATORS[0]:  # it shows more: once more with that
            for future in running.values():
                future.result()
            running = begin(GROUPS, seen[0][1])
        results = {group: future.result() for group, future in running.items()}
    status = 0
    if not seen:
        problem = controls[ALLOCATORS[0]]["far"].result()[2]
        print(f"NOT CHECKED: the tool did not see a write beside an array\n{problem or ''}")
        status = 2
    elif seen[0][0] == "far":
        print("note: a write right behind an array is not seen here, only one that is far away")
    for group, (ours, others, problem) in results.items():
        if problem:
            print(f"NOT CHECKED: {group}\n{problem}")
            status = 2
        for what, reports in (("not ours", others), ("FOUND", ours)):
            places = Counter(tuple(report[:2]) for report in reports)  # what and where; each thread has a report
            for place, number in places.most_common(6):
                example = next(report for report in reports if tuple(report[:2]) == place)
                print(f"{what} ({group}), {number} times:", *example[:5], sep="\n  ")
    if any(ours for ours, _, _ in results.values()):
        status = 1
    print("status", status, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
