"""What masks of guided decoding cost the host, without a model and without a GPU.

    python scripts/bench_masks.py [--vocabulary DIR] [--rows 64] [--threads 1 2 4 8] [--work masks steps turns]

masks: how long one mask takes a core, for several grammars: over all, and the longest of a step's --rows (which no
number of threads makes shorter).  steps: what Guide.allow takes on the clock, by threads (`all`, and `fill`, which is
llguidance's part), and for one thread what of a processor: `serial` is all but the masks, `together` all masks and
`longest` one of a step, `free` thousands of rows that need one.  turns: the engine's own loop over a device that only
waits: a free step of --step-ms, as one of a 1.8B model on an H200, and launches of --launch-ms and --draw-ms that let
other threads run; --fill-ms waits in the place of llguidance too, where this machine has fewer cores: so long for
masks that take long, a third of that for 64 others.

--vocabulary: a folder with a tokenizer; without it, words of random letters.  Answers are tokens drawn evenly from
what the masks allow.  Milliseconds; the lines with RESULT are JSON.
"""

import argparse
import json
import os
import queue
import tempfile
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import bench_guided
import numpy as np
import tiny_checkpoint
from llguidance import LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask

from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.engine.engine import Engine
from jaxserve.engine.guide import Guide
from jaxserve.engine.launch import InFlight
from jaxserve.engine.matchers import compiled
from jaxserve.engine.memory import make_plan
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.runner import Runner
from jaxserve.engine.sizes import Sizes
from jaxserve.text.grammar import from_regex, from_schema, token_table
from jaxserve.text.tokenizer import Tokenizer

