"""From logits to tokens: penalties, masks, top-k, top-p, min-p, the draw, log-probabilities; all of it on the device.

R rows, V columns of the vocabulary (padding columns hold -inf), B biases a lane, lanes: seats of running requests.

Two programs serve every request: `greedy` and `sample`.  What only some requests ask for stands behind `lax.cond`, so
it costs nothing where nobody asks.  Nothing here sorts the vocabulary: a set of likeliest tokens is everything within
some distance of the best one, and `_reach` finds that distance bit by bit.  All its sums are of integers, so what is
kept does not depend on the order of adding, hence not on the batch, the row or the mesh.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

TOP = 20  # alternatives reported with logprobs, OpenAI's most
BIASES = 384  # OpenAI's 300 of logit_bias, stop ids, bad words
BEFORE = 4  # tokens that a bad word may have ahead of its last
NOT_NUMBERS = -1  # a row's logits hold NaN or +inf
NOTHING_LEFT = -2  # no token of the row may be picked
COLD = 1e-5  # temperatures below mean greedy, as in vLLM (_SAMPLING_EPS)
ALWAYS = 2**31 - 1
LARGEST = 0x7F7FFFFF  # bits of the largest finite float32
BLOCK = 16  # columns; divides the vocabulary of nearly every model
FEW = 400  # values, each of which may be compared with each; more than TOP blocks


def _column(index, kind):
    """One word of each row, as what it is."""

    def read(rows):
        word = rows.words[:, index]
        return word != 0 if kind is np.bool_ else lax.bitcast_convert_type(word, kind)

    return property(read)


@struct.dataclass
class Sampling:
    """What each row asks for, in one array: a program pays for each.  Zeros are a valid row: greedy and plain."""

    words: jax.Array  # int32[R, WIDTH]

    temperature = _column(0, np.float32)
    top_k = _column(1, np.int32)  # 0 = all
    top_p = _column(2, np.float32)
    min_p = _column(3, np.float32)
    repetition = _column(4, np.float32)
    presence = _column(5, np.float32)
    frequency = _column(6, np.float32)
    seed = _column(7, np.uint32)
    step = _column(8, np.int32)  # tokens the request has generated so far
    tables = _column(9, np.bool_)  # whether the row uses its lane's tables
    logprobs = _column(10, np.bool_)
    STEP = 8  # the only word of a row that changes while a request runs
    WIDTH = 11

    @classmethod
    def pack(cls, params, generated, out):
        """Writes the words of one row to `out`, int32[WIDTH].  Only word STEP depends on `generated`."""
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        out.view(np.float32)[:7] = params.temperature, 0, params.top_p, params.min_p, *penalties
        out[1] = min(params.top_k, ALWAYS)
        out.view(np.uint32)[7] = params.seed & 0xFFFFFFFF
        out[8:] = generated, params.tables, params.logprobs is not None

    @classmethod
    def unpack(cls, words):
        """The rows packed in words, int32[R, WIDTH]."""
        return cls(words)

    def later(self, i):
        """The rows i steps later."""
        return Sampling(self.words.at[:, self.STEP].add(i))


@struct.dataclass
class Tables:
    """What penalties, biases and bad words need to know of each lane.  Zeros are valid; `set_lane` writes a lane."""

    prompt_seen: jax.Array  # bool[lanes, V]
    output_count: jax.Array  # uint16[lanes, V]  stays at its largest value
    recent: jax.Array  # int32[lanes, BEFORE]  the newest sampled tokens, the newest last; -1 where there is none
    bias_token: jax.Array  # int32[lanes, B]
    bias_value: jax.Array  # float32[lanes, B]  added to the logit of the token ...
    bias_until: jax.Array  # int32[lanes, B]  ... while fewer tokens than this were generated ...
    bias_after: jax.Array  # int32[lanes, B, BEFORE]  ... and `recent` equals this; -1 equals anything

    @classmethod
    def shape(cls, lanes, vocab, sharding=None):
        """The tables as ShapeDtypeStructs, `vocab` counting padding.

        Whole on every device: with V split, XLA gathers all of output_count in every step.
        """

        def table(kind, *shape):
            return jax.ShapeDtypeStruct((lanes, *shape), kind, sharding=sharding)

        return cls(
            prompt_seen=table(np.bool_, vocab),
            output_count=table(np.uint16, vocab),
            recent=table(np.int32, BEFORE),
            bias_token=table(np.int32, BIASES),
            bias_value=table(np.float32, BIASES),
            bias_until=table(np.int32, BIASES),
            bias_after=table(np.int32, BIASES, BEFORE),
        )


@struct.dataclass
class Drawn:
    """One token a row.  What follows `bad` is None after `greedy`, and zeros where no row asked for logprobs."""

    tokens: jax.Array  # int32[R]
    bad: jax.Array  # int32[R]  0, or why the token means nothing: NOT_NUMBERS or NOTHING_LEFT
    logprob: jax.Array | None = None  # float32[R]  of the token, by the model's own logits
    top_ids: jax.Array | None = None  # int32[R, TOP]  the likeliest first, of equals the lower id
    top_logprobs: jax.Array | None = None  # float32[R, TOP]


def bias_rows(params, stop_ids, vocab):
    """The biases of one request as arrays [BIASES], for `Tables`: token, value, until, after.

    A bad word bans its last token after its others; min_new_tokens bans the stop ids for as long.  ValueError where a
    token is not of the vocabulary, a value is NaN or +inf, or there are more entries than fit.
    """
    entries = [(token, value, ALWAYS, ()) for token, value in params.logit_bias]
    entries += [(word[-1], -np.inf, ALWAYS, tuple(word[:-1])) for word in params.bad_words]
    if params.min_new_tokens:
        entries += [(token, -np.inf, params.min_new_tokens, ()) for token in sorted(stop_ids) if token < vocab]
    if len(entries) > BIASES:
        raise ValueError(
            f"logit_bias ({len(params.logit_bias)}), bad words ({len(params.bad_words)}) and, with min_new_tokens, "
            f"stop ids ({len(stop_ids)}) make {len(entries)} entries; {BIASES} fit: ask for fewer"
        )
    token, until = np.zeros((2, BIASES), np.int32)
    value, after = np.zeros(BIASES, np.float32), np.full((BIASES, BEFORE), -1, np.int32)
    for i, (last, bias, end, before) in enumerate(entries):
        if len(before) > BEFORE:
            raise ValueError(f"a bad word of {len(before) + 1} tokens; {BEFORE + 1} is the most")
        if not all(0 <= t < vocab for t in (last, *before)):
            raise ValueError(f"token {(*before, last)} in logit_bias or a bad word: the vocabulary has {vocab} tokens")
        if not bias < np.inf:
            raise ValueError(f"logit_bias of token {last} is {bias}: finite numbers and -inf are possible")
        token[i], value[i], until[i] = last, bias, end
        after[i, BEFORE - len(before) :] = before
    return token, value, until, after


def table_rows(request, vocab, session_len, lane=0):
    """What `set_lane` takes after the tables, for a request that gets `lane`; None stands for an empty request.

    Shapes depend on session_len (the longest request) alone.  ValueError as `bias_rows`.
    """
    ids = np.zeros(session_len, np.int32)
    if request is None:
        empty = np.zeros(BIASES, np.int32)
        biases = empty, empty.astype(np.float32), empty, np.full((BIASES, BEFORE), -1, np.int32)
        return np.int32(lane), ids, np.int32(0), np.int32(0), *biases
    ids[: len(request.tokens)] = request.tokens
    biases = bias_rows(request.params, request.stop_ids, vocab)
    return np.int32(lane), ids, np.int32(request.prompt_len), np.int32(len(request.tokens)), *biases


def set_lane(tables, lane, ids, prompt, length, *biases):
    """Tables with one lane written anew.

    ids: int32[session_len]: `prompt` tokens of the prompt, from there up to `length` what was sampled before.
    biases: as from `bias_rows`.
    """
    vocab, index = tables.prompt_seen.shape[1], jnp.arange(ids.shape[0])
    seen = jnp.zeros(vocab, bool).at[jnp.where(index < prompt, ids, vocab)].set(True, mode="drop")
    sampled = jnp.where((index >= prompt) & (index < length), ids, vocab)
    count = jnp.zeros(vocab, jnp.int32).at[sampled].add(1, mode="drop")
    last = length - BEFORE + jnp.arange(BEFORE)
    recent = jnp.where(last >= prompt, ids.at[last].get(mode="clip"), -1)
    row = Tables(seen, jnp.minimum(count, 0xFFFF).astype(jnp.uint16), recent, *biases)
    return jax.tree.map(lambda table, new: table.at[lane].set(new, mode="drop"), tables, row)


def greedy(logits):
    """The likeliest token of each row, of equals the lower id.  logits: float32[R, V]."""
    bad = _bad(_most(logits))
    return Drawn(jnp.where(bad < 0, 0, _argmax(logits)), bad)


def _bad(best):
    """Drawn.bad of rows with these largest logits."""
    return jnp.where(jnp.isfinite(best), 0, jnp.where(best == -jnp.inf, NOTHING_LEFT, NOT_NUMBERS))


def sample(logits, sampling, tables, lane, allowed=None):
    """Draws a token for each row of logits, float32[R, V], and notes it in the tables.

    lane: int32[R]; a row with a lane out of range (lanes or more) changes no table.  allowed: int32[R, ceil(V / 32)],
    a bit for each column that may be drawn, the lowest first; None: all may.

    The order is that of vLLM and transformers: biases and bad words, repetition, presence and frequency penalty,
    temperature, top-k, top-p, min-p.  Rows below temperature COLD, or with a top-k of 1, take the
    best token after the penalties, of equals the lower id.
    """
    hot = (sampling.temperature >= COLD) & (sampling.top_k != 1)
    wanted = logits, hot, sampling, allowed, tables, lane
    distance, best = _if_any(sampling.tables, _penalised_distance, _distance, *wanted)
    kept = _bits(distance) <= _limit(distance, hot, sampling)[:, None]
    noise = jnp.where(hot[:, None], _gumbel(sampling, logits.shape[1]), 0)
    bad = _bad(best)
    tokens = jnp.where(bad < 0, 0, _argmax(jnp.where(kept, noise - distance, -jnp.inf)))
    logprobs = _if_any(sampling.logprobs, _logprobs, _no_logprobs, logits, tokens)
    noted = tables.output_count, tables.recent  # alone: what passes through a cond untouched might be copied
    count, recent = _if_any(sampling.tables, _noted, lambda *noted: noted[:2], *noted, sampling, lane, tokens)
    return Drawn(tokens, bad, *logprobs), tables.replace(output_count=count, recent=recent)


def _if_any(rows, wanted, otherwise, *operands):
    """lax.cond on whether any row wants it.  XLA would compute both sides where they look cheap; a barrier does not."""
    return lax.cond(jnp.any(rows), lambda *operands: wanted(*lax.optimization_barrier(operands)), otherwise, *operands)


def _distance(logits, hot, sampling, allowed=None, *_):
    """How far each logit is below the row's best, in units of the temperature (float32[R, V]), and the best [R]."""
    if allowed is not None:
        bits = jnp.repeat(allowed, 32, axis=1)[:, : logits.shape[1]] >> (jnp.arange(logits.shape[1]) % 32)[None] & 1
        # NaN and +inf stay: a mask must not hide them.
        logits = jnp.where((bits == 1) | ~(logits < jnp.inf), logits, -jnp.inf)
    best = _most(logits)
    unit = jnp.where(hot, sampling.temperature, 1)
    return (best[:, None] - logits) / unit[:, None], best


