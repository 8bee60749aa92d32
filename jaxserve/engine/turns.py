"""What the engine does with the device in a turn: plan, dispatch, and only then read what an earlier step produced."""

import logging
import time
from collections import deque

from jaxserve.engine import recovery
from jaxserve.engine.launch import InFlight
from jaxserve.sampling import NOTHING_LEFT

log = logging.getLogger("jaxserve")
GIVE_UP = 3  # failed steps in a row after which the engine stops
CAREFUL = 64  # steps of half the tokens after the device ran out of memory
LONG = 0.008  # seconds of a launch of several steps after which SINGLE launches have one each
SINGLE = 64
SHORT = 32  # tokens: steps so short that launching one takes as long as running it (a 1.8B model on an H200)
BOUND = 128  # tokens: the same of steps with masks, whose tokens go to the guide before they come to the next launch
NAN = "the model's logits were not numbers (NaN): the weights or the computation overflowed"
NONE_LEFT = "no token was left to choose: the grammar, the banned words and the biases exclude each other"


class Turns:
    """Steps of one engine, and what becomes of them; all of it on one thread."""

    def __init__(self, runner, scheduler, scorer, guide=None):
        """runner: compiled, with its weights.  guide: as for the Engine."""
        self.runner, self.scheduler, self.scorer, self.guide = runner, scheduler, scorer, guide
        self.pending: deque[InFlight] = deque()  # the steps in flight, oldest first
        self.ahead = 1 if runner.on_cpu else 2  # how many while the oldest is a short one; else one
        self.steps = self.launches = self.computed = self.dispatched = 0
        self.corrupted = self.failed_steps = self.recovered = 0
        self._undrawn: list[list] = []  # plans without tokens, the oldest first
        self._careful = 0  # launches for which the budget stays small
        self._single = 0  # launches that have one step each, for those with several take long
        self._last_read = 0.0  # when a step was read
        self._failures = 0

    @property
    def busy(self):
        """Whether there is something to do."""
        return not self.scheduler.idle or self.pending or self.scorer.busy

    def stats(self):
        """Counts since the start."""
        return {
            "steps": self.steps,
            "launches": self.launches,  # of one step or several
            "step_tokens": self.computed,
            "step_tokens_padded": self.dispatched,
            "corrupted": self.corrupted,  # requests that failed for NaN
            "failed_steps": self.failed_steps,
            "recovered": self.recovered,  # requests that went on after a step was lost
        }

    def turn(self):
        """One turn.  The device works on the new step while the host reads the old one."""
        self.scorer.admit()
        chunks = self.scheduler.plan(self._steps())
        packed = self._pack(chunks) if chunks else None
        launched = packed is not None and self._launch(packed)
        # Steps that take the device less time than the host takes to launch one need a second on its way.
        newest = self.pending[-1] if self.pending else None
        short = newest and newest.steps == 1 and newest.padded <= (SHORT if newest.masks is None else BOUND)
        ahead = self.ahead if short else 1
        # Without a plan one step is read all the same: it may be what the next plan waits for.
        for _ in range(max(0, len(self.pending) - ahead) if launched else min(1, len(self.pending))):
            self._read()
        self._score()

    def _steps(self):
        """Steps that the next launch may have."""
        if self._single or self.scorer.busy:
            return 1
        return self.runner.sizes.steps(len(self.scheduler.running))

    def _pack(self, chunks):
        """The plan as an array; None where requests could not be packed: they have failed, the plan is taken back."""
        self._undrawn.append(chunks)
        guided = []
        if self.guide is not None:
            guided = [(row, c.request) for row, c in enumerate(chunks) if c.emits and c.request.grammar is not None]
        try:
            return self.runner.pack(chunks, guided)
        except Exception:
            guilty = {}
            for chunk in chunks:
                try:
                    self.runner.pack([chunk], guided)
                except Exception as own:
                    guilty[chunk.request] = own
            if not guilty:
                raise
            log.exception("%d requests could not be packed", len(guilty))
        recovery.undo(self.scheduler, [self._undrawn.pop()])
        for request, error in guilty.items():
            self.fail(request, f"the request could not be computed: {error}")
        return None

    def _launch(self, packed):
        """Starts a step.  False if nobody wants it any more."""
        if all(chunk.request.finish for chunk in packed.chunks):
            self._undrawn.pop()
            return False
        if not packed.guided:
            self._launched(self.runner.dispatch(packed))
        elif self.runner.gate is not None:
            masks = self.guide.start(packed.guided, list(self.pending), self.runner.gate)
            step = self.runner.dispatch(packed, masks.ticket)
            step.masks = masks
            self._launched(step)
        else:
            return self._by_halves(packed)
        return True

    def _by_halves(self, packed):
        """A step with guided rows where the device cannot wait: masks are made between its halves, once all that
        came before is known.  False if nobody wants it any more."""
        half = self.runner.advance(packed)
        while self.pending:
            self._read()
        masks = self._masks(packed.guided, packed.shape.drawn)
        if all(chunk.request.finish for chunk in packed.chunks):
            self._undrawn.pop()
            return False
        self._launched(self.runner.draw(half, masks))
        return True

    def _launched(self, step):
        self._undrawn.pop()
        self.pending.append(step)
        self.launches += 1
        self.steps += step.steps
        self.computed += step.tokens
        self.dispatched += step.padded
        self._single = max(0, self._single - 1)
        if self._careful:
            self._careful -= 1
            if not self._careful:
                self.scheduler.budget = self.runner.plan.budget

    def _masks(self, guided, rows):
        """What each row may draw; None: everything.  Answers that are complete or stuck end here."""
        guided = [(row, request) for row, request in guided if not request.finish]
        try:
            masks, ended = self.guide.allow(guided, rows)
        except Exception as error:
            log.exception("masks could not be made")
            masks, ended = None, [(request, f"no mask could be made: {error}") for _, request in guided]
        self._ended(ended)
        return masks

    def _ended(self, ended):
        """Ends requests whose answers are complete, or cannot go on for a reason."""
        for request, why in ended:
            if request.finish:
                continue
            if why:
                self.fail(request, f"the answer cannot follow its grammar: {why}")
            else:
                recovery.safely(recovery.complete, self.scheduler, request)

    def _read(self):
        """Records what the oldest step in flight drew, once it is done."""
        step = self.pending.popleft()
        if self.pending and self.pending[0].masks is not None:
            # The guide first: the device waits for it, and would wait for whatever Python code runs here meanwhile.
            self.pending[0].masks.followed.wait()
        try:
            told = step.read()
        except Exception:
            self.runner.state = None  # what it left there is of no use
            self._undrawn.insert(0, step.chunks)
            raise
        self._failures = 0
        now = time.perf_counter()
        if step.steps > 1 and now - max(step.began, self._last_read) > LONG:
            self._single = SINGLE
        self._last_read = now
        if step.masks is not None:
            self._ended(step.masks.ended)
        for i, (tokens, logprobs, tops) in enumerate(told):
            if min(tokens, default=0) < 0:
                for chunk, token in zip(step.chunks, tokens):
                    if token < 0 and chunk.emits > i and not chunk.request.finish:
                        self.corrupted += token != NOTHING_LEFT
                        self.fail(chunk.request, NONE_LEFT if token == NOTHING_LEFT else NAN)
            recovery.commit(self.scheduler, step.chunks, tokens, logprobs, tops, i)

    def fail(self, request, message):
        recovery.safely(self.scheduler.fail, request, message)

    def recover(self, error):
        """After a failed step: where the device has its state, only that plan is taken back; else all starts over.

        What fails twice in a row is laid to the requests of that step, which end; three times, and this says False.
        """
        self._failures += 1
        self.failed_steps += 1
        plans, self._undrawn = self._undrawn, []
        full = "RESOURCE_EXHAUSTED" in str(error)
        message = "overloaded: the device ran out of memory" if full else f"the step failed: {error}"
        guilty = {chunk.request for plan in plans for chunk in plan} if self._failures > 1 else set()
        if full:  # the newest, and smaller steps for a while
            guilty = set(sorted(guilty, key=lambda request: request.arrival)[len(guilty) // 2 :])
            self.scheduler.budget = max(self.runner.plan.lanes, self.scheduler.budget // 2)
            self._careful = CAREFUL
        failures = self._failures
        if plans and self.runner.intact and self._drain():
            self._failures = failures  # of steps that were launched before
            recovery.undo(self.scheduler, plans)
            for request in guilty:
                self.fail(request, message)
        else:
            self._start_over(message, guilty)
        return self._failures < GIVE_UP

    def _drain(self):
        """Reads all steps in flight; False if one of them failed, too."""
        try:
            while self.pending:
                self._read()
        except Exception:
            log.exception("a step failed")
            return False
        return True

    def _start_over(self, message, guilty):
        """With an empty cache."""
        self.pending.clear()
        self._undrawn.clear()
        try:
            self.recovered += recovery.restart(self.scheduler, message, guilty)
            self.scorer.restart(RuntimeError(message))
            self.runner.reset()
        except Exception:
            log.exception("the engine could not start over")
            self._failures = GIVE_UP

    def _score(self):
        """The scoring jobs' part of a turn; what fails there is theirs alone, as long as the device has its state."""
        try:
            if self.scorer.turn():
                self._failures = 0
        except Exception as error:
            log.exception("scoring failed")
            self.scorer.restart(RuntimeError(f"scoring failed: {error}"))
            if not self.runner.intact:
                raise
