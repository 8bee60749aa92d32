"""One step of the engine: the jitted functions on the path of a token.

T tokens of the step, R rows, P pages a row, D width, V vocabulary (padded to a multiple of tp), lanes: seats of running
requests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from jaxserve.cache import PagedKV, Spans
from jaxserve.models.decoder import forward
from jaxserve.sampling import Sampling, Tables, greedy, known, sample, set_lane

ROW = ("start", "count", "lane", "rope_len")  # words of a row ahead of its sampling words
LANE = ROW.index("lane")
BLOCK = 64  # places whose logits are there at once while known tokens are scored
ROW_WIDTH = len(ROW) + Sampling.WIDTH
BORDER = 64  # words
# XLA counts the pools once more for every kernel that writes them in place, finds the memory too small, and recomputes
# what all layers share (rotations, pieces of attention) in each layer: four kernels a layer more.
OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}


class Shape(NamedTuple):
    """What a program is compiled for."""

    tokens: int
    rows: int
    pages: int  # pages a row
    full: bool = False  # the full sampler; otherwise every row is greedy and plain

    @property
    def sections(self):
        """Where the rows, the page tables and the end are in the one array that crosses to the device a step.

        XLA hands a section to a kernel as it lies there, and kernels want it on a border of 256 bytes (Triton of 16).
        """
        rows = -(-self.tokens // BORDER) * BORDER
        pages = rows + -(-self.rows * ROW_WIDTH // BORDER) * BORDER
        return rows, pages, pages + self.rows * self.pages

    def row_words(self, words):
        """That section of the array that has the rows, [R, ROW_WIDTH]."""
        start = self.sections[0]
        return words[start : start + self.rows * ROW_WIDTH].reshape(self.rows, ROW_WIDTH)


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
        token, pages, rows = words[: shape.tokens], words[shape.sections[1] :], shape.row_words(words)
        start, count, lane, rope_len = (rows[:, i] for i in range(len(ROW)))
        spans = Spans.locate(shape.tokens, start, count, pages.reshape(shape.rows, shape.pages), rope_len)
        return cls(token, lane, spans, Sampling.unpack(rows[:, len(ROW) :]))


def _logits(cfg, head, hidden):
    """float32[..., V]; columns that only pad the vocabulary can never win."""
    logits = head.dot(hidden, jnp.float32)
    padded = logits.shape[-1]
    return logits if padded == cfg.vocab else jnp.where(jnp.arange(padded) < cfg.vocab, logits, -jnp.inf)


@struct.dataclass
class Left:
    """What a forward leaves on the device for the program after it."""

    hidden: jax.Array  # [T, D]
    last: jax.Array  # [R, D]  of each row's last token
    rows: jax.Array  # int32[R, ROW_WIDTH]  as they were packed


def _run(cfg, shape, params, state, words):
    """Computes the batch packed in `words`: the batch, its cache, the hidden states [T, D] and those of last tokens."""
    batch = Batch.unpack(words, shape)
    newest = state.newest.at[batch.lane[batch.spans.row]].get(mode="clip")
    token = jnp.where(batch.token < 0, newest, batch.token)
    hidden, cache = forward(cfg, params, state.cache, token, batch.spans)
    last = jnp.clip(batch.spans.first + batch.spans.count - 1, 0, shape.tokens - 1)
    return batch, cache, hidden, hidden[last]


def _told(drawn):
    """One array for the host to wait for: a token below 0 is a row without one, see Drawn.bad."""
    return drawn.replace(tokens=jnp.where(drawn.bad < 0, drawn.bad, drawn.tokens), bad=None)


@partial(jax.jit, static_argnames=("cfg", "shape"), donate_argnames="state", compiler_options=OPTIONS)
def step(cfg, shape, params, state, words):
    """Computes the batch packed in `words` and samples one token a row.  Returns the new state and what was drawn."""
    batch, cache, _, last = _run(cfg, shape, params, state, words)
    with jax.named_scope("head"):
        logits = _logits(cfg, params.head, last)  # [R, V]
    with jax.named_scope("sample"):
        if shape.full:
            drawn, tables = sample(logits, batch.sampling, state.tables, batch.lane)
        else:
            drawn, tables = greedy(logits), state.tables
    newest = state.newest.at[batch.lane].set(drawn.tokens, mode="drop")
    return State(cache, newest, tables), _told(drawn)


# The same in two programs: what comes between them is a mask that depends on the token before, or nothing.


@partial(jax.jit, static_argnames=("cfg", "shape"), donate_argnames="state", compiler_options=OPTIONS)
def advance(cfg, shape, params, state, words):
    """Computes the batch packed in `words` and samples nothing.  Returns the new state and what is Left to do."""
    _, cache, hidden, last = _run(cfg, shape, params, state, words)
    rows = shape.row_words(words)
    # The next program is compiled for arrays that lie whole on every device.
    whole = jax.lax.with_sharding_constraint(Left(hidden, last, rows), PartitionSpec())
    return state.replace(cache=cache), whole


@partial(jax.jit, static_argnames="cfg", donate_argnames="newest", compiler_options=OPTIONS)
def pick(cfg, head, newest, last, rows):
    """The likeliest token of each row.  Returns State.newest anew and what was drawn."""
    drawn = greedy(_logits(cfg, head, last))
    return newest.at[rows[:, LANE]].set(drawn.tokens, mode="drop"), _told(drawn)


@partial(jax.jit, static_argnames="cfg", donate_argnames=("newest", "tables"), compiler_options=OPTIONS)
def draw(cfg, head, newest, tables, last, rows, allowed):
    """A token for each row by the full sampler, of those that `allowed` has, int32[R, ceil(V / 32)].

    Returns State.newest and State.tables anew and what was drawn.
    """
    lane = rows[:, LANE]
    drawn, tables = sample(_logits(cfg, head, last), Sampling.unpack(rows[:, len(ROW) :]), tables, lane, allowed)
    return newest.at[lane].set(drawn.tokens, mode="drop"), tables, _told(drawn)


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
