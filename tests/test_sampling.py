"""The sampler against NumPy, sorting in float64; draws against their distribution; tables against hand-made cases."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve import mesh, sampling
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.sampling import (
    BEFORE,
    BIASES,
    NOT_NUMBERS,
    NOTHING_LEFT,
    TOP,
    Sampling,
    Tables,
    bias_rows,
    greedy,
    set_lane,
    table_rows,
)

LANES = 4
DROPPED = 2**30
hot = partial(SamplingParams, temperature=1.0)


@jax.jit
def sample(logits, words, tables, lane):
    return sampling.sample(logits, Sampling.unpack(words), tables, lane)


@jax.jit
def keep(logits, words):
    """bool[R, V]: what the limits leave."""
    rows = Sampling.unpack(words)
    wanted = (rows.temperature > 0) & (rows.top_k != 1)
    distance, _ = sampling._distance(logits, wanted, rows)
    return sampling._bits(distance) <= sampling._limit(distance, wanted, rows)[:, None]


def pack(*params, step=0):
    words = np.zeros((len(params), Sampling.WIDTH), np.int32)
    for row, one in zip(words, params, strict=True):
        Sampling.pack(one, step, row)
    return words


def no_tables(vocab, lanes=LANES):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), Tables.shape(lanes, vocab))


def draw(logits, *params, step=0, tables=None, lane=None):
    """One step without lasting tables."""
    logits = np.asarray(logits, np.float32)
    tables = no_tables(logits.shape[1]) if tables is None else tables
    lane = np.full(len(params), DROPPED, np.int32) if lane is None else np.asarray(lane, np.int32)
    return sample(logits, pack(*params, step=step), tables, lane)[0]


def seat(tables, params, prompt, output=(), lane=0, stop_ids=()):
    """Tables with a request in a lane."""
    request = Request([*prompt, *output], 100, params, frozenset(stop_ids))
    request.prompt_len = len(prompt)
    vocab = tables.prompt_seen.shape[1]
    return jax.jit(set_lane)(tables, *table_rows(request, vocab, 64, lane))


def run(params, favoured, vocab=16, prompt=(0,), stop_ids=(), second=15):
    """The tokens of a request whose logits favour one token a step, and after it `second`."""
    tables, tokens = seat(no_tables(vocab), params, prompt, stop_ids=stop_ids), []
    for step, token in enumerate(favoured):
        logits = np.zeros((1, vocab), np.float32)
        logits[0, second], logits[0, token] = 1, 2
        drawn, tables = sample(logits, pack(params, step=step), tables, np.zeros(1, np.int32))
        tokens += drawn.tokens.tolist()
    return tokens, tables


# What is kept


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """bool[V]: tokens that may be drawn from one row of logits.  Equal tokens stay or go together."""
    distance = ((logits.max() - logits) / np.float32(temperature)).astype(np.float64)
    kept = np.isfinite(distance)
    if top_k and top_k < kept.sum():
        kept &= distance <= np.sort(distance)[top_k - 1]
    if top_p < 1:
        order = np.sort(distance[kept])
        share = np.cumsum(np.exp(-order)) / np.exp(-order).sum()
        kept &= distance <= order[min(np.searchsorted(share, top_p), len(order) - 1)]
    return kept & (np.exp(-distance) >= min_p)


VOCAB = 300
floats = st.floats(-30, 30, width=32, allow_subnormal=False)
any_logits = arrays.arrays(np.float32, VOCAB, elements=floats, fill=st.just(np.float32(-np.inf)))
tied_logits = arrays.arrays(np.float32, VOCAB, elements=st.integers(-20, 20).map(lambda i: np.float32(i / 4)))
seeded = st.integers(0, 2**32 - 1).map(lambda s: np.random.default_rng(s).normal(0, 3, VOCAB).astype(np.float32))
knobs = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-4, 0.3, 1.0, 2.5, 50.0]),
        "top_k": st.sampled_from([0, 2, 5, 40, VOCAB - 1, VOCAB, 10**6]),
        "top_p": st.sampled_from([1e-9, 0.05, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0]),
    }
)


@settings(max_examples=150)
@given(st.one_of(any_logits, tied_logits, seeded), knobs)
def test_kept(logits, asked):
    if not np.isfinite(logits.max()):
        logits[7] = 0
    kept = np.asarray(keep(logits[None], pack(SamplingParams(**asked))))[0]
    # Shares are counted to about 2**-31 a token, and exp of a float32 is rounded: at the very edge either is right.
    least = oracle(logits, **asked | {"top_p": asked["top_p"] * (1 - 3e-6), "min_p": asked["min_p"] * (1 + 3e-6)})
    most = oracle(logits, **asked | {"top_p": asked["top_p"] * (1 + 3e-6), "min_p": asked["min_p"] * (1 - 3e-6)})
    least |= logits == logits.max()
    assert (kept >= least).all() and (kept <= most).all()
    assert kept[logits.argmax()]
    if asked["top_p"] == 1 and asked["min_p"] == 0:
        assert (kept == most).all()


def test_kept_of_a_large_vocabulary():
    logits = np.random.default_rng(0).normal(0, 2.5, (4, 92544)).astype(np.float32)
    asked = [{"top_k": 1000}, {"top_p": 0.97}, {"top_k": 5000, "top_p": 0.8}, {"top_p": 0.9999, "min_p": 1e-4}]
    kept = np.asarray(keep(logits, pack(*(hot(**a) for a in asked))))
    for row, found, a in zip(logits, kept, asked, strict=True):
        assert abs(int(found.sum()) - int(oracle(row, **a).sum())) <= 2e-5 * found.sum() + 1


def test_kept_by_hand():
    logits = np.log(np.float32([[0.4, 0.1, 0.3, 0.2]] * 6))
    asked = hot(top_k=2), hot(top_p=0.69), hot(top_p=0.71), hot(min_p=0.6), hot(top_k=3, top_p=0.44), hot(top_p=1e-9)
    kept = [np.flatnonzero(row).tolist() for row in np.asarray(keep(logits, pack(*asked)))]
    # 0.4 of the 0.9 that top-k leaves are 0.44..: one token is enough for 0.44
    assert kept == [[0, 2], [0, 2], [0, 2, 3], [0, 2], [0], [0]]


def test_top_p_of_zero_keeps_the_best():
    words = pack(hot())
    words[0, 2] = 0
    assert np.asarray(keep(np.float32([[0, 3, 1, 3]]), words)).tolist() == [[False, True, False, True]]


@settings(max_examples=60)
@given(
    st.sampled_from([1, 4]),
    arrays.arrays(np.uint32, (2, 50), elements=st.integers(0, 2**32 - 1)),
    arrays.arrays(np.uint32, (2, 50), elements=st.integers(0, 2**25)),
    st.tuples(*[st.integers(1, 2**31)] * 2),
)
def test_reach(bits, key, weight, target):
    found = reach[bits](key, weight, np.array(target, np.uint32))
    for k, w, goal, t in zip(key, weight, target, np.asarray(found), strict=True):
        order = np.argsort(k)
        total = np.cumsum(w[order].astype(np.int64))
        assert t == (k[order][np.searchsorted(total, goal)] if total[-1] >= goal else 2**32 - 1)


reach = {
    1: jax.jit(partial(sampling._digits, bits=1, unroll=1)),
    4: jax.jit(partial(sampling._digits, bits=4, unroll=True)),
}


# What is drawn


@pytest.mark.parametrize(
    "asked",
    [{}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2, "temperature": 2.0}],
    ids=str,
)
def test_distribution(asked):
    """Chi-square over seeds at one step, over steps of one seed, and over pairs of neighbouring steps."""
    logits = np.random.default_rng(3).normal(0, 1.5, 24).astype(np.float32)
    logits[20:] = -np.inf
    kept = oracle(logits, **asked)
    weight = np.where(kept, np.exp((logits - logits.max()).astype(np.float64) / asked.get("temperature", 1)), 0)
    chance = weight / weight.sum()
    rows, steps = 512, 24
    batch = np.tile(logits, (rows, 1))
    params = [SamplingParams(**{"temperature": 1.0} | asked, seed=seed) for seed in range(rows)]
    words, lane = pack(*params), np.full(rows, DROPPED, np.int32)
    tokens = []
    for step in range(steps):
        words[:, Sampling.STEP] = step
        tokens.append(np.asarray(sample(batch, words, no_tables(24), lane)[0].tokens))
    tokens = np.array(tokens)
    assert fits(tokens, chance)
    words[:] = pack(params[7])
    words[:, Sampling.STEP] = np.arange(rows)
    assert fits(np.asarray(sample(batch, words, no_tables(24), lane)[0].tokens), chance)
    assert fits(tokens[:-1:2] * 24 + tokens[1::2], np.outer(chance, chance).ravel())
    assert fits(tokens[:, :-1:2] * 24 + tokens[:, 1::2], np.outer(chance, chance).ravel())


def fits(tokens, chance):
    """Whether the tokens may come from that distribution.  Rare ones are counted together."""
    found, expected = np.bincount(tokens.ravel(), minlength=len(chance)), chance * tokens.size
    assert not found[chance == 0].any(), "a token that was not kept"
    rare = expected < 5
    found, expected = np.append(found[~rare], found[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5:
        found, expected = found[:-1], expected[:-1]
        expected *= found.sum() / expected.sum()
    return len(found) < 2 or scipy.stats.chisquare(found, expected).pvalue > 1e-3


def test_noise_reaches_both_tails():
    rows = Sampling.unpack(pack(*(hot(seed=seed) for seed in range(8))))
    noise = np.asarray(jax.jit(partial(sampling._gumbel, vocab=100_000))(rows))
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    assert noise.max() > 12


def test_same_tokens_whatever_shares_the_batch():
    """Alone, in every place of larger batches, with any neighbours: the same token, exactly."""
    vocab, count = 1000, 12
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (count, vocab)).astype(np.float32)
    kinds = [
        hot(), hot(top_k=40), hot(top_p=0.8), hot(top_k=50, top_p=0.9, min_p=0.01), SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.95), hot(logprobs=3), hot(repetition_penalty=1.3),
        hot(frequency_penalty=0.4, top_p=0.9), hot(logit_bias=((5, 3.0), (9, -100.0))), hot(top_k=1),
        hot(seed=2**40 + 3),
    ]  # fmt: skip
    params = [replace(kind, seed=kind.seed + i) for i, kind in enumerate(kinds)]
    tables = no_tables(vocab, lanes=count)
    for i, one in enumerate(params):
        tables = seat(tables, one, rng.integers(0, vocab, 9), rng.integers(0, vocab, 5), lane=i)

    def tokens(chosen):
        words = pack(*(params[i] for i in chosen), step=5)
        return np.asarray(sample(logits[chosen], words, tables, np.array(chosen, np.int32))[0].tokens)

    alone = np.concatenate([tokens([i]) for i in range(count)])
    assert len(set(alone)) > count // 2
    for size in (4, 9):
        for _ in range(6):
            chosen = rng.permutation(count)[:size]
            assert (tokens(chosen) == alone[chosen]).all()
    assert alone[4] == logits[4].argmax() and alone[10] == logits[10].argmax()


def test_vocabulary_split_over_devices():
    split = mesh.make_mesh(2)
    logits = np.random.default_rng(6).normal(0, 2, (4, 512)).astype(np.float32)
    params = hot(top_k=30, logprobs=2), hot(top_p=0.7, seed=3), hot(presence_penalty=0.5), SamplingParams()
    words, lane = pack(*params), np.arange(4, dtype=np.int32)
    whole, columns = mesh.sharding(split), mesh.sharding(split, None, "tp")
    shapes = Tables.shape(LANES, 512, whole)
    tables = jax.tree.map(lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), shapes)
    expected = sample(logits, words, no_tables(512), lane)
    found = sample(jax.device_put(logits, columns), words, tables, lane)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), found, expected)
    np.testing.assert_array_equal(found[0].tokens, expected[0].tokens)


def test_seed_and_step_decide():
    logits = np.zeros((4, 1000), np.float32)
    first = draw(logits, hot(seed=1), hot(seed=1), hot(seed=2), hot(seed=2**32 + 1), step=3).tokens.tolist()
    assert first[0] == first[1] == first[3] != first[2]
    assert draw(logits, *[hot(seed=1)] * 4, step=4).tokens[0] != first[0]


def test_greedy_rows():
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    logits[1], logits[2, 30:] = 0.25, logits[2].max()  # ties
    expected = logits.argmax(1)
    found = greedy(logits)
    assert found.tokens.tolist() == expected.tolist() and not found.bad.any() and found.logprob is None
    cold = SamplingParams(), hot(top_k=1), SamplingParams(temperature=1e-6), SamplingParams(logprobs=0)
    cold += SamplingParams(top_p=0.5, top_k=3), SamplingParams(temperature=1e-30, min_p=0.3)
    assert draw(logits, *cold).tokens.tolist() == expected.tolist()
    logits[1, 17] += 0.01  # 1e-4 makes of it a hundred
    assert draw(logits[[1, 1]], SamplingParams(temperature=1e-4), hot()).tokens[0] == 17


def test_argmax_of_the_gpu():
    values = np.random.default_rng(2).integers(0, 9, (50, 40)).astype(np.float32)
    assert (np.asarray(jax.jit(sampling._argmax)(values)) == values.argmax(1)).all()
    assert (np.asarray(jax.lax.argmax(values, 1, jnp.int32)) == values.argmax(1)).all()


def test_extreme_logits():
    huge, tie, one, rising = np.full((4, 40), -np.inf, np.float32)
    huge[:3], tie[:20], one[33], rising[:] = (3e38, -3e38, 1), 5.0, -7, np.arange(40)
    for step in range(20):
        params = hot(seed=step), hot(top_p=1e-9, seed=step), hot(min_p=1.0), SamplingParams(temperature=1e30, seed=step)
        drawn = draw([huge, tie, one, rising], *params, step=step)
        assert not drawn.bad.any()
        assert drawn.tokens[0] == 0 and drawn.tokens[1] < 20 and drawn.tokens[2] == 33


@pytest.mark.parametrize("vocab", [64, 97, 300])
def test_masks(vocab):
    """A mask does what -inf in the logits does, after biases and penalties, and reported logprobs do not see it."""
    draw_bits = np.random.default_rng(vocab)
    logits = draw_bits.normal(0, 3, (6, vocab)).astype(np.float32)
    bits = draw_bits.random((6, vocab)) < 0.2
    bits[0], bits[5] = True, False
    allowed = np.zeros((6, -(-vocab // 32) * 32), bool)
    allowed[:, :vocab] = bits
    allowed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    params = (
        SamplingParams(),
        hot(top_p=0.8, logprobs=3),
        hot(top_k=4),
        SamplingParams(logprobs=0),
        hot(min_p=0.2),
        hot(),
    )
    masked = jax.jit(lambda *given: sampling.sample(given[0], Sampling.unpack(given[1]), *given[2:])[0])
    lane = np.full(6, DROPPED, np.int32)
    for step in range(5):
        found = masked(logits, pack(*params, step=step), no_tables(vocab), lane, allowed)
        expected = draw(np.where(bits, logits, -np.inf), *params, step=step)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.bad.tolist() == [0] * 5 + [NOTHING_LEFT]
        free = draw(logits, *params, step=step)
        np.testing.assert_array_equal(found.top_logprobs, free.top_logprobs)
    biased = SamplingParams(
        logit_bias=((int(np.flatnonzero(~bits[1])[0]), 100.0), (int(np.flatnonzero(bits[1])[1]), 50))
    )
    tables = seat(no_tables(vocab), biased, [1])
    found = masked(logits[1:2], pack(biased), tables, np.int32([0]), allowed[1:2])
    assert found.tokens.tolist() == [np.flatnonzero(bits[1])[1]]
    logits[1, np.flatnonzero(~bits[1])[0]] = np.nan  # a mask does not hide it
    assert masked(logits, pack(*params), no_tables(vocab), lane, allowed).bad[1] == NOT_NUMBERS


def test_bad_rows_fail_alone():
    logits = np.random.default_rng(4).normal(size=(6, 200)).astype(np.float32)
    params = [hot(seed=9, logprobs=1, top_p=0.9, top_k=20)] * 6
    expected = draw(logits, *params)
    logits[1, 77], logits[2], logits[3, 5], logits[4, 199] = np.nan, -np.inf, np.inf, -np.nan
    for drawn in draw(logits, *params), greedy(logits):
        assert drawn.bad.tolist() == [0, NOT_NUMBERS, NOTHING_LEFT, NOT_NUMBERS, NOT_NUMBERS, 0]
        assert not drawn.tokens[1:5].any()
    drawn = draw(logits, *params)
    for found, was in zip(jax.tree.leaves(drawn), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found[np.array([0, 5])], was[np.array([0, 5])])
    everything = SamplingParams(logit_bias=tuple((i, -np.inf) for i in range(200)))
    tables = seat(no_tables(200), everything, [1])
    assert draw(np.zeros((1, 200)), everything, tables=tables, lane=[0]).bad.tolist() == [NOTHING_LEFT]


# Log-probabilities


@pytest.mark.parametrize("vocab", [16, 130, 7000])
@pytest.mark.parametrize("tied", [False, True])
def test_logprobs(vocab, tied):
    rng = np.random.default_rng(vocab)
    logits = (rng.integers(-8, 8, (3, vocab)) / 2 if tied else rng.normal(0, 4, (3, vocab))).astype(np.float32)
    params = hot(logprobs=20), SamplingParams(temperature=0.2, top_k=3), SamplingParams(logprobs=0)
    drawn = jax.tree.map(np.asarray, draw(logits, *params))
    exact = scipy.special.log_softmax(logits.astype(np.float64), -1)
    order = np.lexsort((np.broadcast_to(np.arange(vocab), logits.shape), -logits))[:, :TOP]
    known = min(vocab, TOP)
    np.testing.assert_array_equal(drawn.top_ids[:, :known], order)
    np.testing.assert_allclose(drawn.top_logprobs[:, :known], np.take_along_axis(exact, order, 1), atol=1e-5)
    np.testing.assert_allclose(drawn.logprob, exact[np.arange(3), drawn.tokens], atol=1e-5)
    assert (drawn.top_logprobs[:, known:] == -np.inf).all()


def test_logprobs_are_of_the_model():
    """Neither temperature nor penalties change them."""
    logits = np.log(np.float32([[0.5, 0.3, 0.2]]))
    params = SamplingParams(logit_bias=((0, -np.inf),), temperature=9.0, top_p=0.1, logprobs=2)
    drawn = draw(logits, params, tables=seat(no_tables(3), params, [0]), lane=[0])
    assert drawn.tokens.tolist() == [1]
    np.testing.assert_allclose(np.exp(drawn.logprob), [0.3], rtol=1e-6)
    np.testing.assert_allclose(np.exp(drawn.top_logprobs[0, :3]), [0.5, 0.3, 0.2], rtol=1e-6)


def test_nobody_asked():
    drawn = draw(np.zeros((2, 30)), hot(), SamplingParams())
    assert not drawn.logprob.any() and not drawn.top_ids.any()


# Tables


def test_penalties_by_hand():
    logits = np.float32([[2.0, -2.0, 4.0, -1.0, 0.5, 3.0]] * 3)
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((5, -1.5),)
    )
    tables = seat(no_tables(6), params, prompt=[0, 1, 1], output=[2, 3, 2], lane=1)
    tables = seat(tables, SamplingParams(frequency_penalty=-1.0), prompt=[5], output=[4, 4], lane=3)
    rows = Sampling.unpack(pack(params, SamplingParams(frequency_penalty=-1.0), SamplingParams(), step=3))
    found = jax.jit(sampling._penalised)(logits, rows, tables, np.int32([1, 3, 1]))
    expected = [
        # 0 and 1 only in the prompt; 2 twice and 3 once in the output
        [2 / 2, -2 * 2, 4 / 2 - 0.25 - 2 * 0.5, -1 * 2 - 0.25 - 0.5, 0.5, 3 - 1.5],
        [2, -2, 4, -1, 0.5 + 2, 3],
        logits[2],  # sits on a lane with tables, but asks for none
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_frequency_of_what_is_sampled():
    """Each of the favoured token's repeats costs 0.6, until the second, one below, wins."""
    assert run(SamplingParams(frequency_penalty=0.6), [4] * 5)[0] == [4, 4, 15, 4, 15]


