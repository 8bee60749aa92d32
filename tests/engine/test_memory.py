"""The memory plan on a CPU and on GPUs that are not there."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import psutil
import pytest

from jaxserve import mesh as meshes
from jaxserve import weights
from jaxserve.config import EngineConfig
from jaxserve.engine import loading, memory
from jaxserve.engine.memory import GIB, make_plan, workspace_bytes
from jaxserve.models.config import from_hf
from scripts import tiny_checkpoint
from tests.engine import build

SMALL = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
MEDIUM = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8,
          "head_dim": 128, "intermediate_size": 8192, "vocab_size": 92544}  # fmt: skip
LARGE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "intermediate_size": 14336, "vocab_size": 128256}  # fmt: skip
EXPERTS = {"hidden_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4,
           "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
           "vocab_size": 151936}  # fmt: skip


def model(shape, max_position=32768, architecture="LlamaForCausalLM"):
    return from_hf(tiny_checkpoint.config(architecture, max_position_embeddings=max_position, **shape))


def devices(platform, count=1):
    return [SimpleNamespace(platform=platform, device_kind={"gpu": "NVIDIA Toy", "cpu": "cpu"}[platform])] * count


@pytest.fixture
def plan(monkeypatch):
    """make_plan for a medium model with 4 GiB of weights on a GPU with `free` bytes, unless said otherwise."""

    def plan(free, weights=4 * GIB, platform="gpu", count=1, cfg=None, dtype=jnp.bfloat16, **knobs):
        cfg = cfg or model(MEDIUM)
        monkeypatch.setattr(memory, "free_bytes", lambda _: int(free))
        monkeypatch.setattr(memory, "beside_bytes", lambda devices: GIB if len(devices) > 1 else 0)
        made = make_plan(cfg, EngineConfig(tp=count, **knobs), devices(platform, count), int(weights), dtype)
        assert made.weights + made.cache + made.workspace <= made.free == int(free)
        assert made.cache == made.pages * made.page_size * page_bytes(cfg, dtype, count)
        assert made.tokens == (made.pages - 1) * made.page_size >= made.session_len
        assert made.pages > made.lanes and made.budget >= made.lanes
        return made

    def page_bytes(cfg, dtype, count):
        return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * jnp.dtype(dtype).itemsize // count

    return plan


def test_a_large_gpu_gets_the_defaults(plan):
    made = plan(139 * GIB)
    assert (made.lanes, made.budget, made.session_len, made.notes) == (256, 4096, 32768, ())
    assert made.cache == pytest.approx(0.8 * 135 * GIB, rel=1e-3)


def test_the_cpu_takes_the_smaller_of_two_gib_and_a_quarter(plan):
    made = plan(64 * GIB, platform="cpu", dtype=jnp.float32)
    assert (made.lanes, made.budget) == (16, 256)
    assert made.cache == pytest.approx(2 * GIB, rel=0.01)
    made = plan(6.2 * GIB, weights=GIB, platform="cpu", dtype=jnp.float32, session_len=4096)
    assert 1.55 * GIB * 7 / 8 < made.cache <= 1.55 * GIB


def test_a_share_and_a_number_of_pages(plan):
    assert plan(24 * GIB, cache_max_entry_count=0.5).cache == pytest.approx(10 * GIB, rel=1e-3)
    made = plan(24 * GIB, cache_max_entry_count=1000, session_len=4096)
    assert made.pages == 1001 and made.tokens == 64000 and made.notes == ()  # page 0 holds no tokens
    made = plan(24 * GIB, cache_max_entry_count=1000, cache_block_seq_len=16, session_len=4096)
    assert made.tokens == 16000


def test_a_share_of_a_host_is_the_same_at_the_next_start(plan):
    """Programs are compiled for a number of pages, and free memory is never twice the same."""
    made = {plan(free * GIB, platform="cpu", cache_max_entry_count=0.5).cache for free in (23.7, 24, 24.4, 24.9)}
    assert len(made) == 1 and 9 * GIB < made.pop() < 9.9 * GIB


def test_a_share_leaves_room_for_the_workspace(plan):
    made = plan(6 * GIB, cache_max_entry_count=0.99)
    assert made.free - made.weights - made.cache - made.workspace < 16 * 2**20
    assert any("KV cache cut" in note for note in made.notes)


def test_too_many_pages_are_refused(plan):
    with pytest.raises(ValueError, match=r"cache_max_entry_count=9000 .* (\d+) pages") as error:
        plan(6 * GIB, cache_max_entry_count=9000, session_len=1000)
    fit = int(re.search(r"(\d+) pages$", str(error.value))[1])
    assert plan(6 * GIB, cache_max_entry_count=fit, session_len=1000).pages == fit + 1
    with pytest.raises(ValueError):
        plan(6 * GIB, cache_max_entry_count=fit + 1, session_len=1000)


def test_a_small_card_gets_shorter_sessions_and_smaller_steps(plan):
    made = plan(5 * GIB)
    assert made.session_len == made.tokens < 32768
    assert made.budget < 4096 and made.lanes < 256
    text = str(made)
    assert f"session_len cut from 32,768 to {made.session_len:,}" in text
    assert f"steps cut to {made.budget:,} tokens and {made.lanes} requests" in text
    smaller = plan(4.6 * GIB)
    assert smaller.lanes <= made.lanes and smaller.budget <= made.budget and smaller.tokens < made.tokens


def test_what_was_asked_for_is_never_changed(plan):
    made = plan(5 * GIB, max_batch_size=80, num_tokens_per_iter=1000, session_len=1234)
    assert (made.lanes, made.budget, made.session_len) == (80, 1000, 1234)
    made = plan(5.3 * GIB, max_batch_size=120, session_len=500)
    assert made.lanes == 120 and made.budget < 4096 and "steps cut" in str(made)
    made = plan(5 * GIB, num_tokens_per_iter=4096, session_len=500)
    assert made.budget == 4096 and made.lanes < 256 and "steps cut" in str(made)
    assert plan(139 * GIB, num_tokens_per_iter=16).budget == 16
    assert plan(139 * GIB, num_tokens_per_iter=16).lanes == 16
    assert plan(139 * GIB, max_batch_size=5000).budget == 5000
    made = plan(139 * GIB, num_tokens_per_iter=16, max_batch_size=32)  # it can't have both
    assert (made.budget, made.lanes) == (16, 16) and "batch cut to 16" in str(made)


def test_fewer_pages_than_requests(plan):
    made = plan(24 * GIB, cache_max_entry_count=100, session_len=64)
    assert made.lanes == 100 and "batch cut to 100" in str(made)


def test_a_model_that_cannot_fit_is_refused(plan, monkeypatch):
    monkeypatch.setattr(memory.jax, "devices", lambda: devices("gpu", 4))
    with pytest.raises(ValueError) as error:
        plan(8 * GIB, weights=15 * GIB, cfg=model(LARGE), dtype=jnp.float32)
    for part in ("does not fit", "15.00 GiB of weights", "8.00 GiB", "NVIDIA Toy", "tp=2", "bfloat16", "smaller model"):
        assert part in str(error.value)
    with pytest.raises(ValueError) as error:
        plan(8 * GIB, weights=15 * GIB, count=3)
    assert "tp=4" in str(error.value) and "bfloat16" not in str(error.value)
    with pytest.raises(ValueError) as error:
        plan(8 * GIB, weights=15 * GIB, platform="cpu", dtype=jnp.float32)
    assert "GPUs" not in str(error.value) and "free on cpu" in str(error.value)
    with pytest.raises(ValueError, match="lower max_batch_size or num_tokens_per_iter"):
        plan(5 * GIB, max_batch_size=4096)


def test_a_session_that_cannot_fit_is_refused(plan):
    with pytest.raises(ValueError, match="a request of 32,768 tokens does not fit.*raise cache_max.*lower session_len"):
        plan(6 * GIB, session_len=32768)
    with pytest.raises(ValueError, match="a request of 256 tokens does not fit: .* room for 192"):
        plan(24 * GIB, cache_max_entry_count=3)
    assert plan(24 * GIB, cache_max_entry_count=3, session_len=192).session_len == 192
    assert plan(24 * GIB, cache_max_entry_count=3, cfg=model(MEDIUM, max_position=128)).session_len == 128


def test_devices_split_the_cache(plan):
    one, four = plan(24 * GIB), plan(24 * GIB, count=4)
    assert four.tokens == pytest.approx(4 * one.tokens, rel=0.01)
    assert "4 x NVIDIA Toy each" in str(four)


@pytest.mark.parametrize("free", [139, 5])
def test_the_printed_figures_add_up(plan, free):
    made = plan(free * GIB)
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", "\n".join(str(made).splitlines()[:5]))]
    available, *taken = sizes
    assert len(taken) == 4 and sum(taken) == pytest.approx(available, abs=0.03)
    assert f"{made.tokens:,} tokens, {made.tokens // made.session_len} request" in str(made)
    assert "NCCL" not in str(made)
    assert "1.00 GiB  for CUDA, its graphs and NCCL" in str(plan(free * GIB, count=2))


def test_a_model_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    tiny_checkpoint.write(tmp_path, build.HF)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1 << 20)

    def read(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "load", read)
    monkeypatch.setattr(loading.Runner, "compile", read)
    with pytest.raises(ValueError, match="does not fit"):
        build.engine(tmp_path)


# Scratch memory of the largest program in MB, as compiled by jax 0.11.2 for an H200 or a CPU.
@pytest.mark.parametrize(
    "shape, architecture, platform, tp, dtype, tokens, rows, compiled",
    [
        (MEDIUM, "LlamaForCausalLM", "gpu", 1, "bfloat16", 4096, 256, 285.1),
        (MEDIUM, "LlamaForCausalLM", "gpu", 4, "bfloat16", 4096, 256, 228.2),
        (LARGE, "LlamaForCausalLM", "gpu", 1, "bfloat16", 4096, 256, 455.1),
        (SMALL, "LlamaForCausalLM", "gpu", 1, "float32", 4096, 256, 153.3),
        (SMALL, "LlamaForCausalLM", "cpu", 1, "float32", 256, 16, 37.5),
        (MEDIUM | {"num_hidden_layers": 8}, "LlamaForCausalLM", "cpu", 1, "float32", 256, 16, 84.3),
        (MEDIUM | {"num_hidden_layers": 2}, "LlamaForCausalLM", "cpu", 1, "float32", 2048, 16, 264.6),
        (EXPERTS, "Qwen3MoeForCausalLM", "gpu", 1, "bfloat16", 4096, 256, 17450.5),
        (EXPERTS, "Qwen3MoeForCausalLM", "gpu", 1, "bfloat16", 256, 256, 1089.6),
        (EXPERTS, "Qwen3MoeForCausalLM", "cpu", 1, "float32", 256, 16, 7037),
    ],
)
def test_the_workspace_is_bounded(shape, architecture, platform, tp, dtype, tokens, rows, compiled):
    cfg, compiled = model(shape, architecture=architecture), compiled * 1e6
    bound = workspace_bytes(cfg, devices(platform, tp), dtype, tokens, rows)
    assert compiled < bound - (memory.GPU_RUNTIME if platform == "gpu" else memory.CPU_RUNTIME)
    assert bound < 2 * compiled + 320 * 2**20


def test_programs_stay_within_their_workspace(tmp_path):
    tiny_checkpoint.write(tmp_path, build.HF)
    with build.engine(tmp_path) as engine:
        assert 0 < engine.runner.workspace() < engine.plan.workspace


def test_free_memory_of_the_host_is_shared_by_its_devices():
    found = memory.free_bytes(jax.devices()[:4])
    assert found == pytest.approx(psutil.virtual_memory().available / 4, rel=0.3)


@pytest.mark.parametrize(
    ("limit", "found"), [("max", 8000), ("5000", 5000 - 3000 + 700), ("2000", 0), ("90000", 8000), ("1e3", 8000)]
)
def test_free_memory_in_a_container(tmp_path, monkeypatch, limit, found):
    """No more than its limit leaves, of which files that were read count as free."""
    for name, text in {
        "max": limit,
        "current": "3000",
        "stat": "anon 2200\ninactive_file 600\nactive_file 100",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000))
    assert memory.free_bytes(devices("cpu")) == found


def test_free_memory_of_gpus(monkeypatch):
    """The least of what JAX may take and what the driver has left, on the fullest of them."""
    smi = {"0": "2048", "1": "90000"}

    def nvidia_smi(query, **_):
        return SimpleNamespace(stdout=smi[query[-1].partition("=")[2]] + "\n")

    def gpu(number, limit, used, pool):
        stats = {"bytes_limit": limit * GIB, "bytes_in_use": used * GIB, "pool_bytes": pool * GIB}
        return SimpleNamespace(platform="gpu", local_hardware_id=number, memory_stats=lambda: stats)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(memory.subprocess, "run", nvidia_smi)
    assert memory.free_bytes([gpu(1, 76, 1, 1)]) == 75 * GIB  # JAX's own limit
    assert memory.free_bytes([gpu(0, 76, 1, 1), gpu(1, 76, 1, 1)]) == 2 * GIB  # another process is on number 0
    assert memory.free_bytes([gpu(0, 76, 1, 4)]) == 5 * GIB  # and JAX holds 3 that it does not use
    assert memory.beside_bytes([gpu(1, 76, 1, 1)]) == 0  # told of several alone
    assert memory.beside_bytes([gpu(1, 76, 1, 1), gpu(1, 80, 1, 1)]) == 90000 * 2**20 - 79 * GIB
    assert memory.beside_bytes([gpu(0, 76, 1, 1), gpu(1, 76, 1, 1)]) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert memory.free_bytes([gpu(0, 76, 1, 1)]) == 75 * GIB

    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(memory.subprocess, "run", missing)
    assert memory.free_bytes([gpu(0, 76, 1, 1)]) == 75 * GIB


def test_shapes_know_the_size_of_the_weights():
    cfg = model(LARGE, architecture="LlamaForCausalLM")
    mesh = meshes.make_mesh(4)
    whole = weights.nbytes(weights.shapes(cfg, meshes.make_mesh(1), set(), jnp.bfloat16))
    assert whole == pytest.approx(16.06e9, rel=1e-3)  # Llama 3.1 8B
    norms = 65 * 4096 * 2
    assert weights.nbytes(weights.shapes(cfg, mesh, set(), jnp.bfloat16)) == (whole - norms) // 4 + norms
    tied = dataclasses.replace(cfg, tied=True)
    head = 128256 * 4096 * 2
    assert weights.nbytes(weights.shapes(tied, mesh, set(), jnp.bfloat16)) == (whole - norms - head) // 4 + norms
