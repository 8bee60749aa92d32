"""Times generation with none and with all requests bound to a JSON schema: what guided decoding costs.

    python scripts/bench_guided.py --model DIR [--clients 64] [--tokens 256]

Each round runs the same requests free, then bound; the figures are medians of the rounds, the last line is JSON.
`masks` is the host's part of a step: following the tokens and filling the masks, most of it beside the forward pass.
The check: every request has its number of tokens, and every bound answer follows its grammar.  A checkpoint without
a tokenizer (random weights) gets words of random letters as its vocabulary.
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
    """The vocabulary of a checkpoint."""
    with checkpoint.open(model) as source:
        try:
            return token_table(Tokenizer.load(source), vocab)
        except ValueError as error:
            print(f"words of random letters, because {error}", file=sys.stderr)
            return LLTokenizer(TokenizerWrapper(Words(vocab)))


def run(engine, options, grammar):
    """(seconds, a Collector for each request), all open at once."""
    ended, out = bench_offline.queue.SimpleQueue(), []
    draw = random.Random(1)
    began = time.perf_counter()
    for i in range(options.clients):
        prompt = [draw.randrange(engine.config.vocab) for _ in range(options.prompt)]
        out.append(bench_offline.Collector(ended))
        params = SamplingParams(temperature=options.temperature, seed=i)
        engine.submit(Request(prompt, options.tokens, params, outbox=out[-1], grammar=grammar))
    for _ in out:
        ended.get()
    return time.perf_counter() - began, out


def wrong(collectors, grammar, vocabulary, tokens):
    """Answers that are short, or do not follow the grammar."""
    count = 0
    for collector in collectors:
        matcher = LLMatcher(vocabulary, grammar)
        follows = len(collector.tokens) == matcher.validate_tokens(collector.tokens)
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
    options = parser.parse_args()
    config = EngineConfig(
        tp=options.tp,
        session_len=options.session_len,
        max_batch_size=options.max_batch_size,
        enable_prefix_caching=False,
    )
    with checkpoint.open(options.model) as source:
        vocab = loading.model_config(source, config).vocab
    vocabulary, grammar = table(options.model, vocab), from_schema(ENDLESS)
    began = time.perf_counter()
    engine = loading.load(options.model, config, print_progress, guide=vocabulary)
    ready = time.perf_counter() - began
    masks, allow = [], engine.guide.allow

    def timed(*rows):
        started = time.perf_counter()
        try:
            return allow(*rows)
        finally:
            masks.append(time.perf_counter() - started)

    engine.guide.allow = timed
    walls = {None: [], grammar: []}
    for way in walls:  # once, not counted
        run(engine, options, way)
    masks.clear()
    mistakes = 0
    for _ in range(options.rounds):
        for way, seconds in walls.items():
            wall, out = run(engine, options, way)
            seconds.append(wall)
            if way:
                mistakes += wrong(out, grammar, vocabulary, options.tokens)
    engine.close()
    free, bound = (options.clients * options.tokens / statistics.median(seconds) for seconds in walls.values())
    masks.sort()
    figures = dict(
        model=os.path.basename(options.model.rstrip("/")), clients=options.clients, vocab=vocab,
        free_tok_s=round(free, 1), bound_tok_s=round(bound, 1), cost=round(1 - bound / free, 4),
        masks_ms_p50=round(masks[len(masks) // 2] * 1e3, 3), masks_ms_p99=round(masks[len(masks) * 99 // 100] * 1e3, 3),
        wrong=mistakes, ready_s=round(ready, 1), tp=options.tp, cores=os.cpu_count(),
    )  # fmt: skip
    print(
        f"{figures['model']}, {options.clients} requests: {free:,.0f} tokens/s free, {bound:,.0f} bound to a schema "
        f"({figures['cost']:.1%} less); masks {figures['masks_ms_p50']} ms a step, p99 {figures['masks_ms_p99']}; "
        f"{mistakes} wrong",
        file=sys.stderr,
    )
    print("RESULT " + json.dumps(figures), flush=True)


def print_progress(text):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