def test_bad_words():
    word = SamplingParams(bad_words=((7,), (8, 9), (1, 2, 3, 4, 5)))
    assert run(word, [7, 8, 7, 9])[0] == [15, 8, 15, 9]
    assert run(word, [8, 9, 9])[0] == [8, 15, 9]
    assert run(word, [1, 2, 3, 4, 5])[0] == [1, 2, 3, 4, 15]
    assert run(word, [0, 1, 2, 3, 4, 5, 5])[0] == [0, 1, 2, 3, 4, 15, 5]
    assert run(word, [2, 2, 3, 4, 5])[0] == [2, 2, 3, 4, 5]
    assert run(word, [2, 3, 4, 5], prompt=[1])[0] == [2, 3, 4, 5]  # the prompt does not count
    assert run(word, [9, 3, 4, 5], prompt=[8])[0] == [9, 3, 4, 5]


def test_min_new_tokens():
    params = SamplingParams(min_new_tokens=3)
    assert run(params, [6, 7, 6, 6, 7], stop_ids=[6, 7])[0] == [15, 15, 15, 6, 7]


def test_logit_bias():
    assert run(SamplingParams(logit_bias=((4, 0.5), (15, 2.0))), [4, 3])[0] == [15, 15]
    assert run(SamplingParams(logit_bias=((4, -100.0),)), [4, 3])[0] == [15, 3]
    most = SamplingParams(logit_bias=tuple((i, -100.0) for i in range(BIASES)))
    assert run(most, [BIASES - 1, 390], vocab=400, second=399)[0] == [399, 390]


