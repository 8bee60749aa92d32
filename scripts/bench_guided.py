"""Times generation with none, some and all requests bound to a JSON schema: what guided decoding costs, and where.

    python scripts/bench_guided.py --model DIR [--clients 64] [--bound 16 64] [--tokens 256] [--threads 4 8]

Each round runs the same requests free, then bound; the figures are medians of the rounds, the last line is JSON.
The check: every request has its number of tokens, and every bound answer follows its grammar.  A checkpoint without
a tokenizer (random weights) gets words of random letters as its vocabulary.

The pieces are milliseconds a step with bound rows, mean and 99th percentile.  `made` is the guide's thread, all of a
step; of it `token` waits for the device: as long as this is not next to nothing, the device sets the pace.  Then come
`next` (what each row has to follow), `follow` (matchers are told the tokens), `fill`
(llguidance, on --threads threads); `masks` is the last two, and ends of answers.
`late`, made without token, is what must fit into a forward of the device, which waits for the masks before it draws.
On the engine's thread: `plan`, `pack`, `launch`, `record` (waits for a step, then tokens to their outboxes); `turn` is
all of a turn.
"""

import argparse
import json
import os
import random
import statistics
import string
import sys
import time

import bench_offline
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from jaxserve import checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.engine.guide import Guide
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.text.grammar import from_schema, token_table
from jaxserve.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z]{3,12}@[a-z]{3,12}\\.(com|org|net)$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue", "black"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "number": {"type": "number"}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "tags", "address", "member"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 10_000}  # longer than any answer here


class Words:
    """A vocabulary of a given size: bytes, digits, pieces of JSON, and words of random letters."""

    def __init__(self, size):
        draw = random.Random(0)
        pieces = [bytes([i]) for i in range(256)] + [str(i).encode() for i in range(10, 1000)]
        pieces += [b'":', b'",', b'"}', b'","', b'":"', b"},", b'{"', b"true", b"false", b"], ", b"  ", b"\n  "]
        known = set(pieces)
        while len(known) < size - 1:
            length = draw.randint(2, 9)
            word = draw.choice(["", " ", " "]) + "".join(draw.choice(string.ascii_lowercase) for _ in range(length))
            if word.encode() not in known:
                known.add(word.encode())
                pieces.append(word.encode())
        self.tokens = [*pieces[: size - 1], b"<end>"]
        self.eos_token_id, self.bos_token_id, self.special_token_ids = size - 1, None, [size - 1]

    def __call__(self, text):
        return list(text)


def table(model, vocab):
    """The vocabulary of a checkpoint, or of a folder with a tokenizer."""
    if not os.path.exists(os.path.join(model, "config.json")):
        return token_table(Tokenizer.load(model), vocab)
    with checkpoint.open(model) as source:
        try:
            return token_table(Tokenizer.load(source), vocab)
        except ValueError as error:
            print(f"words of random letters, because {error}", file=sys.stderr)
            return LLTokenizer(TokenizerWrapper(Words(vocab)))


