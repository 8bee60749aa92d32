"""The kernels for quantized pages against the definitions on a GPU, both there: every head size, kind and dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import triton_call
from pallas_kernels.kv_quant import BITS
from tests.kernels.cases import Case, quantized
from tests.kernels.test_gpu import LENGTHS, both, close

pytestmark = pytest.mark.gpu

HEADS = (64, 80, 96, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(autouse=True)
def able(request):
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else None
    if kind == "fp8" and triton_call.device()[1] < 89:
        pytest.skip("needs compute capability 8.9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("head_dim, window", [*((h, None) for h in HEADS), (80, 300), (128, 300)])
def test_decode(head_dim, window, kind, dtype):
    case = Case(LENGTHS, [min(n, 1) for n in LENGTHS], padding=1, kv_heads=4, group=4, head_dim=head_dim,
                page_size=64, dtype=jnp.dtype(dtype), window=window)  # fmt: skip
    args = (*quantized(case, kind), 1, jnp.asarray(case.pages), jnp.asarray(case.length))
    close(*both("paged_decode", jnp.asarray(case.q), *args, scale=head_dim**-0.5, window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("head_dim, window", [*((h, None) for h in HEADS), (80, 300), (128, 300)])
def test_prefill(head_dim, window, kind, dtype):
    new = [5, 900, 0, 1, 1, 1, 65, 100]
    case = Case(LENGTHS, new, padding=150, kv_heads=2, group=3, head_dim=head_dim, page_size=64, dtype=jnp.dtype(dtype),
                window=window)  # fmt: skip
    args = (jnp.asarray(case.q), *quantized(case, kind), 1, *case.rows())
    close(*both("paged_prefill", *args, scale=head_dim**-0.5, window=window))


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 7), (1, 20)])
@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_other_heads_and_pages(page_size, heads, kind):
    kv_heads, group = heads
    case = Case(LENGTHS, [1, 33, 0, 64, 1, 1, 1, 257], padding=3, kv_heads=kv_heads, group=group, head_dim=64,
                page_size=page_size, dtype=jnp.bfloat16)  # fmt: skip
    q, pools = jnp.asarray(case.q), quantized(case, kind)
    close(*both("paged_prefill", q, *pools, 1, *case.rows(), scale=0.125))
    pages, length = map(jnp.asarray, (case.pages, case.length))
    close(*both("paged_decode", q[: len(LENGTHS)], *pools, 1, pages, length, scale=0.125))


@pytest.mark.parametrize("kind", BITS)
def test_many_rows(kind):
    """More rows than pieces, and a long one among short ones; every launch leaves the counters of pieces at zero."""
    random = np.random.default_rng(0)
    lengths = [*random.integers(1, 200, 255), 9000]
    case = Case(lengths, [1] * 256, kv_heads=8, group=2, head_dim=128, page_size=64, dtype=jnp.bfloat16)
    args = (jnp.asarray(case.q), *quantized(case, kind), 1, jnp.asarray(case.pages), jnp.asarray(case.length))
    for _ in range(3):
        close(*both("paged_decode", *args, scale=0.1))


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", BITS)
def test_keys_and_values_of_any_size(kind, dtype, size):
    """Small values times small weights must not vanish, and large ones not run over."""
    case = Case([300, 5, 1000], [1] * 3, kv_heads=2, group=4, head_dim=128, page_size=64, dtype=jnp.dtype(dtype))
    case.v = (case.v.astype(np.float32) * size + size).astype(case.v.dtype)
    args = (*quantized(case, kind), 1, jnp.asarray(case.pages), jnp.asarray(case.length))
    got, expected = both("paged_decode", jnp.asarray(case.q), *args, scale=0.1)
    close((got / size).astype(got.dtype), (expected / size).astype(got.dtype))


@pytest.mark.parametrize(
    "tokens, norms, dtype",
    [*((37, False, dtype) for dtype in DTYPES), (37, True, "bfloat16"), (1500, False, "bfloat16")],
)
@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_rope_and_write(head_dim, kind, tokens, norms, dtype):
    random = np.random.default_rng(0)
    kv_heads, group = 3, 5

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    case = Case([1600], [1], kv_heads=kv_heads, head_dim=head_dim, page_size=16)
    pools = quantized(case, kind)
    angle = random.uniform(0, 100, (tokens, head_dim // 2)).astype(np.float32)
    slot = jnp.asarray(random.permutation(np.arange(16, 1616))[:tokens], jnp.int32)
    qkv, cos, sin = normal(tokens, kv_heads, group + 2, head_dim), jnp.cos(angle), jnp.sin(angle)
    options = {"q_norm": normal(head_dim), "k_norm": normal(head_dim), "eps": 1e-5} if norms else {}
    kernel, reference = (
        jax.jit(functools.partial(lambda f, a, b, *x: f(a, b, *x[:3], 1, x[3], **options), f))(
            *pools, qkv, cos, sin, slot
        )
        for f in (pk.rope_kv_write, pk.rope_kv_write_reference)
    )
    close(kernel[0], reference[0])
    for got, want in zip(kernel[1:], reference[1:], strict=True):
        for array, other in ((got.codes, want.codes), (got.parameters, want.parameters)):
            array, other = (np.asarray(x)[:, 1:] for x in (array, other))
            np.testing.assert_array_equal(array[0], other[0])
            assert (array == other).mean() > 0.97  # what lies between two codes may go to either


@pytest.mark.parametrize("kind", BITS)
def test_in_place(kind):
    """Two layers of a step: the pools keep their addresses and nothing of their size is allocated beside them."""

    def step(k_pool, v_pool, qkv, angle, slot, pages, length):
        for layer in range(2):
            q, k_pool, v_pool = pk.rope_kv_write(k_pool, v_pool, qkv, angle, angle, layer, slot)
            q = pk.paged_decode(q, k_pool, v_pool, layer, pages, length, scale=0.1)
            qkv = qkv.at[:, :, :2].add(q)
        return k_pool, v_pool, q

    codes = (2, 512, 4, 64, 128 * BITS[kind] // 8)
    pools = [pk.QuantizedPool(jnp.zeros(codes, jnp.uint8), jnp.zeros(codes[:-1], jnp.int32), kind) for _ in range(2)]
    addresses = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(pools)]
    others = [jnp.ones((4, 4, 4, 128), jnp.bfloat16), jnp.ones((4, 64), jnp.float32), jnp.arange(64, 68)]
    others += [jnp.ones((4, 8)), jnp.full(4, 5)]
    others = others[:2] + [x.astype(jnp.int32) for x in others[2:]]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*pools, *others).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 << 20
    *pools, q = compiled(*pools, *others)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(pools)] == addresses
    assert jnp.isfinite(q.astype(jnp.float32)).all()