def _penalised_distance(logits, hot, sampling, allowed, tables, lane):
    return _distance(_penalised(logits, sampling, tables, lane), hot, sampling, allowed)


def _penalised(logits, sampling, tables, lane):
    """Logits after biases and penalties; untouched in rows that use no tables."""
    rows, vocab = logits.shape
    mine = jax.tree.map(lambda table: table.at[lane].get(mode="clip"), tables)
    # Logit_bias as OpenAI has it: added before sampling.  Bad words look at sampled tokens only, as in vLLM.
    follows = jnp.all((mine.bias_after == -1) | (mine.bias_after == mine.recent[:, None]), -1)
    active = follows & (sampling.step[:, None] < mine.bias_until) & sampling.tables[:, None]
    where = jnp.arange(rows)[:, None], jnp.where(active, mine.bias_token, vocab)
    logits = logits.at[where].add(mine.bias_value, mode="drop")
    # CTRL's repetition penalty (arXiv 1909.05858), over prompt and output as in transformers and vLLM.
    count = mine.output_count.astype(jnp.float32)
    factor = jnp.where(mine.prompt_seen | (count > 0), sampling.repetition[:, None], 1)
    repeated = jnp.where(logits > 0, logits / factor, logits * factor)
    # OpenAI's presence and frequency penalties, over the output only.
    less = sampling.presence[:, None] * jnp.minimum(count, 1) + sampling.frequency[:, None] * count
    return jnp.where(sampling.tables[:, None], repeated - less, logits)


