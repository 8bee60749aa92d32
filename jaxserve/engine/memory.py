"""The memory plan: what weights, KV cache and workspace take on each device, decided and printed before loading."""

import math
import os
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import psutil

from jaxserve import ops
from jaxserve.cache import KINDS, PagedKV
from jaxserve.engine.runner import BLOCK
from jaxserve.sampling import Tables

GIB = 1 << 30
CPU_CACHE = 2 * GIB  # most that the cache takes on the CPU unless asked for
DEFAULT_SHARE = 0.8  # of what the weights leave free on a GPU, as in LMDeploy
SHORTEST = 256  # tokens; a session that doesn't fit even this is refused
GPU_RUNTIME = 256 << 20  # CUDA graphs, matmul libraries and fragments between arrays
CPU_RUNTIME = 64 << 20
CGROUP = Path("/sys/fs/cgroup")  # of this container, where it is in one


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device, and what they are good for."""

    device: str
    devices: int
    free: int
    weights: int
    cache: int
    workspace: int
    page_size: int
    pages: int  # page 0 included, which holds no tokens
    session_len: int
    lanes: int  # requests that run at once
    budget: int  # tokens of a step
    notes: tuple[str, ...] = ()
    kv: str | None = None  # how keys and values are kept, see cache.KINDS
    beside: int = 0  # bytes that JAX will not take, where there are several GPUs

    @property
    def tokens(self):
        """Tokens that the cache holds."""
        return (self.pages - 1) * self.page_size

    def __str__(self):
        rest = self.free - self.weights - self.cache - self.workspace
        each = " each" if self.devices > 1 else ""
        rows = [
            (f"memory of {self.devices} x {self.device}{each}", self.free, "free before loading"),
            ("  weights", self.weights, ""),
            ("  KV cache" + (f", {self.kv}" if self.kv else ""), self.cache,
             f"{self.tokens:,} tokens, {_requests(max(self.tokens // self.session_len, 1))} of {self.session_len:,}"),
            ("  workspace", self.workspace, f"for steps of {self.budget:,} tokens, {_requests(self.lanes)}"),
            ("  stays free", rest, ""),
            *[("  not JAX's", self.beside, "for CUDA, its graphs and NCCL")] * (self.beside > 0),
        ]  # fmt: skip
        wide = max(len(name) for name, *_ in rows)
        lines = [f"{name:<{wide}}{size / GIB:8.2f} GiB  {what}".rstrip() for name, size, what in rows]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def free_bytes(devices):
    """Bytes that may still be allocated on the fullest of `devices`; on the CPU, the host memory that is available."""
    if devices[0].platform == "cpu":
        return _free_on_host() // len(devices)
    return min(min(own, free) if own else free for own, free in map(_free_on_gpu, devices))


def _free_on_host():
    """Bytes of host memory that are available, in a container no more than its limit leaves (cgroup v2)."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        files = int(stat["active_file"]) + int(stat["inactive_file"])  # read before, and let go when there is need
    except (OSError, ValueError, KeyError):  # "max": no limit
        return free
    return max(min(free, limit - used + files), 0)


def beside_bytes(devices):
    """Bytes on the fullest of several GPUs that are beyond JAX's limit; 0 where there is one device, or no GPU."""
    if devices[0].platform == "cpu" or len(devices) == 1:
        return 0
    return max(min(free - own for own, free in map(_free_on_gpu, devices)), 0)


