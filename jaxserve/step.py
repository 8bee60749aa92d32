"""One step of the engine: the jitted functions on the path of a token.

A step is two programs: `advance` computes, `pick` or `draw` chooses tokens.  Where every row has one token, `step` does
both, and several steps in a row: a launch costs the host as much as a small model costs a GPU.  `sampled` is such a
step with the full sampler, where the device can wait for masks itself.

T tokens of the step, R rows, P pages a row, D width, V vocabulary (padded to a multiple of tp), lanes: seats of running
requests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxserve import ops
from jaxserve.cache import PagedKV, Spans
from jaxserve.models.decoder import forward
from jaxserve.sampling import Sampling, Tables, greedy, known, sample, set_lane

ROW = ("start", "count", "lane", "rope_len")  # words of a row ahead of its sampling words
LANE = ROW.index("lane")
NO_LANE = 2**30  # out of range: what the row draws is dropped
BLOCK = 64  # places whose logits are there at once while known tokens are scored
ROW_WIDTH = len(ROW) + Sampling.WIDTH
BORDER = 64  # words
# XLA counts the pools once more for every kernel that writes them in place, finds the memory too small, and recomputes
# what all layers share (rotations, pieces of attention) in each layer: four kernels a layer more.
# Profiled, programs run as ever: in CUDA graphs.
OPTIONS = {"xla_disable_hlo_passes": "rematerialization", "xla_enable_command_buffers_during_profiling": True}


class Shape(NamedTuple):
    """What a program is compiled for."""

    tokens: int  # as many as rows: one token a row
    rows: int
    pages: int  # pages a row
    full: bool = False  # of `step`: the full sampler; otherwise every row is greedy and plain
    steps: int = 1  # of `step`: how many it does

    @property
    def drawn(self):
        """Rows of the program that draws after it: round, so that few are compiled."""
        return self.tokens if self.rows == self.tokens - 1 else self.rows

    @property
    def sections(self):
        """Where the rows, the page tables and the end are in the one array that crosses to the device a step.

        XLA hands a section to a kernel as it lies there, and kernels want it on a border of 256 bytes (Triton of 16).
        """
        rows = -(-self.tokens // BORDER) * BORDER
        pages = rows + -(-self.drawn * ROW_WIDTH // BORDER) * BORDER
        return rows, pages, pages + self.rows * self.pages

    def row_words(self, words):
        """That section of the array that has the rows, [drawn, ROW_WIDTH], of which the last may be padding."""
        start = self.sections[0]
        return words[start : start + self.drawn * ROW_WIDTH].reshape(self.drawn, ROW_WIDTH)


@struct.dataclass
class State:
    """What a step changes.  It is donated: the caller's copy is dead after the call."""

    cache: PagedKV
    newest: jax.Array  # int32[lanes]  the token each lane sampled last
    tables: Tables


@struct.dataclass
class Batch:
    """What the host sends for one step."""

    token: jax.Array  # int32[T]  -1: take the lane's newest
    lane: jax.Array  # int32[R]  out of range in rows that do not emit: their result is dropped
    spans: Spans
    sampling: Sampling

    @classmethod
    def unpack(cls, words, shape):
        """All numbers of a step (floats bit by bit) come in one int32 array: a transfer costs more than its bytes."""
        # The maximum is what makes an array of their own of the page tables: every layer's attention reads them, and
        # where they lay in `words`, which is elsewhere in each step, the host would change each of these nodes of the
        # graph before each launch.
        token, pages = words[: shape.tokens], jnp.maximum(words[shape.sections[1] :], 0)
        rows = shape.row_words(words)[: shape.rows]
        start, count, lane, rope_len = (rows[:, i] for i in range(len(ROW)))
        spans = Spans.locate(shape.tokens, start, count, pages.reshape(shape.rows, shape.pages), rope_len)
        return cls(token, lane, spans, Sampling.unpack(rows[:, len(ROW) :]))

    def later(self, i):
        """The batch of the i-th of several steps: rows of `count` tokens have had one in each step before."""
        spans, live = self.spans, self.spans.count > i
        start, count = spans.start + i, jnp.where(live, 1, 0)
        return Batch(
            jnp.where(i == 0, self.token, -1),
            jnp.where(live, self.lane, NO_LANE),
            Spans.locate(self.token.shape[0], start, count, spans.pages, spans.rope_len),
            self.sampling.later(i),
        )


