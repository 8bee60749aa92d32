"""Steps before and after they are launched: packed, in flight, read."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Packed:
    """A step as it goes to the device, not yet sent."""

    chunks: list
    shape: Any  # step.Shape
    full: bool  # the full sampler; otherwise every row is greedy and plain
    whole: bool  # one program does it
    tokens: int
    words: Any  # int32
    seats: list[tuple[int, tuple, tuple | None]]  # lane, who takes it (as in Seats.taken), what its tables will hold
    guided: Sequence = ()  # (row, request) of rows that wait for a mask


class InFlight:
    """A step that was dispatched: reading waits for it."""

    def __init__(self, packed, drawn):
        """drawn: arrays of sampling.Drawn that are on their way."""
        shape = packed.shape
        self.chunks, self.drawn = packed.chunks, drawn
        self.tokens, self.padded, self.steps = packed.tokens, shape.tokens * shape.steps, shape.steps
        self.began = time.perf_counter()
        self.masks: Any = None  # the guide.Job that makes them, if it waits for any
        self._drew: dict | None = None
        self.wants = packed.full and any(c.emits and c.request.params.logprobs is not None for c in self.chunks)
        for array in self._wanted():  # asked for later, they would come when the step after this one ends
            array.copy_to_host_async()

    def _wanted(self):
        drawn = self.drawn
        return (drawn.tokens, drawn.logprob, drawn.top_ids, drawn.top_logprobs) if self.wants else (drawn.tokens,)

    def drew(self):
        """{request: token} of those that got one; waits for them.  On the guide's thread, before or after `read`."""
        if self._drew is None:
            job, tokens = self.masks, None
            if job is not None:
                tokens = job.gate.told(job.number, self.drawn.tokens)
            if tokens is None:
                tokens = np.asarray(self.drawn.tokens)[-1].tolist()
            self._drew = {c.request: token for c, token in zip(self.chunks, tokens) if c.emits}
        return self._drew

    def read(self):
        """For each step: tokens, logprobs or None, tops or None, each with an entry for each chunk.

        A token below 0 is a Drawn.bad.  A chunk has tokens in as many steps as it emits.
        """
        tokens, *rest = (np.asarray(x)[:, : len(self.chunks)].tolist() for x in self._wanted())
        if not rest:
            return [(row, None, None) for row in tokens]
        counts = [c.request.params.logprobs for c in self.chunks]
        told = []
        for row, logprobs, ids, values in zip(tokens, *rest):
            tops = [tuple(zip(i[:k], v[:k])) if k else () for i, v, k in zip(ids, values, counts)]
            told.append((row, [p if k is not None else None for p, k in zip(logprobs, counts)], tops))
        return told


@dataclass
class Piece:
    """Tokens of a known sequence of `length` from position `start` on, their keys going into its `pages`."""

    tokens: list[int]
    targets: list[int]  # the tokens after each; the last of a sequence has none
    start: int
    length: int
    pages: list[int]