def _noted(count, recent, sampling, lane, tokens):
    """output_count and recent of the tables after these tokens were sampled."""
    lane = jnp.where(sampling.tables, lane, ALWAYS)
    old = count.at[lane, tokens].get(mode="clip")
    newest = jnp.concatenate([recent.at[lane, 1:].get(mode="clip"), tokens[:, None]], 1)
    count = count.at[lane, tokens].set(jnp.minimum(old, 0xFFFE) + 1, mode="drop")
    return count, recent.at[lane].set(newest, mode="drop")


def _limit(distance, hot, sampling):
    """uint32[R]: bits of the distance up to which tokens are kept.  Tokens at the same distance stay or go together.

    Top-k keeps the k best (vLLM, transformers: and all that equal the last of them).  Top-p keeps the fewest of the
    best that have the share p of what top-k kept, at least one (Holtzman et al., arXiv 1904.09751).  Min-p keeps what
    is at least min_p times as likely as the best (arXiv 2407.01082).
    """
    by_k, by_p = hot & (sampling.top_k > 0), hot & (sampling.top_p < 1)
    limit = jnp.full(hot.shape, LARGEST, jnp.uint32)
    limit = _if_any(by_k, _by_top_k, lambda limit, *_: limit, limit, by_k, distance, sampling)
    limit = _if_any(by_p, _by_top_p, lambda limit, *_: limit, limit, by_p, distance, sampling)
    return jnp.minimum(limit, _bits(jnp.abs(jnp.log(sampling.min_p))))


