"""Who sits where: what is the same in every step of a request while it keeps its lane, by lane.

A step's rows are gathered from these arrays, so that nothing is done for each request in each step.
"""

import numpy as np

from jaxserve.engine.sizes import MOST
from jaxserve.sampling import Sampling, table_rows


class Seats:
    """The lanes as the steps that were packed have them, and as those that were launched do (`taken`)."""

    def __init__(self, lanes, pages, vocab, session_len):
        """pages, session_len: the most of a request; vocab: with padding."""
        self.vocab, self.session_len = vocab, session_len
        self.prompt = np.zeros(lanes, np.int32)  # its length
        self.sampling = np.zeros((lanes, Sampling.WIDTH), np.int32)
        self.full = np.zeros(lanes, bool)  # whether the full sampler draws for it
        self.pages = np.zeros((lanes, pages), np.int32)
        self.filled = np.zeros(lanes, np.int32)  # how many of these it has
        self.leave()

    def leave(self):
        """Everybody stands up: the device has lost what it knew of them."""
        self.taken: list = [None] * len(self.prompt)  # (request, preemptions): who was preempted sits down anew

    def note(self, request):
        """Notes a request's new pages and, where its lane is new to it, all that will not change.

        Returns then what Packed.seats takes of it: nothing is `taken` yet, as steps that were packed before may still
        be about to start, and draw for whoever had the lane.
        """
        lane, pages, seat = request.lane, request.pages, None
        if self.taken[lane] != (request, request.preemptions):
            self.filled[lane], self.prompt[lane] = 0, request.prompt_len
            Sampling.pack(request.params, 0, self.sampling[lane])
            self.full[lane] = not request.params.plain
            seat = lane, (request, request.preemptions), self.tables(request) if request.params.tables else None
        new = max(0, min(self.filled[lane], len(pages) - MOST))  # the last may be others when a plan was taken back
        self.pages[lane, new : len(pages)] = pages[new:]
        self.filled[lane] = len(pages)
        return seat

    def tables(self, request=None):
        """What the sampler's tables of its lane will hold (see sampling.table_rows); None: of lane 0, left empty."""
        return table_rows(request, self.vocab, self.session_len, request.lane if request else 0)
