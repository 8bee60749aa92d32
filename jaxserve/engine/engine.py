"""The loop: plan, dispatch, and only then read what an earlier step produced.  One thread owns the device."""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import EngineDead, Output, Overloaded
from jaxserve.engine.runner import SCORED
from jaxserve.engine.scheduler import Scheduler

__all__ = ["Engine", "EngineDead", "Overloaded"]

log = logging.getLogger("jaxserve")
GIVE_UP = 3  # failed steps in a row after which the engine stops
WANTS = ("logprobs", "alternatives", "logits", "hidden", "last")
SHORT = 32  # tokens: steps so short that launching one takes longer than running it (a 1.8B model on an H200: 1.9 ms)


@dataclass
class Scoring:
    """A sequence whose tokens are all known: computed a chunk at a time beside the requests, sharing no pages."""

    tokens: list[int]
    want: str  # one of WANTS
    done: Future = field(default_factory=Future)
    start: int = 0
    pages: list[int] = field(default_factory=list)
    parts: list[np.ndarray] = field(default_factory=list)


class Engine:
    """Takes requests from any thread and answers through their outboxes.

    `engine.loading.load(...)` builds one from a checkpoint.
    """

    def __init__(self, runner, *, prefix_caching=True, rope_original=None):
        """runner: compiled, with its weights.

        rope_original: the length past which a prompt stretches its rotations (dynamic NTK).
        """
        plan = runner.plan
        self.runner, self.rope_original = runner, rope_original
        self.session_len, self.max_batch_size = plan.session_len, plan.lanes
        pool = PagePool(plan.pages, plan.page_size)
        self.scheduler = Scheduler(
            pool,
            plan.lanes,
            plan.budget,
            session_len=plan.session_len,
            prefix_caching=prefix_caching,
            sizes=runner.sizes.tokens,
        )
        self.info = {}  # plain data about the model, set by whoever loads it
        self.on_turn = []  # called on the engine's thread when a turn's tokens are in their outboxes
        self.pending = deque()  # the steps in flight, oldest first
        self.ahead = 1 if runner.on_cpu else 2  # how many while the oldest is a short one; else one
        self.steps, self.computed, self.dispatched, self.busy = 0, 0, 0, 0.0
        self._inbox, self._scoring = deque(), deque()
        self._wake = threading.Condition()
        self._closed, self._dead, self._failures = False, None, 0
        self._thread = threading.Thread(target=self._loop, name="jaxserve-engine", daemon=True)
        self._thread.start()

    # From any thread ------------------------------------------------------------------------------------------------

    def submit(self, request):
        """Queues a request; its outbox gets an Output a token.  ValueError if it can never be served."""
        self.scheduler.check(request)
        self.runner.check(request)
        if self.rope_original is not None and request.prompt_len > self.rope_original:
            request.salt = (request.salt, "rope", request.prompt_len)  # its keys are rotated as no other length's
        self._send(self.scheduler.add, request)

    def abort(self, request):
        """Ends a request wherever it is, and frees what it holds."""
        if not self._closed:
            self._send(self.scheduler.abort, request)

    def score(self, tokens, want="logprobs"):
        """What the model thinks of a known sequence of n token ids; waits for the answer.

        "logprobs": float32[n-1], of each token after the first given those before it.  "alternatives": those, and the
        20 likeliest tokens of each place, int32[n-1, 20], with their log-probabilities, float32[n-1, 20].  "logits":
        float32[n, V].  "hidden": float32[n, D].  "last": float32[D], the hidden state of the last token.
        """
        future = self.score_async(tokens, want)
        try:
            return future.result()
        except BaseException:  # whoever waits is interrupted
            future.cancel()
            raise

    def score_async(self, tokens, want="logprobs"):
        """A concurrent.futures.Future of what `score` returns.  Cancelling it frees what it holds."""
        if want not in WANTS:
            raise ValueError(f"score gives {', '.join(WANTS)}, not {want!r}")
        if not 1 <= len(tokens) <= min(self.session_len, (self.scheduler.pool.count - 1) * self.scheduler.pool.size):
            raise ValueError(f"a sequence to score has 1 to {self.session_len} tokens, not {len(tokens)}")
        job = Scoring(list(tokens), want)
        self._send(self._scoring.append, job)
        return job.done

    def stats(self):
        """Counts of requests, pages and tokens at this moment, and of steps since the start."""
        return self.scheduler.stats() | {
            "steps": self.steps,
            "step_tokens": self.computed,
            "step_tokens_padded": self.dispatched,
            "busy_s": self.busy,
        }

    def close(self):
        """Stops the loop and frees the device; requests that still run are aborted.  Closing twice is fine."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self.runner.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def alive(self):
        """Whether requests are still answered."""
        return not self._closed and self._dead is None

    def _send(self, action, subject):
        with self._wake:
            if self._dead is not None:
                raise EngineDead(f"the engine has stopped: {self._dead}")
            if self._closed:
                raise EngineDead("the engine is closed")
            self._inbox.append((action, subject))
            self._wake.notify()

    # On the engine's thread -----------------------------------------------------------------------------------------

    def _loop(self):
        while self._receive():
            began = time.perf_counter()
            try:
                self._turn()
                self._failures = 0
            except Exception as error:
                log.exception("a step failed")
                self._recover(error)
            self._told()
            self.busy += time.perf_counter() - began
        self._end("the engine was closed" if self._dead is None else f"the engine has stopped: {self._dead}")
        self._told()

    def _told(self):
        """Lets those know who wait for the end of a turn."""
        for hook in self.on_turn:
            try:
                hook()
            except Exception:
                log.exception("a hook on the engine's turns failed")

    def _receive(self):
        """Does what was sent, after waiting if there is nothing else to do.  False when the loop must end."""
        with self._wake:
            while not (self._inbox or self._closed or self._dead or self._busy()):
                self._wake.wait()
            sent, self._inbox = self._inbox, deque()
        for action, subject in sent:
            try:
                action(subject)
            except ValueError as error:
                subject.outbox.put(Output(None, "error", error=str(error)))
        return not (self._closed or self._dead)

    def _busy(self):
        return not self.scheduler.idle or self.pending or self._scoring

    def _turn(self):
        """One turn.  The device works on the new step while the host reads the old one."""
        chunks = self.scheduler.plan()
        if chunks:
            step = self.runner.dispatch(chunks)
            self.pending.append(step)
            self.steps += 1
            self.computed += step.tokens
            self.dispatched += step.padded
        # Steps that take the device less time than the host takes to launch one need a second on its way.
        ahead = self.ahead if self.pending and self.pending[-1].padded <= SHORT else 1
        # Without a plan one step is read all the same: it may be what the next plan waits for.
        for _ in range(max(0, len(self.pending) - ahead) if chunks else min(1, len(self.pending))):
            self._read(self.pending.popleft())
        if self._scoring:
            self._score(self._scoring[0])

    def _read(self, step):
        """Records what a step drew, once it is done."""
        tokens, logprobs, tops = step.read()
        for chunk in (c for c, token in zip(step.chunks, tokens) if token < 0 and c.emits):
            self.scheduler.fail(
                chunk.request,
                "the model's logits were not numbers (NaN): the weights or the computation overflowed",
            )
        self.scheduler.commit(step.chunks, tokens, logprobs, tops)

    def _score(self, job):
        """The next chunk of a sequence to score, once there are pages for it."""
        pool = self.scheduler.pool
        if job.done.cancelled():
            self._scoring.popleft()
            return pool.release(job.pages)
        if job.start == 0 and not job.pages:
            need = -(-len(job.tokens) // pool.size)
            if pool.free < need:
                return
            job.pages = pool.take(need)
        stop = min(len(job.tokens), job.start + SCORED)
        tokens, targets = job.tokens[job.start : stop], job.tokens[job.start + 1 : stop + 1]
        logprob, logits, hidden = self.runner.score(tokens, job.start, job.pages, len(job.tokens), targets)
        if job.want == "alternatives":
            job.parts.append((np.asarray(logprob)[: len(targets)], np.asarray(logits)[: len(targets)]))
        else:
            part = {"logprobs": logprob, "logits": logits, "hidden": hidden, "last": hidden}[job.want]
            job.parts.append(np.asarray(part, np.float32)[: len(targets) if job.want == "logprobs" else len(tokens)])
        job.start = stop
        if stop == len(job.tokens):
            self._scoring.popleft()
            pool.release(job.pages)
            if job.done.set_running_or_notify_cancel():
                job.done.set_result(self._scored(job))

    def _scored(self, job):
        if job.want == "last":
            return job.parts[-1][-1]
        if job.want != "alternatives":
            return np.concatenate(job.parts)
        logprobs, logits = (np.concatenate(part) for part in zip(*job.parts))
        ids = np.argsort(-logits, -1, kind="stable")[:, :20].astype(np.int32)
        best = np.take_along_axis(logits, ids, -1)
        total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        return logprobs, ids, best - logits.max(-1, keepdims=True) - total

    def _recover(self, error):
        """After a failed step the state on the device is lost: its requests fail, those that wait go on."""
        self._failures += 1
        self.pending.clear()
        self.scheduler.restart(f"the step failed: {error}")
        while self._scoring:
            job = self._scoring.popleft()
            self.scheduler.pool.release(job.pages)
            _failed(job.done, RuntimeError(f"the step failed: {error}"))
        try:
            self.runner.reset()
        except Exception as again:
            error, self._failures = again, GIVE_UP
        if self._failures >= GIVE_UP:
            with self._wake:
                self._dead = error

    def _end(self, why):
        """Nobody is left waiting for an answer."""
        with self._wake:
            self._closed, sent, self._inbox = True, self._inbox, deque()
        for action, subject in sent:
            if action == self.scheduler.add or isinstance(subject, Scoring):
                action(subject)
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if self._dead is None:
                self.scheduler.abort(request)
            else:
                self.scheduler.fail(request, why)
        for job in self._scoring:
            _failed(job.done, EngineDead(why))


def _failed(future, error):
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
