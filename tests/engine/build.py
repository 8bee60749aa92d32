"""Engines over tiny random checkpoints, for tests."""

import ctypes
import queue
import time

import jax
import llguidance
import numpy as np

from jaxserve import ops
from jaxserve.config import EngineConfig
from jaxserve.engine import loading
from jaxserve.engine.request import Request, SamplingParams
from jaxserve.engine.sizes import Sizes
from scripts import tiny_checkpoint

VOCAB = 97
HF = tiny_checkpoint.config(
    "LlamaForCausalLM", num_attention_heads=6, num_key_value_heads=3
)  # heads that no tp divides


def engine(folder, guide=None, **knobs):
    """An engine with pages of 4 tokens, steps of 16, four lanes; guide: see loading.load."""
    knobs = (
        dict(
            max_batch_size=4, num_tokens_per_iter=16, cache_block_seq_len=4, session_len=100, cache_max_entry_count=150
        )
        | knobs
    )
    return loading.load(str(folder), EngineConfig(**knobs), guide=guide)


EOS = 2
# What the tokens of the tiny vocabulary stand for: the printable characters, and a few that are longer.
BYTES = [b" ", b'","', b"", *(bytes([c]) for c in range(33, 126)), b'":']


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, (EOS,)
    tokens = tuple(text or b"<end>" for text in BYTES)

    def __call__(self, text):
        return [BYTES.index(bytes([c])) for c in text]


def table():
    """The tiny vocabulary for llguidance."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary()))


def text(tokens):
    """What tokens stand for."""
    return b"".join(BYTES[token] for token in tokens).decode()


def like_a_gpu(monkeypatch):
    """Engines made from now on have the sizes of programs that they would have on a GPU."""
    choose = Sizes.choose
    monkeypatch.setattr(Sizes, "choose", lambda platform, *given: choose("gpu", *given))


def waits(monkeypatch):
    """Engines made from now on are like a GPU's, and their steps wait at the gate: a callback does it on the CPU."""

    def await_masks(ticket, logits):
        rows, words = logits.shape[0], -(-logits.shape[1] // 32)

        def wait(ticket, after):
            address, number, begin = int(ticket[1]) << 31 | int(ticket[0]), int(ticket[2]), int(ticket[3])
            size = begin + rows * words
            memory = np.ctypeslib.as_array((ctypes.c_int32 * size).from_address(address))
            deadline = time.monotonic() + int(ticket[4]) / 1e3
            while number != ops.waiting.FREE and not ops.waiting.is_open(memory[0], number):
                if time.monotonic() > deadline:
                    break
                time.sleep(1e-4)
            bound, masks = memory[ops.waiting.HEAD :][:rows], memory[begin:].reshape(rows, words)
            return np.asarray(ops.waiting.await_masks_reference(ticket, memory[0], bound, masks, rows=rows))

        return jax.pure_callback(wait, jax.ShapeDtypeStruct((rows, words), np.int32), ticket, logits[0, 0])

    def tell(ticket, tokens):
        def write(ticket, tokens):
            address, number, at = int(ticket[1]) << 31 | int(ticket[0]), int(ticket[2]), int(ticket[5])
            memory = np.ctypeslib.as_array((ctypes.c_int32 * (at + len(tokens))).from_address(address))
            if number != ops.waiting.FREE:
                memory[at:], memory[ops.waiting.TOLD] = tokens, number
            return np.asarray(tokens)

        return jax.pure_callback(write, tokens, ticket, tokens)

    like_a_gpu(monkeypatch)
    monkeypatch.setattr(ops, "waits", lambda: True)
    monkeypatch.setattr(ops, "await_masks", await_masks)
    monkeypatch.setattr(ops, "tell", tell)


GREEDY = SamplingParams()


class Answer(queue.SimpleQueue):
    """An outbox that can be waited on."""

    def __init__(self, request):
        super().__init__()
        self.request, self.outputs, request.outbox = request, [], self

    def wait(self, timeout=60):
        """The tokens, once the request has ended."""
        while not (self.outputs and self.outputs[-1].finish):
            self.outputs.append(self.get(timeout=timeout))
        return [o.token for o in self.outputs if o.token is not None]

    @property
    def finish(self):
        return self.outputs[-1].finish


def submit(engine, tokens, count, params=GREEDY, **fields):
    request = Request(list(tokens), count, params, **fields)
    answer = Answer(request)
    engine.submit(request)
    return answer


def run(engine, requests, params=GREEDY, **fields):
    """The tokens of each of [(prompt, count)], all submitted at once."""
    return [a.wait() for a in [submit(engine, tokens, count, params, **fields) for tokens, count in requests]]