def _by_top_k(limit, rows, distance, sampling):
    kth = _reach(_bits(distance), jnp.ones((1, 1), jnp.uint32), sampling.top_k.astype(jnp.uint32))
    return jnp.where(rows, jnp.minimum(limit, kth), limit)


def _by_top_p(limit, rows, distance, sampling):
    weight = jnp.where(_bits(distance) <= limit[:, None], jnp.exp(-distance), 0)
    # A power of two that makes the weights' sum 2**30 to 2**31: then they can be integers.  What is lost is less than
    # 2**-31 of the row's probability a token.
    exponent = _bits(jnp.sum(weight, -1)) >> 23
    scale = lax.bitcast_convert_type((127 + 127 + 30 - exponent) << 23, jnp.float32)
    mass = jnp.round(weight * scale[:, None]).astype(jnp.uint32)
    total = jnp.sum(mass, -1, dtype=jnp.uint32).astype(jnp.float32)
    last = _reach(_bits(distance), mass, jnp.ceil(sampling.top_p * total).astype(jnp.uint32))
    return jnp.where(rows, jnp.minimum(limit, last), limit)


def _reach(key, weight, target):
    """The least t, uint32[R], for which weight [R, V] or [1, 1] summed where key [R, V] <= t comes to the target [R].

    All are uint32.  2**32 - 1 where the sum never does.
    """
    # The CPU pays for comparisons, a GPU for passes over memory, for kernels, and for loops, which end its graphs.
    bitwise, wide = partial(_digits, bits=1, unroll=1), partial(_digits, bits=4, unroll=True)
    return lax.platform_dependent(key, weight, target, cpu=bitwise, default=wide)


