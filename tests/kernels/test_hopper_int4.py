"""int4 by wgmma: who loads and who multiplies, and what is whose, in Pallas' interpreter of a GPU.

What is an instruction there and has no meaning here is replaced by its definition; the instructions themselves are
tested in test_int4_interpreted.py, and the whole on a GPU in test_int4_matmul.py.
"""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import int4_tiles
from pallas_kernels.int4_mma import int4_untile


@pytest.fixture
def hopper_int4(monkeypatch):
    """The kernel for a GPU of four cores, interpreted."""
    module = pytest.importorskip("pallas_kernels.hopper_int4")
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    plgpu, made, scratch = module.plgpu, module._kernel, []

    def with_scratch(how, T, D, F, group, dtype, *types, **of):
        kernel, memory = made(how, T, D, F, group, dtype, *types, **of)

        def run(*refs):
            scratch[:] = refs[-1:]
            kernel(*refs[:-1])

        return run, (*memory, plgpu.SMEM((4, module.LINES, module.UNIT), dtype))

    wgmma = plgpu.wgmma

    def from_memory(acc, values, tokens):
        """The interpreter knows it with its first operand in memory only."""
        at = scratch[0].at[lax.axis_index("warpgroup")]
        at[...] = values
        wgmma(acc, at, tokens)
        plgpu.wgmma_wait(0)

    monkeypatch.setattr(module, "cores", lambda: 4)
    monkeypatch.setattr(module.lanes, "unit", unit)
    monkeypatch.setattr(module.lanes, "put", put)
    monkeypatch.setattr(module.lanes, "give", give)
    monkeypatch.setattr(module.lanes, "gate", gate)
    monkeypatch.setattr(module, "_kernel", with_scratch)
    monkeypatch.setattr(plgpu, "wgmma", from_memory)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=params.InterpretGPUParams()))
    return module


def unit(dtype, scale_dtype, group, words, *ends):
    """`hopper_lanes.unit` by the definition, without arrays that are no arguments; words [4, 128] of 4 tiles."""
    shape = (4, 8, 4, 2, 2, 2, 2, 2)  # tile, row, lane, half unit, word, input half, row half, which of a pair
    part = [lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (5, 6, 7)]
    words = lax.bitcast_convert_type(words[...], jnp.uint32).reshape(*shape[:5], 1, 1, 1)
    q = (jnp.broadcast_to(words, shape) >> (8 * part[0] + 4 * part[1] + 16 * part[2])) & jnp.uint32(15)
    q = q.transpose(0, 6, 1, 3, 4, 5, 2, 7).reshape(64, 64).astype(jnp.float32)  # outputs, inputs
    scale, zero, scale2, zero2 = (end[...].astype(jnp.float32)[:, None] for end in ends)
    second = (lax.broadcasted_iota(jnp.int32, q.shape, 1) >= 32) & (group == 32)
    values = jnp.where(second, (q - zero2) * scale2, (q - zero) * scale)
    return values.astype(dtype)


def put(out, begin, target, together):
    target[...] = out[:, begin : begin + target.shape[0]].T


def piece(out, begin, of, count):
    """Of two pieces from token `begin` on, the `of`-th."""
    return lax.dynamic_slice(out, (0, begin + of * count), (out.shape[0], count))


