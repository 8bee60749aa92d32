"""The kernels for quantized pages against the definitions on a GPU, both there.

Compiling takes the time, so a choice of combinations runs.  Attention: every kind with every head size (padded ones
among them) and every dtype, every dtype with every head size, a window with each of them, and what is served most:
bfloat16 with int8 and int4 at 64 and 128.  Steps mix prompts and single tokens, which have a kernel each, with rows cut
into pieces and rows that are not.  Group and page sizes come with one head size, kinds in turn.  Definitions run on
the numbers that codes stand for, which tests on a CPU show to be the same, so that they are compiled once a shape, and
on the CPU, which takes a second to compile one and not five.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import triton_call
from pallas_kernels.kv_quant import BITS, dequantize
from tests.kernels.cases import Case, quantized
from tests.kernels.test_gpu import close, run

pytestmark = pytest.mark.gpu

KINDS = ("int8", "int4", "fp8")
DTYPES = ("bfloat16", "float16", "float32")
MIXED = [  # kind, head dim, dtype, window: a Latin square, with windows along a diagonal of it
    (kind, head_dim, DTYPES[(h + k) % 3], 300 if h and h % 3 == k else None)
    for h, head_dim in enumerate((64, 80, 128, 256))
    for k, kind in enumerate(KINDS)
]
MIXED += [("int4", 64, "bfloat16", None), ("int8", 128, "bfloat16", None)]
PROMPTS = [  # as MIXED
    ("int4", 128, "bfloat16", None),
    ("int8", 128, "bfloat16", None),
    ("int4", 64, "float16", None),
    ("fp8", 80, "bfloat16", None),
    ("int8", 256, "bfloat16", None),
    ("int4", 64, "float32", 300),
]
HEADS = [  # kind, kv heads, query heads a kv head, page size
    ("int8", 1, 1, 16),
    ("int4", 3, 3, 32),
    ("fp8", 4, 7, 128),
    ("int4", 1, 20, 16),
    ("int8", 2, 8, 32),
]
WRITES = [  # kind, head dim, tokens, whether with norms, dtype
    ("int8", 64, 37, False, "bfloat16"),
    ("int4", 64, 1500, False, "bfloat16"),
    ("fp8", 80, 37, True, "bfloat16"),
    ("int4", 80, 37, True, "float16"),
    ("int8", 256, 37, True, "float32"),
    ("int4", 256, 37, False, "float32"),
    ("fp8", 256, 1500, False, "float16"),
]
prefill_reference, decode_reference = (
    jax.jit(f, static_argnames=("scale", "window")) for f in (pk.paged_prefill_reference, pk.paged_decode_reference)
)


@pytest.fixture(autouse=True)
def able(request):
    kind = request.node.callspec.params.get("kind") if hasattr(request.node, "callspec") else None
    if kind == "fp8" and triton_call.device()[1] < 89:
        pytest.skip("needs compute capability 8.9")


def numbers(pool):
    """The pool [L, N, S, K, H] that a QuantizedPool stands for, float32."""
    return jnp.swapaxes(dequantize(pool.codes, pool.parameters, pool.kind), 2, 3)


def check_mixed(case, kind, scale, window=None):
    """paged_prefill, which has paged_decode attend for the rows of one token, or for all where tokens are few."""
    with jax.default_device(jax.devices("cpu")[0]):
        q, pools, rows = jnp.asarray(case.q), quantized(case, kind), case.rows()
        expected = prefill_reference(q.astype(jnp.float32), *map(numbers, pools), 1, *rows, scale=scale, window=window)
        expected = expected.astype(q.dtype)
    q, pools, rows = jax.device_put((q, pools, rows), jax.devices()[0])
    close(run(pk.paged_prefill, q, *pools, 1, *rows, scale=scale, window=window), expected)


@pytest.mark.parametrize("kind, head_dim, dtype, window", MIXED)
def test_attention(kind, head_dim, dtype, window):
    case = Case([5, 3000, 0, 128, 1, 2900, 65, 257], [5, 900, 0, 1, 1, 1, 65, 100], padding=150, kv_heads=2, group=3,
                head_dim=head_dim, page_size=64, dtype=jnp.dtype(dtype), window=window)  # fmt: skip
    check_mixed(case, kind, head_dim**-0.5, window)


@pytest.mark.parametrize("kind, head_dim, dtype, window", PROMPTS)
def test_many_tokens(kind, head_dim, dtype, window):
    """More than one kernel takes: tiles of prompts, then the rows of one token."""
    case = Case([2300, 700, 1, 500], [1900, 1, 1, 400], padding=50, kv_heads=2, group=3, head_dim=head_dim,
                page_size=64, dtype=jnp.dtype(dtype), window=window)  # fmt: skip
    check_mixed(case, kind, head_dim**-0.5, window)


@pytest.mark.parametrize("kind, kv_heads, group, page_size", HEADS)
def test_other_heads_and_pages(kind, kv_heads, group, page_size):
    case = Case([5, 3000, 0, 128, 1, 700, 65, 257], [1, 33, 0, 64, 1, 1, 1, 257], padding=3, kv_heads=kv_heads,
                group=group, head_dim=64, page_size=page_size, dtype=jnp.bfloat16)  # fmt: skip
    check_mixed(case, kind, 0.125)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_many_rows(kind):
    """More rows than pieces, and a long one among short ones; every launch leaves the counters of pieces at zero."""
    random = np.random.default_rng(0)
    lengths = [0, *random.integers(1, 200, 254), 5000]
    case = Case(lengths, [0] + [1] * 255, padding=1, kv_heads=8, group=2, head_dim=128, page_size=64,
                dtype=jnp.bfloat16)  # fmt: skip
    q, pools = jnp.asarray(np.roll(case.q, 1, 0)), quantized(case, kind)  # row 0 has the padding's query
    rows = jnp.asarray(case.pages), jnp.asarray(case.length)
    expected = decode_reference(q.astype(jnp.float32), *map(numbers, pools), 1, *rows, scale=0.1).astype(q.dtype)
    attend = jax.jit(lambda q, k, v, *rows: pk.paged_decode(q, k, v, 1, *rows, scale=0.1))
    for _ in range(3):
        close(attend(q, *pools, *rows), expected)


@pytest.mark.parametrize("kind", BITS)
def test_values_of_any_size(kind):
    """float16: small values times small weights must not vanish, and large ones not run over."""
    attend = jax.jit(lambda q, k, v, *rows: pk.paged_decode(q, k, v, 1, *rows, scale=0.1))
    for size in (1e-3, 1.0, 100.0, 6000.0):
        case = Case([300, 5, 1000], [1] * 3, kv_heads=2, group=4, head_dim=128, page_size=64, dtype=np.float16)
        case.v = (case.v.astype(np.float32) * size + size).astype(case.v.dtype)
        q, pools, rows = jnp.asarray(case.q), quantized(case, kind), map(jnp.asarray, (case.pages, case.length))
        rows = tuple(rows)
        expected = decode_reference(q.astype(jnp.float32), *map(numbers, pools), 1, *rows, scale=0.1) / size
        got = attend(q, *pools, *rows).astype(jnp.float32) / size
        close(got.astype(q.dtype), expected.astype(q.dtype))


@pytest.mark.parametrize("kind, head_dim, tokens, norms, dtype", WRITES)
def test_rope_and_write(kind, head_dim, tokens, norms, dtype):
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


@pytest.mark.parametrize("kind", ["int4"])
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