VOCAB = 92544
ALONE = 0.15  # ms: waking the threads
LONG = 10  # one row in so many has a mask that takes long
ANSWER = {
    "type": "object",
    "properties": {
        "answer": {"type": "string"},
        "reasons": {"type": "array", "items": {"type": "string"}},
        "score": {"type": "number"},
    },
    "required": ["answer", "reasons", "score"],
    "additionalProperties": False,
}
RECORD = {
    "type": "object",
    "properties": {
        "when": {"type": "string", "format": "date-time"},
        "id": {"type": "string", "format": "uuid"},
        "ip": {"type": "string", "format": "ipv4"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
        "note": {"type": "string", "minLength": 5, "maxLength": 200},
    },
    "required": ["when", "id", "ip", "code", "note"],
    "additionalProperties": False,
}
GRAMMARS = {
    "person": from_schema(bench_guided.ENDLESS),
    "answer": from_schema({"type": "array", "items": ANSWER, "minItems": 10_000}),
    "record": from_schema({"type": "array", "items": RECORD, "minItems": 10_000}),
    "object": from_schema({"type": "object"}),
    "words": from_regex("([A-Z][a-z]{2,12} ){2,400}END"),
}


def vocabulary(folder):
    """The table of a folder's tokenizer, as wide as VOCAB."""
    if folder is None:
        return LLTokenizer(TokenizerWrapper(bench_guided.Words(VOCAB)))
    return token_table(Tokenizer.load(folder), VOCAB)


def matcher(table, grammar):
    return compiled(table, GRAMMARS[grammar])


def summary(seconds):
    mean, (half, most) = float(np.mean(seconds)), np.quantile(seconds, [0.5, 0.99])
    return {key: round(float(x) * 1e3, 3) for key, x in (("mean", mean), ("p50", half), ("p99", most))}


def drawn(mask, draw):
    """A token that a mask allows."""
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(draw.choice(allowed)) if len(allowed) else 0


def single(table, options):
    """Times of single masks, in seconds of a processor."""
    for grammar in GRAMMARS:
        began = time.thread_time()
        matcher(table, grammar)
        compiled, times = time.thread_time() - began, []

        rows, draw = [matcher(table, grammar) for _ in range(options.rows)], np.random.default_rng(0)
        masks = np.full((1, -(-VOCAB // 32)), -1, np.int32)
        for _ in range(options.steps):
            step = []
            for row, each in enumerate(rows):
                began = time.thread_time()
                fill_next_token_bitmask(each, masks, 0)
                step.append(time.thread_time() - began)
                if not each.consume_token(drawn(masks[0], draw)):
                    rows[row] = matcher(table, grammar)
            times.append(step)
        found = np.array(times)
        print("RESULT " + json.dumps(dict(
            work="masks", grammar=grammar, rows=options.rows, compile=round(compiled * 1e3, 2), one=summary(found),
            step=summary(found.sum(1)), longest=summary(found.max(1)),
        )), flush=True)  # fmt: skip


def steps(table, options):
    """What Guide.allow takes in a step, by threads, and the parts that no number of threads makes shorter."""
    for count in options.threads:
        guide, draw, times = Guide(table, VOCAB, count), np.random.default_rng(0), dict(all=[], fill=[])
        times |= dict(serial=[], longest=[], together=[], free=[]) if count == 1 else {}
        fill = guide._fill

        def timed(rows, masks, fill=fill, times=times):
            began = time.perf_counter()
            found = fill(rows, masks)
            times["fill"].append(time.perf_counter() - began)
            return found

        def single(rows, masks, times=times):
            each = [0.0]
            for row, request in rows:
                began = time.thread_time()
                fill_next_token_bitmask(request.matcher.matcher, masks, row)
                each.append(time.thread_time() - began)
            times["longest"].append(max(each))
            times["together"].append(sum(each))
            times["free"].append(len(rows) / 1e3)
            return []

        for alone in (False, True)[: 1 + (count == 1)]:
            guide._fill = single if alone else timed
            for _ in range(options.rounds):
                rows = [(i, Request([1], VOCAB, grammar=GRAMMARS[options.grammar])) for i in range(options.rows)]
                for _, request in rows:
                    request.matcher = guide.open(request)
                for _ in range(options.steps):
                    began, used = time.perf_counter(), time.thread_time()
                    masks, ended = guide.allow(rows, options.rows)
                    if alone:
                        times["serial"].append(time.thread_time() - used - times["together"][-1])
                    else:
                        times["all"].append(time.perf_counter() - began)
                    over = {request for request, _ in ended}
                    rows = [(row, request) for row, request in rows if request not in over]
                    for row, request in rows:
                        request.tokens.append(drawn(masks[row], draw))
                for _, request in rows:
                    request.finish = "length"
        print("RESULT " + json.dumps(dict(
            work="steps", grammar=options.grammar, threads=count, rows=options.rows,
            **{name: summary(found) for name, found in times.items()}, cores=os.cpu_count(),
        )), flush=True)  # fmt: skip


class Later:
    """An array that is there at a time that is not known yet."""

    def __init__(self, tokens):
        self.tokens, self.known, self.when = tokens, threading.Event(), 0.0

    def copy_to_host_async(self):
        pass

    def __array__(self, dtype=None, copy=None):
        self.known.wait()
        pause(self.when - time.perf_counter())
        return self.tokens


class HostGate:
    """engine.gate.Gate for a device that only waits."""

    def __init__(self, rows, words):
        self.masks, self.bound = np.zeros((rows, words), np.int32), np.zeros(rows, np.int32)
        self.opened, self.newest = {}, 0

    def next(self):
        self.newest += 1
        self.opened.pop(self.newest - 16, None)
        self.opened[self.newest] = threading.Event(), []
        return self.newest, self.newest

    def told(self, number, array):
        return None

    def open(self, number):
        event, when = self.opened[number]
        when.append(time.perf_counter())
        event.set()


class Waiting(Runner):
    """A runner whose device takes its time and returns the tokens of scripts."""

    def __init__(self, *arguments, options, scripts):
        super().__init__(*arguments)
        self.sizes, self.on_cpu = replace(Sizes.choose("gpu", self.plan), bursts=()), False
        self.options, self.scripts, self.state = options, scripts, True
        self.gate = HostGate(self.plan.lanes, self.mask_words)
        self.launched = queue.SimpleQueue()
        threading.Thread(target=self._device, daemon=True).start()

    def _device(self):
        """When what was launched is done: (time of the launch, milliseconds, number to wait for, array)."""
        free_at = 0.0
        while True:
            launched, milliseconds, number, array = self.launched.get()
            free_at = max(free_at, launched)
            if number is not None:
                event, when = self.gate.opened[number]
                event.wait()
                free_at = max(free_at, when[0])
            free_at += milliseconds / 1e3
            if array is not None:
                array.when = free_at
                array.known.set()

    def _sit(self, seats):
        for lane, who, _ in seats:
            self.seats.taken[lane] = who

    def _launch(self, launching, milliseconds, number=None, array=None):
        """Launches what the device takes so long for.

        Once launched it starts, even if this thread has to wait for the interpreter then.
        """
        self.launched.put((time.perf_counter() + launching / 1e3, milliseconds, number, array))
        time.sleep(launching / 1e3)

    def _drawn(self, packed):
        tokens = [self.scripts(c.request, c.stop - c.request.prompt_len) if c.emits else 0 for c in packed.chunks]
        return Later(np.array([tokens + [0] * (packed.shape.rows - len(tokens))], np.int32))

    def _forward(self, packed):
        more = max(0, packed.tokens - packed.shape.rows)
        return self.options.step_ms - self.options.draws_ms + more / self.options.prompt_rate

    def advance(self, packed):
        self._sit(packed.seats)
        self._launch(self.options.launch_ms, self._forward(packed))
        return packed, None

    def draw(self, half, number):
        tokens = self._drawn(half[0])
        self._launch(self.options.draw_ms, self.options.draws_ms, number, tokens)
        return InFlight(half[0], SimpleNamespace(tokens=tokens))

    def dispatch(self, packed, number=None):
        return self.draw(self.advance(packed), number)

    @property
    def intact(self):
        return True

    def reset(self):
        pass

    def release(self):
        pass


def pause(seconds):
    """Sleeps; other threads may run."""
    if seconds > 0:
        time.sleep(seconds)


def scripts(table, options):
    """A function (request, place) -> token: answers that follow the person schema, as many as there are rows."""
    made, rows = [[] for _ in range(options.rows)], [matcher(table, "person") for _ in range(options.rows)]
    draw, masks = np.random.default_rng(1), np.full((1, -(-VOCAB // 32)), -1, np.int32)
    for answer, each in zip(made, rows):
        for _ in range(options.tokens):
            fill_next_token_bitmask(each, masks, 0)
            answer.append(int(draw.choice(np.flatnonzero(np.unpackbits(masks.view(np.uint8)[0], bitorder="little")))))
            assert each.consume_token(answer[-1])
    return lambda request, place: made[int(request.id)][place]


def turns(table, options):
    """Tokens a second of the engine over the waiting device, free and bound."""
    hf = tiny_checkpoint.config("LlamaForCausalLM", vocab_size=VOCAB, hidden_size=8, max_position_embeddings=4096)
    config = EngineConfig(session_len=2048, max_batch_size=max(64, options.rows), enable_prefix_caching=False)
    config = EngineConfig(**vars(config) | dict(cache_max_entry_count=8000))
    with tempfile.TemporaryDirectory() as folder:
        tiny_checkpoint.write(folder, hf)
        held = loading.open_model(folder, config)
        plan = make_plan(held.cfg, config, list(held.mesh.devices.flat), 0, held.dtype)
    runner = Waiting(
        held.cfg, held.mesh, plan, held.dtype, held.shapes, options=options, scripts=scripts(table, options)
    )
    guide = Guide(table, VOCAB, options.threads[-1])
    if options.fill_ms is not None:

        def fill(rows, masks):
            long = [row for row, request in rows if int(request.id) % LONG == 0]
            others = [row for row, request in rows if int(request.id) % LONG]
            masks[others], masks[others, 0] = 0, 2
            pause(max(options.fill_ms if long else 0.0, ALONE + options.fill_ms * len(rows) / options.rows / 3) / 1e3)
            return []

        guide._fill = fill
    engine = Engine(runner, prefix_caching=False, guide=guide)
    pieces = bench_guided.Pieces()
    pieces.watch(engine)
    free = None
    for bound in [0, options.rows, 0, options.rows // 4, options.rows]:
        pieces.clear()
        rates = []
        for _ in range(options.rounds):
            ended = threading.Semaphore(0)
            outbox = SimpleNamespace(put=lambda output, ended=ended: ended.release() if output.finish else None)
            began = time.perf_counter()
            for i in range(options.rows):
                own = GRAMMARS["person"] if i * bound // options.rows < (i + 1) * bound // options.rows else None
                params = SamplingParams(temperature=1.0)
                engine.submit(Request([1 + i] * 128, options.tokens, params, outbox=outbox, id=str(i), grammar=own))
            for _ in range(options.rows):
                ended.acquire()
            rates.append(options.rows * options.tokens / (time.perf_counter() - began))
        rate = max(rates)
        free = max(free or 0, rate) if not bound else free
        print("RESULT " + json.dumps(dict(
            work="turns", bound=bound, rows=options.rows, tok_s=round(rate), step=round(options.rows / rate * 1e3, 3),
            cost=round(1 - rate / free, 3), rates=[round(r) for r in rates], pieces=pieces.summary(),
        )), flush=True)  # fmt: skip
    engine.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", help="folder with a tokenizer")
    works = dict(masks=single, steps=steps, turns=turns)
    parser.add_argument("--work", nargs="+", choices=works, default=list(works))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="tokens of an answer, for masks and steps")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer, for turns")
    parser.add_argument("--rounds", type=int, default=3, help="for steps, and for turns, of which the best counts")
    parser.add_argument("--grammar", choices=GRAMMARS, default="person", help="for steps")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--step-ms", type=float, default=2.4, help="a step on the device")
    parser.add_argument("--prompt-rate", type=float, default=180.0, help="prompt tokens that a step takes in a ms more")
    parser.add_argument("--draws-ms", type=float, default=0.3, help="the part of it that draws")
    parser.add_argument("--launch-ms", type=float, default=0.75, help="launching a forward, on the host")
    parser.add_argument("--draw-ms", type=float, default=0.5, help="launching what draws")
    parser.add_argument("--fill-ms", type=float, help="instead of filling masks")
    options = parser.parse_args()
    table = vocabulary(options.vocabulary)
    for name in options.work:
        works[name](table, options)


if __name__ == "__main__":
    main()