@jax.named_scope("head")
def _logits(cfg, head, hidden):
    """float32[..., V]; columns that only pad the vocabulary can never win."""
    logits = head.dot(hidden, jnp.float32)
    padded = logits.shape[-1]
    return logits if padded == cfg.vocab else jnp.where(jnp.arange(padded) < cfg.vocab, logits, -jnp.inf)


@struct.dataclass
class Left:
    """What a forward leaves on the device for the program after it."""

    hidden: jax.Array  # [T, D]
    last: jax.Array  # [Shape.drawn, D]  of each row's last token
    rows: jax.Array  # int32[Shape.drawn, ROW_WIDTH]  as they were packed


def _run(cfg, params, state, batch):
    """The hidden states [T, D] of a batch, and the cache with its keys and values."""
    newest = state.newest.at[batch.lane[batch.spans.row]].get(mode="clip")
    token = jnp.where(batch.token < 0, newest, batch.token)
    return forward(cfg, params, state.cache, token, batch.spans)


def _whole(tree):
    """Arrays that lie whole on every device, which is what the next program is compiled for; XLA would split some."""
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def _told(drawn):
    """What the host waits for, arrays [1, R, ...]: a token below 0 is a row without one, see Drawn.bad."""
    told = drawn.replace(tokens=jnp.where(drawn.bad < 0, drawn.bad, drawn.tokens), bad=None)
    return jax.tree.map(lambda x: x[None], told)