def _free_on_gpu(device):
    """(bytes that JAX may still allocate, 0 if it does not say; bytes that are free for it or anybody)."""
    stats = device.memory_stats() or {}
    own = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    held = max(stats.get("pool_bytes", 0) - stats.get("bytes_in_use", 0), 0)  # taken from the driver, free for JAX
    visible = [entry for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    number = device.local_hardware_id
    query = [
        "nvidia-smi",
        "--query-gpu=memory.free",
        "--format=csv,noheader,nounits",
        f"--id={visible[number].strip() if number < len(visible) else number}",
    ]
    try:  # other processes' memory is not in JAX's figures
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        free = (int(found.split()[0]) << 20) + held
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return own, own
    return own, free


def workspace_bytes(cfg, devices, dtype, tokens, rows, values=0):
    """An upper bound of what steps of `tokens` tokens and `rows` requests take on a device besides weights and cache.

    Scratch memory of the largest program, as XLA compiles it; the sampler's tables; what the runtime itself takes.
    values: bytes of the values of one quantized map, where they are written out for a product.
    """
    tp, cpu = len(devices), devices[0].platform == "cpu"
    size, logits = jnp.dtype(dtype).itemsize, cfg.vocab * 4
    heads = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    wide = max(cfg.ffn, cfg.expert_ffn * cfg.experts_per_token, heads)
    forward = tokens * size * (3 * wide // tp + 4 * cfg.width)
    forward += values + tokens * size * cfg.experts_per_token * 2 * cfg.width
    if not ops.kernels():  # XLA writes the rows of a ragged product once for each expert
        forward += tokens * size * cfg.experts_per_token * cfg.experts * max(cfg.width, cfg.expert_ffn // tp)
    if cpu:  # where steps of different layers do not share scratch memory, and ragged products copy their weights
        forward += cfg.layers * tokens * size * cfg.width * 4 // 3
        forward += cfg.layers * cfg.experts * 3 * cfg.width * cfg.expert_ffn * size // tp
        scratch = forward + 7 * rows * logits
    else:
        scratch = max(forward, rows * logits * 7 // 2)
    tables = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(Tables.shape(rows, cfg.vocab)))
    return scratch + BLOCK * logits + tables + (CPU_RUNTIME if cpu else GPU_RUNTIME)


def make_plan(cfg, config, devices, weights, dtype, values=0):
    """A MemoryPlan.

    cfg: the (padded) model; config: EngineConfig; weights: bytes on a device; values: as in `workspace_bytes`.
    ValueError when the model cannot fit, with what would help.
    """
    tp, cpu = len(devices), devices[0].platform == "cpu"
    free = free_bytes(devices)
    notes: list[str] = []
    left = free - weights
    needs = partial(workspace_bytes, cfg, devices, dtype, values=values)
    lanes, budget, workspace = _steps(config, cpu, left, needs, notes)
    page_size = config.cache_block_seq_len
    kind = KINDS[config.quant_policy]
    if reason := ops.kv_refuses(kind):
        raise ValueError(f"quant_policy={config.quant_policy} cannot be used here: {reason}; 8 (int8) needs no more")
    page = page_size * PagedKV.bytes_per_token(cfg, dtype, kind) // tp
    if left - workspace < 2 * page:
        raise ValueError(
            f"the model does not fit: {weights / GIB:.2f} GiB of weights, {workspace / GIB:.2f} GiB of workspace "
            f"(steps of {budget:,} tokens and {_requests(lanes)}) and a KV cache need more than the "
            f"{free / GIB:.2f} GiB that are free on {devices[0].device_kind}. {_remedies(config, devices, dtype)}"
        )
    pages = _pages(config, cpu, free, left, workspace, page, notes)
    tokens = (pages - 1) * page_size
    session_len = config.session_len or cfg.max_position
    least = config.session_len or min(SHORTEST, session_len)
    if tokens < least:
        raise ValueError(
            f"a request of {least:,} tokens does not fit: the KV cache has {pages * page / GIB:.2f} GiB, room for "
            f"{tokens:,}. {_remedies(config, devices, dtype, 'raise cache_max_entry_count')}"
        )
    if session_len > tokens:
        session_len = tokens
        notes.append(f"session_len cut from {cfg.max_position:,} to {session_len:,} tokens, which is what fits")
    if lanes > pages - 1:
        lanes = pages - 1
        notes.append(f"batch cut to {_requests(lanes)}: each needs a page")
    return MemoryPlan(
        device=devices[0].device_kind,
        devices=tp,
        free=free,
        weights=weights,
        cache=pages * page,
        workspace=workspace,
        page_size=page_size,
        pages=pages,
        session_len=session_len,
        lanes=lanes,
        budget=budget,
        notes=tuple(notes),
        kv=kind,
        beside=beside_bytes(devices),
    )


def _steps(config, cpu, left, needs, notes):
    """Requests and tokens of a step, and its workspace: as asked for; or the defaults, or less where they take much."""
    lanes, budget = config.max_batch_size or (16 if cpu else 256), config.num_tokens_per_iter or (256 if cpu else 4096)
    if config.num_tokens_per_iter and lanes > budget:
        lanes = budget
        if config.max_batch_size:
            notes.append(f"batch cut to {_requests(lanes)}: a step of {budget} tokens has no more")
    budget = max(budget, lanes)
    before = lanes, budget
    while needs(budget, lanes) > left // 3:
        if not config.num_tokens_per_iter and budget > max(256, lanes):
            budget = max(budget // 2, 256, lanes)
        elif not config.max_batch_size and lanes > 1:
            lanes //= 2
        elif not config.num_tokens_per_iter and budget > max(64, lanes):
            budget = max(budget // 2, 64, lanes)
        else:
            break
    if (lanes, budget) != before:
        notes.append(f"steps cut to {budget:,} tokens and {_requests(lanes)} to leave memory for the KV cache")
    return lanes, budget, needs(budget, lanes)


def _pages(config, cpu, free, left, workspace, page, notes):
    """How many pages the cache gets."""
    count, room = config.cache_max_entry_count, left - workspace
    if isinstance(count, int):
        if (count + 1) * page > room:
            raise ValueError(
                f"cache_max_entry_count={count} pages take {(count + 1) * page / GIB:.2f} GiB, and there is room for "
                f"{room / GIB:.2f} GiB, which is {room // page - 1} pages"
            )
        return count + 1
    wanted = min(CPU_CACHE, free // 4) if cpu and count is None else left * (count or DEFAULT_SHARE)
    if wanted > room:
        notes.append(f"KV cache cut from {wanted / GIB:.2f} to {room / GIB:.2f} GiB to leave room for the workspace")
    size = min(wanted, room)
    pages = max(int(size // page), 1)
    if cpu and size != CPU_CACHE:  # a host's free memory is another at each start, and programs are kept for a number
        pages -= pages % (1 << max(pages.bit_length() - 4, 0))
    return pages


def _remedies(config, devices, dtype, *first):
    """What would make more room, of what this machine and configuration have; `first` go ahead."""
    tp, cpu, ways = len(devices), devices[0].platform == "cpu", list(first)
    if config.session_len:
        ways.append("lower session_len")
    if config.max_batch_size or config.num_tokens_per_iter:
        ways.append("lower max_batch_size or num_tokens_per_iter")
    if not cpu and (more := len(jax.devices())) > tp:
        ways.append(f"split the model over more GPUs (tp={min(2 * tp, more)})")
    if jnp.dtype(dtype).itemsize > 2:
        ways.append("use dtype=bfloat16" + (", which is slower on most CPUs" if cpu else ""))
    ways += ["free memory that other programs hold", "take a smaller model"]
    return "What would help: " + "; ".join(ways) + "."


def _requests(number):
    return f"{number:,} request{'s' * (number != 1)}"