class Pieces:
    """Durations of methods, by name."""

    def __init__(self):
        self.seconds = {}

    def time(self, owner, name, label):
        """Times a method from now on."""
        method, found = getattr(owner, name), self.seconds.setdefault(label, [])

        def timed(*arguments):
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                found.append(time.perf_counter() - began)

        setattr(owner, name, timed)

    def watch(self, engine):
        """Times an engine's guided steps."""
        guide, runner = engine.guide, engine.runner
        for owner, name, label in (
            (guide, "_made", "made"), (guide, "_next", "next"), (guide, "_follow", "follow"),
            (guide, "_fill", "fill"), (guide, "_masks", "masks"),
            (runner, "dispatch", "launch"), (engine.turns, "_read", "record"),
            (engine.scheduler, "plan", "plan"), (runner, "pack", "pack"), (engine.turns, "turn", "turn"),
        ):  # fmt: skip
            self.time(owner, name, label)
        made = guide._made

        def timed(job):
            def come(steps):
                yield from steps
                waited.append(time.perf_counter() - began)

            waited, began, job.before = [], time.perf_counter(), come(job.before)
            made(job)
            self.seconds.setdefault("token", []).extend(waited)
            self.seconds.setdefault("late", []).append(time.perf_counter() - began - sum(waited))

        guide._made = timed

    def clear(self):
        for found in self.seconds.values():
            found.clear()

    def summary(self):
        """{name: (mean, 99th percentile)} in milliseconds."""
        return {
            label: (round(statistics.fmean(found) * 1e3, 3), round(sorted(found)[len(found) * 99 // 100] * 1e3, 3))
            for label, found in self.seconds.items()
            if found
        }


def run(engine, options, grammar, bound):
    """(seconds, a Collector for each request), all open at once; `bound` of them, spread evenly, have the grammar."""
    ended, out = bench_offline.queue.SimpleQueue(), []
    draw = random.Random(1)
    began = time.perf_counter()
    for i in range(options.clients):
        prompt = [draw.randrange(engine.config.vocab) for _ in range(options.prompt)]
        out.append(bench_offline.Collector(ended))
        out[-1].bound = (i + 1) * bound // options.clients > i * bound // options.clients
        params = SamplingParams(temperature=options.temperature, seed=i)
        own = grammar if out[-1].bound else None
        engine.submit(Request(prompt, options.tokens, params, outbox=out[-1], grammar=own))
    for _ in out:
        ended.get()
    return time.perf_counter() - began, out


def wrong(collectors, grammar, vocabulary, tokens):
    """Answers that are short, or do not follow the grammar."""
    count = 0
    for collector in collectors:
        follows = True
        if collector.bound:
            follows = len(collector.tokens) == LLMatcher(vocabulary, grammar).validate_tokens(collector.tokens)
        count += not follows or len(collector.tokens) != tokens
    return count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--clients", type=int, default=64, help="requests at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--session-len", type=int, default=4096)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--bound", type=int, nargs="+", help="requests that are bound; default a quarter, and all")
    parser.add_argument("--vocabulary", help="folder with a tokenizer, instead of the checkpoint's")
    parser.add_argument("--threads", type=int, nargs="+", help="that fill masks (default: as the engine does)")
    options = parser.parse_args()
    try:
        config = EngineConfig(
            tp=options.tp,
            session_len=options.session_len,
            max_batch_size=options.max_batch_size,
            enable_prefix_caching=False,
        )
        with checkpoint.open(options.model) as source:
            vocab = loading.model_config(source, config).vocab
        vocabulary, grammar = table(options.vocabulary or options.model, vocab), from_schema(ENDLESS)
        began = time.perf_counter()
        engine = loading.load(options.model, config, print_progress, guide=vocabulary)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ready, name = time.perf_counter() - began, os.path.basename(options.model.rstrip("/"))
    ways = options.bound or [max(1, options.clients // 4), options.clients]
    free = None
    for threads in options.threads or [None]:
        if threads is not None:
            engine.guide.close()
            engine.turns.guide = Guide(vocabulary, engine.runner.vocab, threads)
        pieces = Pieces()
        pieces.watch(engine)
        for way in [0, *ways] if free is None else ways:
            run(engine, options, grammar, way)  # once, not counted
            pieces.clear()
            walls, mistakes = [], 0
            for _ in range(options.rounds):
                wall, out = run(engine, options, grammar, way)
                walls.append(wall)
                mistakes += wrong(out, grammar, vocabulary, options.tokens)
            speed = options.clients * options.tokens / statistics.median(walls)
            free = free or speed
            figures = dict(
                model=name, clients=options.clients, bound=way, vocab=vocab, tok_s=round(speed, 1),
                cost=round(1 - speed / free, 4), wrong=mistakes, pieces=pieces.summary(), ready_s=round(ready, 1),
                tp=options.tp, threads=threads, cores=os.cpu_count(),
            )  # fmt: skip
            print(
                f"{name}, {way} of {options.clients} bound, {threads or 'default'} threads: {speed:,.0f} tokens/s "
                f"({figures['cost']:.1%} less), {mistakes} wrong; ms a step, mean and p99: "
                + ", ".join(f"{label} {mean} {most}" for label, (mean, most) in figures["pieces"].items()),
                file=sys.stderr,
            )
            print("RESULT " + json.dumps(figures), flush=True)
    engine.close()


def print_progress(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
