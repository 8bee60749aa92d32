"""The memory plan: what weights, KV cache and workspace take on each device, decided and printed before loading."""

import math
import os
import subprocess
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import psutil

from jaxserve.cache import PagedKV

GIB = 1 << 30
CPU_CACHE = 2 * GIB  # most that the cache takes on the CPU unless asked for
DEFAULT_SHARE = 0.8  # of what the weights leave free on a GPU, as in LMDeploy
SHORTEST = 256  # tokens; a session that doesn't fit even this is refused


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
            ("  KV cache", self.cache, f"{self.tokens:,} tokens in pages of {self.page_size}: "
             f"{max(self.tokens // self.session_len, 1)} requests of {self.session_len:,} tokens"),
            ("  workspace", self.workspace, f"estimate: steps of {self.budget:,} tokens and {self.lanes} requests"),
            ("  stays free", rest, ""),
        ]  # fmt: skip
        lines = [f"{name:<36}{size / GIB:9.2f} GiB  {what}".rstrip() for name, size, what in rows]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def free_bytes(devices):
    """Bytes that may still be allocated on the fullest of `devices`; on the CPU, the host memory that is available."""
    if devices[0].platform == "cpu":
        return psutil.virtual_memory().available // len(devices)
    return min(_free_on_gpu(device) for device in devices)


def _free_on_gpu(device):
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
        return own
    return min(own, free) if own else free


def workspace_bytes(cfg, tp, dtype, tokens, rows):
    """An estimate of the scratch memory of the largest programs."""
    size = max(jnp.dtype(dtype).itemsize, 2)
    heads = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim
    wide = max(cfg.ffn, cfg.expert_ffn * max(cfg.experts_per_token, 1))
    a_token = (6 * cfg.width + 4 * wide + 3 * heads) * size
    logits = rows * cfg.vocab * 4 * 6
    return int(tokens * a_token / tp + logits / tp) + 256 * 2**20


def make_plan(cfg, config, devices, weights, dtype):
    """A MemoryPlan.

    cfg: the (padded) model; config: EngineConfig; weights: bytes on a device.  ValueError when the model cannot fit,
    with what would help.
    """
    tp, cpu = len(devices), devices[0].platform == "cpu"
    free, kind, notes = free_bytes(devices), devices[0].device_kind, []
    left = free - weights
    if left < workspace_bytes(cfg, tp, dtype, 64, 1):
        raise ValueError(
            f"the model does not fit: its weights take {weights / GIB:.2f} GiB of the {free / GIB:.2f} GiB that are "
            f"free on {kind}. {_remedies(tp, cpu, dtype)}"
        )
    lanes, budget = config.max_batch_size or (16 if cpu else 256), config.num_tokens_per_iter or (256 if cpu else 4096)
    while workspace_bytes(cfg, tp, dtype, budget, lanes) > left // 3 and not (
        config.max_batch_size and config.num_tokens_per_iter
    ):
        if budget > 256 and not config.num_tokens_per_iter:
            budget //= 2
        elif lanes > 1 and not config.max_batch_size:
            lanes //= 2
        else:
            break
        notes = [f"steps cut to {budget:,} tokens and {lanes} requests so that their workspace fits"]
    workspace = workspace_bytes(cfg, tp, dtype, budget, lanes)

    page_size = config.cache_block_seq_len
    page = page_size * PagedKV.bytes_per_token(cfg, dtype) // tp
    pages = _pages(config, cpu, free, left, workspace, page, notes)
    tokens = (pages - 1) * page_size
    session_len = config.session_len or cfg.max_position
    if session_len > tokens:
        if config.session_len or tokens < min(SHORTEST, session_len):
            raise ValueError(
                f"a request of {min(session_len, max(SHORTEST, config.session_len or 0)):,} tokens does not fit: the "
                f"KV cache has room for {max(tokens, 0):,}. Lower session_len, raise cache_max_entry_count, or: "
                f"{_remedies(tp, cpu, dtype)}"
            )
        session_len = tokens
        notes.append(f"session_len cut from {cfg.max_position:,} to {session_len:,} tokens, which is what fits")
    if lanes > pages - 1:
        lanes = pages - 1
        notes.append(f"batch cut to {lanes} requests: each needs a page")
    return MemoryPlan(
        kind,
        tp,
        free,
        weights,
        pages * page,
        workspace,
        page_size,
        pages,
        session_len,
        lanes,
        max(budget, lanes),
        tuple(notes),
    )


def _pages(config, cpu, free, left, workspace, page, notes):
    """How many pages the cache gets."""
    count, room = config.cache_max_entry_count, max(left - workspace, 0)
    if isinstance(count, int):
        if count * page > room:
            raise ValueError(
                f"cache_max_entry_count={count} pages take {count * page / GIB:.2f} GiB; {room / GIB:.2f} GiB are free "
                f"for them"
            )
        return count + 1
    wanted = min(CPU_CACHE, free // 4) if cpu and count is None else left * (count or DEFAULT_SHARE)
    if wanted > room:
        notes.append(f"KV cache cut from {wanted / GIB:.2f} to {room / GIB:.2f} GiB to leave room for the workspace")
    return max(math.floor(min(wanted, room) / page), 1)


def _remedies(tp, cpu, dtype):
    ways = []
    if not cpu and len(jax.devices()) > tp:
        ways.append(f"split it over more GPUs (tp={tp * 2})")
    if jnp.dtype(dtype).itemsize > 2:
        ways.append("use dtype=bfloat16")
    ways += ["free memory that other programs hold", "take a smaller model"]
    return "What would help: " + "; ".join(ways) + "."