def _digits(key, weight, target, bits, unroll):
    """`_reach`, `bits` binary digits of t at a time, the highest first."""

    def find(i, t):
        shift = (32 - bits * (i + 1)).astype(jnp.uint32)
        bounds = [t + (jnp.uint32(digit) << shift) for digit in range(1, 1 << bits)]
        # One reduction with many results: one kernel that reads its operands once.
        parts = [jnp.where(key < bound[:, None], weight, 0) for bound in bounds]
        sums = lax.reduce(parts, [jnp.uint32(0)] * len(parts), _plus, (1,))
        return t + (sum((below < target).astype(jnp.uint32) for below in sums) << shift)

    return lax.fori_loop(0, 32 // bits, find, jnp.zeros(key.shape[0], jnp.uint32), unroll=unroll)


def _plus(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def _most(x):
    """float32[R]: the largest value; NaN where there is one, over which XLA's maximum on the CPU passes."""

    def found(x):
        return jnp.where(jnp.any(jnp.isnan(x), -1), jnp.nan, jnp.max(x, -1))

    return lax.platform_dependent(x, cpu=found, default=partial(jnp.max, axis=-1))


def _argmax(x):
    """int32[R]: the column of the largest value, of equals the first."""

    def two_passes(x):  # XLA's argmax on the CPU is a scalar loop, with all that is fused into it
        column = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.min(jnp.where(x == jnp.max(x, -1, keepdims=True), column, x.shape[1] - 1), -1)

    return lax.platform_dependent(x, cpu=two_passes, default=partial(lax.argmax, axis=1, index_dtype=jnp.int32))


def _bits(x):
    """The bits of float32s that are not negative: integers in the same order."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def _gumbel(sampling, vocab):
    """float32[R, V]: Gumbel noise that depends on a row's seed, its step and the column, and on nothing else."""

    def bits(seed, step):
        return jax.random.bits(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), (vocab,))

    # From 2**-33 to 1 - 2**-24, finest near 0, where the winners are.
    uniform = (jax.vmap(bits)(sampling.seed, sampling.step).astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))


def known(logits, tokens, alternatives):
    """Of tokens that are given, int32[R]: the log-probability, and if `alternatives` (a bool) what was likeliest there.

    Returns float32[R], int32[R, TOP] and float32[R, TOP]; the latter two are zeros unless asked for.
    """

    def plain(logits, tokens):
        total = jax.nn.logsumexp(logits, -1, keepdims=True)
        return (jnp.take_along_axis(logits, tokens[:, None], -1) - total)[:, 0], *_no_logprobs(logits, tokens)[1:]

    return _if_any(alternatives, _logprobs, plain, logits, tokens)


def _logprobs(logits, tokens):
    """Log-probability of each token, the TOP best ids, their log-probabilities: of the model, before any change."""
    total = jax.nn.logsumexp(logits, -1, keepdims=True)
    ids, values = _best(logits)
    return (jnp.take_along_axis(logits, tokens[:, None], -1) - total)[:, 0], ids, values - total


def _no_logprobs(logits, tokens):
    top = (tokens.shape[0], TOP)
    return jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32)


def _best(values):
    """Columns and values of the TOP best of each row of values [R, N], both [R, TOP]; of equals the lower column."""
    rows, count = values.shape
    if count > FEW:  # the best lie in the blocks whose best are best
        blocks = jnp.pad(values, ((0, 0), (0, -count % BLOCK)), constant_values=-jnp.inf).reshape(rows, -1, BLOCK)
        block = _best(jnp.max(blocks, -1))[0][:, :, None]
        values = jnp.take_along_axis(blocks, block, 1).reshape(rows, -1)
        columns = (block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)[None, None]).reshape(rows, -1)
    else:
        values = jnp.pad(values, ((0, 0), (0, max(0, TOP - count))), constant_values=-jnp.inf)
        columns = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    higher = values[:, None] > values[:, :, None]  # each compared with each, [R, N, N]
    before = (values[:, None] == values[:, :, None]) & (columns[:, None] < columns[:, :, None])
    rank = jnp.sum(higher | before, -1, dtype=jnp.int32)
    chosen = rank[:, None] == jnp.arange(TOP, dtype=jnp.int32)[None, :, None]  # [R, TOP, N]
    found = jnp.sum(jnp.where(chosen, jnp.arange(values.shape[1], dtype=jnp.int32)[None, None], 0), -1)
    return jnp.take_along_axis(columns, found, 1), jnp.take_along_axis(values, found, 1)
