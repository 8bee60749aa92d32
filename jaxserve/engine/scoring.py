"""Scoring: what the model thinks of sequences whose tokens are all known, beside the requests that generate.

A job's pages are its own, shared with nobody.  It takes them all at once, in the order of arrival: after the requests
that waited before it came, and before those that came later, which are held back until it has them.  Every turn one
step of pieces is computed; jobs take turns, so that a long one does not keep short ones waiting.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxserve.engine.launch import Piece
from jaxserve.engine.runner import BLOCK

WANTS = ("logprobs", "alternatives", "logits", "hidden", "last")
JOBS = 64  # at most at once
SHARE = 4  # all jobs but one have at most this part of the pages


@dataclass(eq=False)
class Job:
    """A sequence, what is asked of it, and where it stands."""

    tokens: list[int]
    want: str  # one of WANTS
    arrival: int = 0  # its place among requests and jobs
    done: Future = field(default_factory=Future)
    start: int = 0  # positions computed, or on their way
    seen: int = 0  # positions whose results are here
    pages: list[int] = field(default_factory=list)
    parts: list[tuple] = field(default_factory=list)
    failures: int = 0  # steps that failed under it

    def result(self):
        """What was asked for, once all parts are there."""
        if self.want == "last":
            return self.parts[-1][0]
        whole = tuple(np.concatenate(part) for part in zip(*self.parts))
        return whole if len(whole) > 1 else whole[0]

    def finish(self, result=None, error=None):
        """Tells whoever waits, if somebody still does."""
        if self.done.set_running_or_notify_cancel():
            if error is None:
                self.done.set_result(result)
            else:
                self.done.set_exception(error)


@dataclass
class Sent:
    """A step of pieces that was dispatched, and what will come of it."""

    pieces: list[tuple[Job, int, int]]  # whose, and its tokens' places in the step: from and to
    found: dict[str, Any]  # name -> device array over the step's tokens
    logits: list[Any]  # for each piece, device arrays of its tokens or None


class Scorer:
    """The jobs of an engine.  Everything is called on the engine's thread."""

    def __init__(self, runner, scheduler):
        self.runner, self.scheduler = runner, scheduler
        self.waiting: deque[Job] = deque()  # without pages
        self.active: deque[Job] = deque()  # with pages; whose turn it is stands first
        self.sent: deque[Sent] = deque()
        self.tokens = 0  # computed since the start

    @property
    def busy(self):
        """Whether anything is left to do."""
        return bool(self.waiting or self.active or self.sent)

    @property
    def jobs(self):
        """How many are not answered yet."""
        sent = list(self.sent)  # at once: it may be asked from any thread
        return len({*self.waiting, *self.active, *(job for step in sent for job, *_ in step.pieces)})

    def admit(self):
        """Gives pages to the jobs whose turn has come; what the next one lacks is kept from younger requests."""
        for job in [job for job in self.active if job.done.cancelled()]:
            self._leave(job)
        pool, lacking = self.scheduler.pool, 0
        while self.waiting and len(self.active) < JOBS:
            job = self.waiting[0]
            if job.done.cancelled():
                self.waiting.popleft()
                continue
            head = next(iter(self.scheduler.waiting), None)
            need, held = -(-len(job.tokens) // pool.size), sum(len(other.pages) for other in self.active)
            if (head is not None and head.arrival < job.arrival) or (held and held + need > pool.count // SHARE):
                break
            if pool.free < need + (self.scheduler.watermark if self.scheduler.running else 0):
                lacking = need
                break
            job.pages = pool.take(need)
            self.active.append(self.waiting.popleft())
        self.scheduler.reserved = lacking

    def turn(self):
        """Dispatches the next step of pieces, and reads the step before.  False if there was none to read."""
        if chosen := self._choose():
            self.sent.append(self._send(chosen))
        due = len(self.sent) - bool(chosen)
        for _ in range(due):
            self._read(self.sent[0])
            self.sent.popleft()  # not before: who is in a step that cannot be read has to be found by `restart`
        return due > 0

    def restart(self, error):
        """The device has lost what it computed: jobs that have begun do so once more, and fail the second time."""
        for job in self._begun()[::-1]:
            job.start = job.seen = 0
            job.parts.clear()
            job.failures += 1
            if job.failures > 1:
                job.finish(error=error)
            else:
                self.waiting.appendleft(job)

    def close(self, error):
        """Ends all jobs."""
        for job in [*self._begun(), *self.waiting]:
            job.finish(error=error)
        self.waiting.clear()

    def _begun(self):
        """Jobs that have begun, oldest first, and takes their pages from them."""
        begun = {*self.active, *(job for sent in self.sent for job, *_ in sent.pieces)}
        self.sent.clear()
        while self.active:
            self._leave(self.active[0])
        return sorted((job for job in begun if not job.done.done()), key=lambda job: job.arrival)

    def _leave(self, job):
        self.active.remove(job)
        self.scheduler.pool.release(job.pages)
        job.pages = []

    def _choose(self):
        """[(job, how many of its tokens)] for the next step: a small one beside requests."""
        sizes = self.runner.sizes.scored
        small = not self.scheduler.idle or any(job.want == "logits" for job in self.active)
        left = sizes[0] if small else sizes[-1]
        rows = self.runner.rows_of(left)
        chosen: list[tuple[Job, int]] = []
        for job in self.active:
            count = min(left, len(job.tokens) - job.start)
            if not count or len(chosen) == rows:
                break
            chosen.append((job, count))
            left -= count
        return chosen

    def _send(self, chosen):
        """Dispatches one step."""
        pieces, parts, at = [], [], 0
        for job, count in chosen:
            stop = job.start + count
            part = job.tokens[job.start : stop], job.tokens[job.start + 1 : stop + 1]
            parts.append(Piece(*part, job.start, len(job.tokens), job.pages))
            pieces.append((job, at, at + count))
            at += count
        wants = {job.want for job, _ in chosen}
        logprob, ids, values, hidden = self.runner.score(parts, "alternatives" in wants)
        found = {}
        if wants & {"logprobs", "alternatives"}:
            found["logprob"] = logprob
        if "alternatives" in wants:
            found |= {"ids": ids, "values": values}
        ends = any(job.want == "last" and job.start + count == len(job.tokens) for job, count in chosen)
        if "hidden" in wants or ends:
            found["hidden"] = hidden
        logits = [self._logits(hidden, start, stop) if job.want == "logits" else None for job, start, stop in pieces]
        for array in found.values():
            array.copy_to_host_async()
        for job, count in chosen:
            job.start += count
            self.active.rotate(-1)
            if job.start == len(job.tokens):  # the device works off steps in order: the pages can be given away
                self._leave(job)
        self.tokens += at
        return Sent(pieces, found, logits)

    def _logits(self, hidden, start, stop):
        """Device arrays with the logits of a step's tokens from start to stop, and which of their rows."""
        blocks, most = [], max(hidden.shape[0] - BLOCK, 0)
        for at in range(start, stop, BLOCK):
            begin = min(at, most)
            blocks.append((self.runner.logits(hidden, begin), at - begin, min(stop, at + BLOCK) - begin))
        return blocks

    def _read(self, sent):
        """Hands out what a step found, once it is done."""
        found = {name: np.asarray(array) for name, array in sent.found.items()}
        for (job, start, stop), blocks in zip(sent.pieces, sent.logits):
            if job.done.cancelled():
                continue
            job.seen += stop - start
            last = job.seen == len(job.tokens)
            if job.want == "logits":
                vocab = self.runner.cfg.vocab
                job.parts += [(np.asarray(block)[begin:end, :vocab],) for block, begin, end in blocks]
            elif job.want == "hidden":
                job.parts.append((found["hidden"][start:stop].astype(np.float32),))
            elif job.want == "last":
                if last:
                    job.parts.append((found["hidden"][stop - 1].astype(np.float32),))
            else:
                names = ("logprob", "ids", "values") if job.want == "alternatives" else ("logprob",)
                # Copies: views would keep whole steps.
                job.parts.append(tuple(found[name][start : stop - last].copy() for name in names))
            if last:
                job.finish(job.result())