def give(out, begin, target, firsts):
    target[...] = piece(out, begin, 1 - lax.axis_index("warpgroup") // firsts, target.shape[1])


def gate(out, begin, theirs, firsts):
    first = lax.axis_index("warpgroup") < firsts
    mine, theirs = piece(out, begin, lax.axis_index("warpgroup") // firsts, theirs.shape[1]), theirs[...]
    gate, up = jnp.where(first, mine, theirs), jnp.where(first, theirs, mine)
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(out.dtype)


CASES = [  # T, D, F, group, stages, what is other than 32 tokens
    (40, 256, 384, 128, 2, {"inputs": 128}),  # a core has two blocks
    (72, 256, 256, 32, 3, {"split": 2}),
    (9, 192, 128, 64, 3, {"tokens": 16}),  # an odd number of turns
    (20, 64, 256, 64, 3, {"tokens": 16}),  # one
    (40, 256, 512, 64, 2, {"inputs": 128, "workers": 4}),
    (150, 384, 256, 64, 3, {"tokens": 96}),  # three stages, no power of two
]


def case(T, D, F, group):
    """Arguments, and the product in float64."""
    rng = np.random.default_rng(T)
    q, zero = (rng.integers(0, high, shape).astype(np.uint8) for high, shape in ((16, (D, F)), (17, (D // group, F))))
    scale, x = rng.uniform(0.005, 0.015, zero.shape).astype(np.float16), rng.normal(size=(T, D))
    values = (q - np.repeat(zero, group, 0).astype(float)) * np.repeat(scale, group, 0).astype(float)
    return (jnp.asarray(x, jnp.bfloat16), int4_tiles(jnp.asarray(q)), jnp.asarray(scale), jnp.asarray(zero)), x @ values


@pytest.mark.parametrize("T, D, F, group, stages, other", CASES)
def test_blocks_and_turns(hopper_int4, monkeypatch, T, D, F, group, stages, other):
    monkeypatch.setattr(hopper_int4, "STAGES", stages)
    arrays, want = case(T, D, F, group)
    how = hopper_int4.How(32)._replace(**other)
    matmul = hopper_int4.int4_wgmma.__wrapped__  # what is compiled here is of no use elsewhere
    found = np.asarray(matmul(*arrays, group=group, dtype=jnp.float32, how=how))
    assert np.linalg.norm(found - want) < 5e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(  # one piece a warpgroup, a larger one, three, two
    "tokens, workers", [(16, 2), (32, 2), (96, 2), (128, 2), (32, 4)]
)
def test_gated(hopper_int4, monkeypatch, tokens, workers):
    monkeypatch.setattr(hopper_int4, "STAGES", 2)
    arrays, y = case(tokens + 8, 128, F := 320 * workers, 128)  # a core has several blocks
    matmul, how = hopper_int4.int4_wgmma.__wrapped__, hopper_int4.How(tokens, 64, workers=workers)
    found = np.asarray(matmul(*arrays, group=128, how=how, gated=True)).astype(float)
    want = y[:, : F // 2] / (1 + np.exp(-y[:, : F // 2])) * y[:, F // 2 :]
    assert np.linalg.norm(found - want) < 1e-2 * np.linalg.norm(want)


def plan(sizes, most, tokens):
    """`hopper_int4._plan` by the definition."""
    rows, end = [], 0
    for expert, size in enumerate(np.asarray(sizes)):
        start, end = end, end + int(size)
        rows += [(expert, at, start, end) for at in range(start // 8 * 8, end if size else 0, tokens)]
    assert len(rows) <= most
    return jnp.asarray([(len(rows), 0, 0, 0), *rows, *[(-1,) * 4] * (most - len(rows))], jnp.int32)


@pytest.mark.parametrize(
    "sizes, how",
    [
        ((5, 0, 30, 1), (16, 128)),  # blocks with two experts' tokens, several of one expert, none
        ((0, 0, 3, 0), (16, 64)),  # fewer blocks than cores
        ((40, 41, 7, 0), (32, 128, 1, 4)),
        ((70, 3, 0, 59), (64, 64)),  # two pieces a block
    ],
)
def test_experts(hopper_int4, monkeypatch, sizes, how):
    monkeypatch.setattr(hopper_int4, "_planned", plan)
    D, F, E, group = 256, 256, len(sizes), 64
    (x, tiles, scale, zero), _ = case(sum(sizes), D, E * F, group)
    values = np.asarray(values_of(tiles, scale, zero, group)).reshape(D, E, F)
    start = np.cumsum((0, *sizes))
    want = np.concatenate([np.asarray(x[a:b], float) @ values[:, e] for e, (a, b) in enumerate(pairwise(start))])
    matmul = hopper_int4.int4_experts.__wrapped__
    found = np.asarray(matmul(x, tiles, scale, zero, jnp.asarray(sizes), group=group, how=hopper_int4.How(*how)))
    assert np.linalg.norm(found.astype(float) - want) < 1e-2 * np.linalg.norm(want)


def values_of(tiles, scale, zero, group):
    """The values [D, F] of a matrix."""
    q = np.asarray(int4_untile(tiles)).astype(float)
    return (q - np.repeat(np.asarray(zero, float), group, 0)) * np.repeat(np.asarray(scale, float), group, 0)


@pytest.mark.parametrize("M, E", [(1, 2), (8, 128), (100, 8), (1024, 128), (32768, 128), (8192, 8), (4096, 3)])
def test_experts_tokens_all_have_a_block(hopper_int4, M, E):
    rng, how = np.random.default_rng(M), hopper_int4.chosen_of_experts(M, E, 256, 256)
    most = hopper_int4.most_blocks(M, E, how.tokens)
    for share in (np.ones(E) / E, rng.dirichlet(np.full(E, 0.1)), np.eye(E)[E // 2]):
        plan(rng.multinomial(M, share), most, how.tokens)