@partial(jax.jit, static_argnames="shape")
def empty(shape):
    """A state in which nobody sits.  shape: State of ShapeDtypeStructs."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(jnp.zeros(x.shape, x.dtype), x.sharding), shape)


@partial(jax.jit, static_argnames=("cfg", "shape", "tree"), donate_argnames="state", compiler_options=OPTIONS)
def step(cfg, shape, tree, leaves, state, words):
    """Does shape.steps steps with one token a row, each of which takes what the step before drew.

    tree, leaves: the structure of Params and its arrays, a tuple: taking Params apart in each call costs 0.07 ms.

    A row that is to get fewer tokens than there are steps has as many as its `count` says.  Returns the new state and
    what was drawn: arrays [steps, R, ...].
    """
    batch, params = Batch.unpack(words, shape), jax.tree.unflatten(tree, leaves)

    def one(state, batch):
        hidden, cache = _run(cfg, params, state, batch)
        logits = _logits(cfg, params.head, hidden)  # [R, V]
        with jax.named_scope("sample"):
            if shape.full:
                drawn, tables = sample(logits, batch.sampling, state.tables, batch.lane)
            else:
                drawn, tables = greedy(logits), state.tables
        newest = state.newest.at[batch.lane].set(drawn.tokens, mode="drop")
        return State(cache, *_whole((newest, tables))), _told(drawn)

    if shape.steps == 1:
        return one(state, batch)

    def again(i, carry):
        state, told = carry
        # Both ends of a turn say so: XLA splits what a loop carries by what is done with it in between.
        state = state.replace(newest=_whole(state.newest), tables=_whole(state.tables))
        state, drawn = one(state, batch.later(i))
        # A write at index i would be a copy in the graph whose place the host has to set anew in every step.
        return state, jax.tree.map(lambda all, new: jnp.where(_is(i, all), new, all), told, drawn)

    told = jax.eval_shape(one, state, batch)[1]
    empty = jax.tree.map(lambda x: jnp.zeros((shape.steps, *x.shape[1:]), x.dtype), told)
    # XLA makes one graph of what is repeated, launches it without waiting for the device between, and writes the pools
    # in place (scripts/count_kernels.py shows it).
    return jax.lax.fori_loop(0, shape.steps, again, (state, empty))


def _is(i, x):
    """bool[N, 1, ...]: which of the N entries of x is the i-th."""
    return jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)) == i


@partial(jax.jit, static_argnames=("cfg", "shape", "tree"), donate_argnames="state", compiler_options=OPTIONS)
def advance(cfg, shape, tree, leaves, state, words):
    """Computes the batch packed in `words` and samples nothing.  Returns the new state and what is Left to do.

    tree, leaves: as for `step`.
    """
    batch = Batch.unpack(words, shape)
    hidden, cache = _run(cfg, jax.tree.unflatten(tree, leaves), state, batch)
    last = jnp.clip(batch.spans.first + batch.spans.count - 1, 0, shape.tokens - 1)
    last = hidden[jnp.pad(last, (0, shape.drawn - shape.rows))]
    return state.replace(cache=cache), _whole(Left(hidden, last, shape.row_words(words)))


@partial(jax.jit, static_argnames=("cfg", "most"), donate_argnames="newest", compiler_options=OPTIONS)
def pick(cfg, most, head, newest, last, rows):
    """The likeliest token of the first `most` rows.  Returns State.newest anew and what was drawn."""
    last, rows = last[:most], rows[:most]
    logits = _logits(cfg, head, last)
    with jax.named_scope("sample"):
        drawn = greedy(logits)
    return _whole(newest.at[rows[:, LANE]].set(drawn.tokens, mode="drop")), _told(drawn)


@partial(jax.jit, static_argnames="cfg", donate_argnames=("newest", "tables"), compiler_options=OPTIONS)
def draw(cfg, head, newest, tables, last, rows, allowed):
    """A token for each row by the full sampler, of those that `allowed` has, int32[R, ceil(V / 32)].

    Or `allowed` is a ticket, int32[TICKET]: the device waits until the host has made these masks (ops.await_masks).
    Returns State.newest and State.tables anew and what was drawn.
    """
    lane, logits = rows[:, LANE], _logits(cfg, head, last)
    waits, ticket = allowed.ndim == 1, allowed
    if waits:
        allowed = ops.await_masks(ticket, logits)
    with jax.named_scope("sample"):
        drawn, tables = sample(logits, Sampling.unpack(rows[:, len(ROW) :]), tables, lane, allowed)
    newest, told = newest.at[lane].set(drawn.tokens, mode="drop"), _told(drawn)
    if waits:  # the host has the tokens before it knows that this program is done
        told = told.replace(tokens=ops.tell(ticket, told.tokens[0])[None])
    return *_whole((newest, tables)), told


@partial(jax.jit, static_argnames=("cfg", "shape", "tree"), donate_argnames="state", compiler_options=OPTIONS)
def sampled(cfg, shape, tree, leaves, state, words, ticket):
    """`advance` and `draw` by one launch.  Returns the new state and what was drawn."""
    state, left = advance.__wrapped__(cfg, shape, tree, leaves, state, words)  # type: ignore[attr-defined]
    head = jax.tree.unflatten(tree, leaves).head
    drawing = state.newest, state.tables, left.last, left.rows, ticket
    newest, tables, told = draw.__wrapped__(cfg, head, *drawing)  # type: ignore[attr-defined]
    return state.replace(newest=newest, tables=tables), told


@partial(jax.jit, static_argnames="cfg")
def score(cfg, head, hidden, target, alternatives):
    """What the model thinks of known tokens, from hidden states [T, D] of the places before them.

    Returns the log-probability of each target, int32[T], and, if `alternatives`, the likeliest TOP ids [T, TOP] and
    their log-probabilities; else zeros.  Never more logits at once than those of BLOCK places.
    """
    tokens = hidden.shape[0]
    padded = -(-tokens // BLOCK) * BLOCK
    blocks = jnp.pad(hidden, ((0, padded - tokens), (0, 0))).reshape(-1, min(BLOCK, padded), hidden.shape[1])
    targets = jnp.pad(target, (0, padded - tokens)).reshape(blocks.shape[:2])

    def one(block):
        hidden, target = block
        return known(_logits(cfg, head, hidden), target, alternatives)

    found = jax.lax.map(one, (blocks, targets))
    return tuple(x.reshape(padded, *x.shape[2:])[:tokens] for x in found)


@partial(jax.jit, static_argnames="cfg")
def logits(cfg, head, hidden, start):
    """float32[min(BLOCK, T), V] of hidden states [T, D] from `start` on, at most T - BLOCK."""
    return _logits(cfg, head, jax.lax.dynamic_slice_in_dim(hidden, start, min(BLOCK, hidden.shape[0])))


@partial(jax.jit, donate_argnames="state", compiler_options=OPTIONS)
def seat(state, *row):
    """Writes the tables of a request that takes a lane (see sampling.set_lane)."""
    return state.replace(tables=set_lane(state.tables, *row))