def test_a_preempted_request_finds_its_tables_again():
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.1, bad_words=((3, 4),), min_new_tokens=2)
    favoured = [3, 4, 3, 3, 9, 3]
    for count in range(len(favoured) + 1):
        tokens, ran = run(params, favoured[:count], prompt=(1, 2, 3), stop_ids=[9])
        again = seat(ran, SamplingParams(), [0, 5, 6], [7, 8], lane=0)  # somebody else had the lane meanwhile
        again = seat(again, params, (1, 2, 3), tokens, lane=0, stop_ids=[9])
        jax.tree.map(np.testing.assert_array_equal, again, ran)


def test_dropped_lanes_and_plain_rows_change_no_table():
    params = SamplingParams(frequency_penalty=0.1)
    tables = seat(seat(no_tables(16), params, [1], [2], lane=0), params, [3], [4], lane=LANES - 1)
    lane = np.int32([DROPPED, LANES, 0, 1])
    _, after = sample(np.eye(4, 16, dtype=np.float32), pack(params, params, SamplingParams(), params), tables, lane)
    expected = jax.tree.map(np.array, tables)
    expected.output_count[1, 3] += 1
    expected.recent[1] = [0, 0, 0, 3]
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    words = pack(params, params)
    words[1] = 0  # padding: the row of another request, whose tables are not for it
    assert not sample(np.ones((2, 16), np.float32), words, tables, np.int32([1, 0]))[0].bad.any()
    untouched = jax.jit(set_lane)(tables, *table_rows(None, 16, 64, LANES))
    jax.tree.map(np.testing.assert_array_equal, untouched, tables)


