"""The kernels against the definitions on a GPU, both there.

Compiling takes the time, so a choice of combinations runs: every dtype with small, padded and large heads and with a
window, every head size in bfloat16.  Steps mix prompts and single tokens, which have a kernel each, with rows cut into
pieces and rows that are not; what hopper_prefill.py takes of them has cases of its own besides.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import triton_call, tuning
from pallas_kernels.paged_prefill import hopper
from tests.kernels.cases import Case

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 2e-2}  # relative to the largest values, which are about 1
LENGTHS = [5, 3000, 0, 128, 1, 700, 65, 257]
MIXED = [  # head dim, dtype, window
    *((head_dim, "bfloat16", None) for head_dim in (64, 80, 96, 128, 256)),
    *((head_dim, "float16", None) for head_dim in (64, 80, 256)),
    *((head_dim, "float32", None) for head_dim in (64, 96, 256)),
    (80, "float16", 300),
    (80, "float32", 300),
    (128, "bfloat16", 300),
]


def run(function, *args, **options):
    static = [i for i, x in enumerate(args) if isinstance(x, int)]
    return jax.jit(functools.partial(function, **options), static_argnums=static)(*args)


def close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype.name]
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), tolerance, tolerance)


def both(name, *args, **options):
    reference = run(getattr(pk, name + "_reference"), *args, **options)
    return run(getattr(pk, name), *args, **options), reference


def test_available():
    assert pk.available() is None


@pytest.mark.parametrize("head_dim, dtype, window", MIXED)
def test_attention(head_dim, dtype, window):
    """paged_prefill, which has paged_decode attend for the rows of one token."""
    case = Case([5, 3000, 0, 128, 1, 2900, 65, 257], [5, 900, 0, 1, 1, 1, 65, 100], padding=150, kv_heads=2, group=3,
                head_dim=head_dim, page_size=64, dtype=jnp.dtype(dtype), window=window)  # fmt: skip
    args = (*map(jnp.asarray, (case.q, case.k, case.v)), 1, *case.rows())
    close(*both("paged_prefill", *args, scale=head_dim**-0.5, window=window))


def test_decode_alone():
    case = Case(LENGTHS, [min(n, 1) for n in LENGTHS], padding=1, kv_heads=4, group=4, head_dim=128, page_size=64,
                dtype=jnp.bfloat16)  # fmt: skip
    q, k, v, pages, length = map(jnp.asarray, (case.q, case.k, case.v, case.pages, case.length))
    close(*both("paged_decode", q, k, v, 1, pages, length, scale=0.1))


@pytest.mark.parametrize(
    "kv_heads, group, page_size, dtype",
    [
        (1, 1, 16, "float32"),
        (3, 3, 32, "bfloat16"),
        (4, 7, 128, "float32"),
        (1, 20, 16, "bfloat16"),
        (2, 8, 32, "float32"),
    ],
)
def test_other_heads_and_pages(kv_heads, group, page_size, dtype):
    """On Hopper, prompts in bfloat16 are for the kernel of hopper_prefill.py."""
    case = Case(LENGTHS, [1, 33, 0, 64, 1, 1, 1, 257], padding=3, kv_heads=kv_heads, group=group, head_dim=64,
                page_size=page_size, dtype=jnp.dtype(dtype))  # fmt: skip
    q, k, v = map(jnp.asarray, (case.q, case.k, case.v))
    close(*both("paged_prefill", q, k, v, 1, *case.rows(), scale=0.125))


HOPPER = {  # lengths, new tokens, padding, kv heads, query heads a kv head, head dim, page size
    "one row": ([300], [300], 0, 2, 2, 128, 64),
    "ragged": ([5, 900, 0, 1, 333, 65, 2000], [5, 700, 0, 1, 33, 1, 64], 100, 2, 2, 128, 64),
    "mostly single": ([130, *[700] * 200, 2000], [130, *[1] * 200, 50], 37, 8, 4, 128, 64),
    "small pages": ([700, 129, 128], [200, 129, 128], 70, 2, 3, 128, 16),
    "seven a group": ([257, 1000], [257, 3], 0, 2, 7, 128, 32),
    "heads of 64": ([513, 64, 63], [500, 64, 63], 200, 3, 3, 64, 64),
    "pages of 128": ([1000, 200], [600, 199], 9, 2, 8, 64, 128),
    "sixteen a group": ([700], [130], 0, 2, 16, 64, 64),
    "padding alone": ([40, 0], [1, 0], 255, 2, 2, 128, 64),
    "long ago": ([9000, 4097], [130, 2], 0, 1, 1, 128, 64),
}


@pytest.mark.parametrize("label, dtype", [*((label, "bfloat16") for label in HOPPER), ("ragged", "float16")])
def test_hopper(label, dtype, monkeypatch):
    """What the kernel of hopper_prefill.py takes; junk that nobody wrote is NaN in these cases."""
    if triton_call.device()[1] != 90:
        pytest.skip("needs compute capability 9.0")
    lengths, new, padding, kv_heads, group, head_dim, page_size = HOPPER[label]
    case = Case(lengths, new, padding=padding, kv_heads=kv_heads, group=group, head_dim=head_dim, page_size=page_size,
                dtype=jnp.dtype(dtype))  # fmt: skip
    q, k, v = map(jnp.asarray, (case.q, case.k, case.v))
    monkeypatch.setitem(tuning.lookup("hopper_prefill", dtype, head_dim), "tokens", 0)
    assert hopper(q, k, None)
    close(*both("paged_prefill", q, k, v, 1, *case.rows(), scale=head_dim**-0.5))


def test_hopper_gives_the_same_bits(monkeypatch):
    if triton_call.device()[1] != 90:
        pytest.skip("needs compute capability 9.0")
    case = Case([900, 1, 2000, 700], [900, 1, 1000, 7], padding=100, kv_heads=8, group=2, head_dim=128, page_size=64,
                dtype=jnp.bfloat16)  # fmt: skip
    args = (*map(jnp.asarray, (case.q, case.k, case.v)), *case.rows())
    monkeypatch.setitem(tuning.lookup("hopper_prefill", "bfloat16", 128), "tokens", 0)
    attend = jax.jit(lambda q, k, v, *rows: pk.paged_prefill(q, k, v, 1, *rows, scale=0.1))
    first = np.asarray(attend(*args)).view(np.uint16)
    for _ in range(100):
        np.testing.assert_array_equal(np.asarray(attend(*args)).view(np.uint16), first)


def test_many_rows():
    """More rows than pieces, and a long one among short ones."""
    random = np.random.default_rng(0)
    lengths = [*random.integers(1, 200, 255), 9000]
    case = Case(lengths, [1] * 256, kv_heads=8, group=2, head_dim=128, page_size=64, dtype=jnp.bfloat16)
    q, k, v, pages, length = map(jnp.asarray, (case.q, case.k, case.v, case.pages, case.length))
    close(*both("paged_decode", q, k, v, 1, pages, length, scale=0.1))


@pytest.mark.parametrize(
    "head_dim, dtype, norms",
    [
        (64, "bfloat16", True),
        (80, "bfloat16", False),
        (80, "float16", True),
        (256, "float16", False),
        (256, "float32", True),
        (64, "float32", False),
    ],
)
def test_rope_and_write(head_dim, dtype, norms):
    random = np.random.default_rng(0)
    tokens, kv_heads, group = 37, 3, 5

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    pools = normal(2, 3, 5, 16, kv_heads, head_dim)
    angle = random.uniform(0, 100, (tokens, head_dim // 2)).astype(np.float32)
    slot = jnp.asarray(random.permutation(np.arange(16, 80))[:tokens], jnp.int32)
    qkv, cos, sin = normal(tokens, kv_heads, group + 2, head_dim), jnp.cos(angle), jnp.sin(angle)
    options = {"q_norm": normal(head_dim), "k_norm": normal(head_dim), "eps": 1e-5} if norms else {}
    kernel, reference = (
        jax.jit(lambda a, b, *x, f=f, options=options: f(a, b, *x[:3], 2, x[3], **options))(*pools, qkv, cos, sin, slot)
        for f in (pk.rope_kv_write, pk.rope_kv_write_reference)
    )
    for got, expected in zip(kernel, reference, strict=True):
        close(got, expected)
    kernel, reference = (
        jax.jit(lambda a, b, k, v, s, f=f: f(a, b, k, v, 1, s))(*pools, qkv[:, :, 0], qkv[:, :, 1], slot)
        for f in (pk.kv_write, pk.kv_write_reference)
    )
    for got, expected in zip(kernel, reference, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_launches_share_their_counters():
    """Many launches in one program, whose pieces XLA cuts once: each leaves the counters of the pieces at zero."""
    lengths = [4000, 1, 0, 700, 129, 64, 2000, 300]
    case = Case(lengths, [min(n, 1) for n in lengths], padding=1, kv_heads=8, group=2, head_dim=128, page_size=64,
                dtype=jnp.bfloat16)  # fmt: skip
    q, k, v, pages, length = map(jnp.asarray, (case.q, case.k, case.v, case.pages, case.length))
    expected = run(pk.paged_decode_reference, q, k, v, 1, pages, length, scale=0.1)

    @jax.jit
    def many(q, k, v, pages, length):
        outs = [pk.paged_decode(q, k, v, 1, pages, length, scale=0.1)]
        for _ in range(49):  # each needs the one before it
            outs.append(pk.paged_decode(q + 0 * outs[-1], k, v, 1, pages, length, scale=0.1))
        return outs

    for _ in range(5):
        for got in many(q, k, v, pages, length):
            close(got, expected)


def test_in_place():
    """Two layers of a step: the pools keep their addresses and nothing of their size is allocated beside them."""

    def step(k_pool, v_pool, q, slot, pages, length):
        for layer in range(2):
            k_pool, v_pool = pk.kv_write(k_pool, v_pool, q[:, :, 0], q[:, :, 1], layer, slot)
            q += pk.paged_decode(q, k_pool, v_pool, layer, pages, length, scale=0.1)
        return k_pool, v_pool, q

    pools = [jnp.zeros((2, 512, 64, 4, 128), jnp.bfloat16) for _ in range(2)]  # 67 MB each
    addresses = [pool.unsafe_buffer_pointer() for pool in pools]
    others = (jnp.ones((4, 4, 2, 128), jnp.bfloat16), jnp.arange(64, 68), jnp.ones((4, 8), jnp.int32), jnp.full(4, 5))
    others = [x.astype(jnp.int32) if x.ndim < 4 else x for x in others]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*pools, *others).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 << 20
    *pools, q = compiled(*pools, *others)
    assert [pool.unsafe_buffer_pointer() for pool in pools] == addresses
    assert jnp.isfinite(q).all()
