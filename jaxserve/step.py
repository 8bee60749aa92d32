"""One step of the engine: the only jitted function on the path of a token.

T tokens of the step, R rows, P pages a row, D width, V vocabulary (padded to a multiple of tp), lanes: seats of running
requests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jaxserve.cache import PagedKV, Spans
from jaxserve.models.decoder import forward
from jaxserve.sampling import Sampling, Tables, greedy, sample, set_lane

ROW = ("start", "count", "lane", "rope_len")  # words of a row ahead of its sampling words
ROW_WIDTH = len(ROW) + Sampling.WIDTH
# XLA counts the pools once more for every kernel that writes them in place, finds the memory too small, and recomputes
# what all layers share (rotations, pieces of attention) in each layer: four kernels a layer more.
OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}


class Shape(NamedTuple):
    """What a program is compiled for."""

    tokens: int
    rows: int
    pages: int  # pages a row
    full: bool  # the full sampler; otherwise every row is greedy and plain

    @property
    def sections(self):
        """Where the rows, the page tables and the end are in the one array that crosses to the device a step.

        XLA hands a section to a kernel as it lies there, and kernels want it on a border of 16 bytes.
        """
        rows = -(-self.tokens // 4) * 4
        pages = rows + -(-self.rows * ROW_WIDTH // 4) * 4
        return rows, pages, pages + self.rows * self.pages


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
        at_rows, at_pages, _ = shape.sections
        token, pages = words[: shape.tokens], words[at_pages:]
        rows = words[at_rows : at_rows + shape.rows * ROW_WIDTH].reshape(shape.rows, ROW_WIDTH)
        start, count, lane, rope_len = (rows[:, i] for i in range(len(ROW)))
        spans = Spans.locate(shape.tokens, start, count, pages.reshape(shape.rows, shape.pages), rope_len)
        return cls(token, lane, spans, Sampling.unpack(rows[:, len(ROW) :]))


def _logits(cfg, params, hidden):
    """float32[..., V]; columns that only pad the vocabulary can never win."""
    logits = params.head.dot(hidden, jnp.float32)
    padded = logits.shape[-1]
    return logits if padded == cfg.vocab else jnp.where(jnp.arange(padded) < cfg.vocab, logits, -jnp.inf)


@partial(jax.jit, static_argnames=("cfg", "shape"), donate_argnames="state", compiler_options=OPTIONS)
def step(cfg, shape, params, state, words):
    """Computes the batch packed in `words` and samples one token a row.  Returns the new state and what was drawn."""
    batch = Batch.unpack(words, shape)
    newest = state.newest.at[batch.lane[batch.spans.row]].get(mode="clip")
    token = jnp.where(batch.token < 0, newest, batch.token)
    hidden, cache = forward(cfg, params, state.cache, token, batch.spans)
    last = jnp.clip(batch.spans.first + batch.spans.count - 1, 0, shape.tokens - 1)
    with jax.named_scope("head"):
        logits = _logits(cfg, params, hidden[last])  # [R, V]
    with jax.named_scope("sample"):
        if shape.full:
            drawn, tables = sample(logits, batch.sampling, state.tables, batch.lane)
        else:
            drawn, tables = greedy(logits), state.tables
    newest = state.newest.at[batch.lane].set(drawn.tokens, mode="drop")
    # One array for the host to wait for: a token below 0 is a row whose logits were not numbers.
    return State(cache, newest, tables), drawn.replace(tokens=jnp.where(drawn.bad, -1, drawn.tokens), bad=None)


@partial(jax.jit, static_argnames=("cfg", "shape"), donate_argnames="state", compiler_options=OPTIONS)
def score(cfg, shape, params, state, words, target):
    """For known tokens: the log-probability of each place's target [T], the logits [T, V], the hidden states [T, D]."""
    batch = Batch.unpack(words, shape)
    hidden, cache = forward(cfg, params, state.cache, batch.token, batch.spans)
    logits = _logits(cfg, params, hidden)
    logprob = jnp.take_along_axis(logits, target[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, -1)
    return state.replace(cache=cache), (logprob, logits, hidden)


@partial(jax.jit, donate_argnames="state", compiler_options=OPTIONS)
def seat(state, *row):
    """Writes the tables of a request that takes a lane (see sampling.set_lane)."""
    return state.replace(tables=set_lane(state.tables, *row))