def test_counts_stay_at_their_largest():
    tables = no_tables(8).replace(output_count=jnp.full((LANES, 8), 0xFFFE, jnp.uint16))
    params = SamplingParams(frequency_penalty=1e-9)
    for _ in range(3):
        _, tables = sample(np.eye(1, 8, dtype=np.float32), pack(params), tables, np.int32([2]))
    assert tables.output_count[2].tolist() == [0xFFFF] + [0xFFFE] * 7


# The host's side


def test_words():
    params = SamplingParams(0.7, 40, 0.9, 0.1, 1.2, -0.5, 0.25, seed=-1, logprobs=0)
    everything = np.full((2, 3 + Sampling.WIDTH), 99, np.int32)
    Sampling.pack(params, 17, everything[1, 3:])
    assert (everything[0] == 99).all() and (everything[1, :3] == 99).all()
    rows = Sampling.unpack(jnp.asarray(everything[1:, 3:]))
    names = [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition",
        "presence",
        "frequency",
        "seed",
        "step",
        "tables",
        "logprobs",
    ]
    values = [0.7, 40, 0.9, 0.1, 1.2, -0.5, 0.25, 2**32 - 1, 17, True, True]
    assert len(names) == Sampling.WIDTH
    for name, value in zip(names, values, strict=True):
        column = getattr(rows, name)
        assert column.shape == (1,) and column[0] == np.asarray(value, column.dtype)
    others = np.arange(Sampling.WIDTH) != Sampling.STEP
    assert (pack(params, step=5)[0] == everything[1, 3:])[others].all() and pack(params, step=5)[0, Sampling.STEP] == 5


