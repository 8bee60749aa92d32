"""An engine without a model: it answers at once, or slowly, with a text that depends on the prompt alone.

The vocabulary is the 256 bytes and a few special tokens.
`python -m tests.fake_engine ARGUMENTS` is `jaxserve ARGUMENTS` on it.
"""

import os
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxserve.engine.engine import EngineDead
from jaxserve.engine.request import Output
from jaxserve.pipeline import Pipeline
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import BYTE_CHARACTERS, Tokenizer

USER, END = "<|user|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'][0] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def tokenizer():
    characters = {byte: chr(character) for character, byte in BYTE_CHARACTERS.items() if byte < 256}
    core = tokenizers.Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(text, special=True, normalized=False) for text in (USER, END)])
    return Tokenizer(core, {"eos_token": END}, templates={"default": TEMPLATE})


def echo(text):
    """What the model says: how often it was asked, and the last question."""
    turns = text.split(USER)
    question = turns[-2].removesuffix(END).partition(":")[2] if len(turns) > 1 else text
    return f"answer {text.count(USER + 'u')}: {question}"


class FakeEngine:
    """The members of jaxserve.engine.engine.Engine that a pipeline uses."""

    def __init__(self, *, session_len=256, max_batch_size=4, delay=0.0, say=echo, generation_config=None, breaks=True):
        """breaks: prompts with the ids 0, 1 and 2 can never be served, fail a step, or end the engine."""
        self.tokenizer = tokenizer()
        self.session_len, self.max_batch_size = session_len, max_batch_size
        self.delay, self.say, self.breaks = delay, say, breaks
        self.config = SimpleNamespace(vocab=self.tokenizer.vocab_size)
        self.path = Path("/models/fake-1b")
        self.generation_config = generation_config or {}
        self.on_turn = []
        self.aborted, self.submitted = [], []
        self.most = 0  # requests that were there at once
        self._live = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, request):
        if self.breaks and 0 in request.tokens:
            raise ValueError("it never fits")
        with self._wake:
            if self._closed:
                raise EngineDead("the engine is closed")
            self.submitted.append(request)
            self._live.append((request, deque(self._answer(request))))
            self.most = max(self.most, len(self._live))
            self._wake.notify()

    def _answer(self, request):
        eos = self.tokenizer.eos_id
        text = self.say(self.tokenizer.decode(request.tokens, skip_special=False))
        if not request.params.plain:
            text += f" (seed {request.params.seed})"
        return [*self.tokenizer.encode(text), eos] if eos in request.stop_ids else self.tokenizer.encode(text)

    def abort(self, request):
        with self._wake:
            if not request.finish:
                request.finish = "abort"
                self.aborted.append(request)
                self._wake.notify()

    def _loop(self):
        while True:
            with self._wake:
                while not self._live and not self._closed:
                    self._wake.wait()
                if self._closed:
                    self._live.clear()
                    return
                batch = list(self._live)
                batch = batch[: self.max_batch_size] + [e for e in batch[self.max_batch_size :] if e[0].finish]
            time.sleep(self.delay)
            for entry in batch:
                self._turn(*entry, entry)

    def _turn(self, request, answer, entry):
        if self.breaks and 1 in request.tokens:  # a step that fails
            request.finish = "error"
            output = Output(None, "error", error="the step failed")
        elif self.breaks and 2 in request.tokens:  # one too many
            self._closed, request.finish = True, "error"
            output = Output(None, "error", error="the engine has stopped")
        elif request.finish is None:
            token = answer[0]
            answer.rotate(-1)  # what has no end begins again
            request.tokens.append(token)
            if token in request.stop_ids:
                request.finish = "stop"
            elif len(request.output) >= request.max_new_tokens:
                request.finish = "length"
            logprob = None if request.params.logprobs is None else -0.5
            top = tuple((token + i, -0.5 - i) for i in range(request.params.logprobs or 0))
            output = Output(token, request.finish, logprob, top)
        else:
            output = Output(None, request.finish)
        if request.finish:
            with self._wake:
                self._live.remove(entry)
        request.outbox.put(output)

    @property
    def alive(self):
        return not self._closed

    @property
    def info(self):
        return {
            "path": str(self.path),
            "session_len": self.session_len,
            "max_batch_size": self.max_batch_size,
            "vocab": self.config.vocab,
            "width": 8,
            "dtype": "float32",
            "checkpoint_config": {},
            "generation_config": self.generation_config,
            "cache_tokens": 4096,
            "version": "0",
        }

    def score(self, tokens, want="logprobs"):
        import numpy as np

        logprobs = -np.asarray(tokens[1:], np.float32)
        if want == "logprobs":
            return logprobs
        if want == "alternatives":  # the token itself, then those with the ids above it
            steps = np.arange(20)
            return logprobs, (np.asarray(tokens[1:])[:, None] + steps) % self.config.vocab, logprobs[:, None] - steps
        return np.repeat(np.asarray(tokens, np.float32)[:, None], self.config.vocab, 1)

    def score_async(self, tokens, want="logprobs"):
        future = Future()
        future.set_result(self.score(tokens, want))
        return future

    def stats(self):
        return {"running": len(self._live), "pages_used": 3, "pages_cached": 1, "pages_free": 7}

    def close(self):
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()


def pipeline(model=None, config=None, template=None, log_level="WARNING", *, report=print, **options):
    """In the place of jaxserve.pipeline.pipeline; $FAKE_DELAY is the time of a step in seconds."""
    options.pop("show_progress", None)
    engine = FakeEngine(session_len=config.session_len or 256, delay=float(os.environ.get("FAKE_DELAY", 0)))
    report("the memory plan")
    chat_template = ChatTemplate.for_model({}, engine.tokenizer, template, **options)
    return Pipeline(engine, engine.tokenizer, chat_template, config.seed)


def make(**settings):
    engine = FakeEngine(**settings)
    return Pipeline(engine, engine.tokenizer, ChatTemplate.for_model({}, engine.tokenizer))


if __name__ == "__main__":
    from jaxserve.cli import main

    sys.modules["jaxserve.pipeline"].pipeline = pipeline
    main(prog_name="jaxserve")
