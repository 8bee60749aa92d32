"""Requests from any thread, and the thread that owns the device: turns, as long as there is something to do."""

import gc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jaxserve.engine import recovery
from jaxserve.engine.pages import PagePool
from jaxserve.engine.request import EngineDead, Output, Overloaded
from jaxserve.engine.scheduler import Scheduler
from jaxserve.engine.scoring import WANTS, Job, Scorer
from jaxserve.engine.turns import Turns

__all__ = ["Engine", "EngineDead", "Overloaded"]

log = logging.getLogger("jaxserve")
_settled: set["Engine"] = set()  # as long as there are any, Python looks for no garbage among what they began with
_settling = threading.Lock()


class Engine:
    """Takes requests from any thread and answers through their outboxes.

    `engine.loading.load(...)` builds one from a checkpoint.
    """

    # Of the model; set by `load`.
    path: Any
    config: Any  # ModelConfig
    plan: Any  # MemoryPlan
    dtype: str
    checkpoint_config: dict
    generation_config: dict

    def __init__(self, runner, *, prefix_caching=True, rope_original=None, guide=None):
        """runner: compiled, with its weights.

        rope_original: the length past which a prompt stretches its rotations (dynamic NTK).  guide: an
        engine.guide.Guide, where requests may have grammars; the runner is compiled for it.
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
            costs=runner.costs,
        )
        self.scorer = Scorer(runner, self.scheduler)
        self.turns = Turns(runner, self.scheduler, self.scorer, guide)
        self.info: dict[str, Any] = {}  # plain data about the model
        self.on_turn: list[Callable] = []  # called on the engine's thread when a turn's tokens are in their outboxes
        self.busy = 0.0  # seconds of turns
        self._arrivals = itertools.count(1)
        self._inbox: deque[tuple] = deque()
        self._wake = threading.Condition()
        self._closed, self._dead = False, None
        self._thread = threading.Thread(target=self._loop, name="jaxserve-engine", daemon=True)
        self._thread.start()

    # From any thread ------------------------------------------------------------------------------------------------

    def submit(self, request):
        """Queues a request; its outbox gets an Output a token.  ValueError if it can never be served."""
        self._check_ids(request.tokens)
        self.scheduler.check(request)
        self.runner.check(request)
        if request.grammar is not None:
            if self.guide is None:
                raise ValueError("this engine was started without guided decoding")
            request.matcher = self.guide.open(request)
        if self.rope_original is not None and request.prompt_len > self.rope_original:
            request.salt = (request.salt, "rope", request.prompt_len)  # its keys are rotated as no other length's
        self._send(self._add, request)

    def abort(self, request):
        """Ends a request wherever it is, and frees what it holds; an engine that stops ends all by itself."""
        with suppress(EngineDead):
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
        room = (self.scheduler.pool.count - 1) * self.scheduler.pool.size
        if not 1 <= len(tokens) <= min(self.session_len, room):
            raise ValueError(f"a sequence to score has 1 to {min(self.session_len, room)} tokens, not {len(tokens)}")
        self._check_ids(tokens)
        job = Job(list(tokens), want)
        self._send(self._add_job, job)
        return job.done

    def _check_ids(self, tokens):
        vocab, least, most = self.runner.cfg.vocab, min(tokens), max(tokens)
        if least < 0 or most >= vocab:  # on the device -1 stands for what its neighbour in the batch sampled
            raise ValueError(f"token ids of this model are 0 to {vocab - 1}, not {least if least < 0 else most}")

    def stats(self):
        """Counts of requests, pages and tokens at this moment, and of steps since the start."""
        scored = {"scoring": self.scorer.jobs, "scored_tokens": self.scorer.tokens}
        return self.scheduler.stats() | self.turns.stats() | scored | {"busy_s": self.busy}

    def settle(self):
        """What was made until now stays until all engines are closed.

        Python would look through all of it again and again, and no step starts meanwhile.
        """
        gc.collect()
        with _settling:
            _settled.add(self)
            gc.freeze()

    def close(self):
        """Stops the loop and frees the device; requests that still run are aborted.  Closing twice is fine."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self.runner.release()
            with _settling:
                if self in _settled:
                    _settled.remove(self)
                    if not _settled:
                        gc.unfreeze()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def guide(self):
        """The engine.guide.Guide, or None."""
        return self.turns.guide

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
                self.turns.turn()
            except Exception as error:
                log.exception("a step failed")
                if not self._recover(error):
                    with self._wake:
                        self._dead = error
            self._told()
            self.busy += time.perf_counter() - began
        self._end("the engine was closed" if self._dead is None else f"the engine has stopped: {self._dead}")
        self._told()

    def _recover(self, error):
        try:
            return self.turns.recover(error)
        except Exception:
            log.exception("the engine could not recover")
            return False

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
            while not (self._inbox or self._closed or self._dead or self.turns.busy):
                self._wake.wait()
            sent, self._inbox = self._inbox, deque()
        for action, subject in sent:
            try:
                action(subject)
            except Exception as error:
                if not isinstance(error, ValueError):
                    log.exception("a request could not be taken or ended")
                self._refuse(subject, str(error))
        return not (self._closed or self._dead)

    def _add(self, request):
        request.arrival = next(self._arrivals)
        self.scheduler.add(request)

    def _add_job(self, job):
        job.arrival = next(self._arrivals)
        self.scorer.waiting.append(job)

    def _refuse(self, request, message):
        try:
            request.finish = request.finish or "error"
            request.outbox.put(Output(None, "error", error=message))
        except Exception:
            log.exception("the outbox of a request failed")

    def _end(self, why):
        """Nobody is left waiting for an answer."""
        with self._wake:
            self._closed, sent, self._inbox = True, self._inbox, deque()
        for action, subject in sent:
            if action in (self._add, self._add_job):
                recovery.safely(action, subject)
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if self._dead is None:
                recovery.safely(self.scheduler.abort, request)
            else:
                self.turns.fail(request, why)
        self.scorer.close(EngineDead(why))
        if self.guide is not None:
            self.guide.close()