def test_table_rows_have_one_shape():
    request = Request([1, 2, 3], 5, SamplingParams(bad_words=((1, 2),), min_new_tokens=1), frozenset([2]))
    shapes = [[(x.shape, x.dtype) for x in table_rows(r, 10, 20)] for r in (None, request)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "asked, stops, words",
    [
        ({"logit_bias": tuple((i, 1.0) for i in range(BIASES + 1))}, (), f"{BIASES} fit"),
        ({"logit_bias": tuple((i, 1.0) for i in range(BIASES)), "min_new_tokens": 2}, (4,), f"{BIASES + 1} entries"),
        ({"logit_bias": ((500, 1.0),)}, (), "500.*vocabulary has 500"),
        ({"logit_bias": ((-1, 1.0),)}, (), "-1"),
        ({"logit_bias": ((3, float("nan")),)}, (), "nan"),
        ({"logit_bias": ((3, float("inf")),)}, (), "inf"),
        ({"bad_words": ((1, 700),)}, (), "700"),
        ({"bad_words": ((1,) * (BEFORE + 2),)}, (), f"{BEFORE + 2} tokens"),
    ],
)
def test_refused(asked, stops, words):
    params = SimpleNamespace(**{"logit_bias": (), "bad_words": (), "min_new_tokens": 0} | asked)
    with pytest.raises(ValueError, match=words):
        bias_rows(params, frozenset(stops), 500)


def test_programs():
    """Nothing sorts, and whatever rows ask for is one program."""
    vocab, logits = 2048, np.zeros((3, 2048), np.float32)
    tables, lane = no_tables(vocab), np.arange(3, dtype=np.int32)
    program = jax.jit(lambda *x: sampling.sample(x[0], Sampling.unpack(x[1]), *x[2:]), donate_argnums=2)
    for params in SamplingParams(), hot(top_k=3, top_p=0.5), hot(logprobs=2, presence_penalty=1.0):
        _, tables = program(logits, pack(*[params] * 3), tables, lane)
    assert program._cache_size() == 1
    compiled = program.lower(logits, pack(*[hot()] * 3), tables, lane).compile().as_text()
    assert " sort(" not in compiled and "topk" not in compiled.lower()
    assert compiled.count(" conditional(") == 5, "a branch that is always computed"
    assert " sort(" not in jax.jit(greedy).lower(logits).compile().as_text()
