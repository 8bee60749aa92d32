"""One answer on its way: from a prompt's tokens and a GenerationConfig to the engine's Request, and back to text.

The engine's thread calls `Reply.put`, which is cheap; whoever waits for the answer calls `Reply.take`.
"""

import functools
import itertools
import os
import random
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from jaxserve.config import GenerationConfig
from jaxserve.engine.request import Output, Request, SamplingParams
from jaxserve.text import grammar as grammars
from jaxserve.text.tokenizer import TextStream, Tokenizer

LONGEST_BAD_WORD = 5  # tokens


@dataclass
class Response:
    """An answer, or the newest part of one in a stream; fields as in LMDeploy 0.5.3, then those of 0.18.

    In a stream `text`, `token_ids` and `logprobs` hold what is new, and the counts what there is so far.
    """

    text: str
    generate_token_len: int
    input_token_len: int
    session_id: int = 0
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"; None: more will come
    token_ids: list[int] = field(default_factory=list)  # without the token that ended the answer
    logprobs: list[dict[int, float]] | None = None  # a token: {id: log-probability}, the one taken first
    index: int = field(default=0, repr=False)  # of the prompt in its list
    choice: int = field(default=0, repr=False)  # of n answers to one prompt
    cached_tokens: int = field(default=0, repr=False)  # prompt tokens found in the prefix cache
    logits: Any = field(default=None, repr=False)
    last_hidden_state: Any = field(default=None, repr=False)
    error_code: int | None = field(default=None, repr=False)  # with finish_reason "error": HTTP's, 400 or 500
    error_message: str | None = field(default=None, repr=False)


def sampling_params(config: GenerationConfig, tokenizer, seed: int) -> SamplingParams:
    """The numbers that the engine draws tokens by.  ValueError for a bad word that is too long to watch for."""
    bad_words = {(int(token),) for token in config.bad_token_ids or ()}
    for word in config.bad_words or ():
        for ids in tokenizer.word_ids([word]):
            if len(ids) > LONGEST_BAD_WORD:
                raise ValueError(f"bad_words: {word!r} is {len(ids)} tokens long; {LONGEST_BAD_WORD} is the most")
            bad_words.add(ids)
    return SamplingParams(
        temperature=0.0 if config.greedy else float(config.temperature),
        top_k=0 if config.greedy else int(config.effective_top_k),
        top_p=1.0 if config.greedy else float(config.top_p),
        min_p=0.0 if config.greedy else float(config.min_p),
        repetition_penalty=float(config.repetition_penalty),
        presence_penalty=float(config.presence_penalty),
        frequency_penalty=float(config.frequency_penalty),
        seed=seed,
        logit_bias=tuple((int(token), float(bias)) for token, bias in (config.logit_bias or {}).items()),
        bad_words=tuple(sorted(bad_words)),
        min_new_tokens=int(config.min_new_tokens or 0),
        logprobs=config.logprobs,
    )


class Reply:
    """One answer: the request that makes it, and what has come of it so far."""

    def __init__(self, stream: TextStream, whole: Response, *, live: bool, keep_stop: bool):
        """`live`: somebody reads along, or a stop word must be seen; else only the end of the answer is news."""
        self.request: Request | None = None  # None: there is no room for a single token
        self._whole = whole
        self._texts: list[str] = []  # what `_whole.text` lacks: to add each token's would copy all of it each time
        self.live = live
        self.news: SimpleQueue[Reply] = SimpleQueue()
        self._keep_stop = keep_stop
        self._stream = stream
        self._fresh: deque[Output] = deque()

    def put(self, output: Output) -> None:
        """Called by the engine, on its thread."""
        self._fresh.append(output)
        if self.live or output.finish:
            self.news.put(self)

    @property
    def whole(self) -> Response:
        """All of the answer so far."""
        if self._texts:
            self._whole.text = "".join([self._whole.text, *self._texts])
            self._texts.clear()
        return self._whole

    @property
    def finished(self) -> bool:
        return self._whole.finish_reason is not None

    def take(self) -> Response | None:
        """What is new since the last call, or None."""
        if self.finished:
            return None  # what comes after a stop word
        texts, ids, chances, finish, error = [], [], [], None, None
        while self._fresh and finish is None:
            output = self._fresh.popleft()
            finish, error = output.finish, output.error
            if output.token is None or (finish == "stop" and not self._keep_stop):
                continue
            ids.append(output.token)
            texts.append(self._stream.push(output.token))
            if output.logprob is not None:
                chances.append({output.token: output.logprob, **dict(output.top)})
            if self._stream.stopped:
                finish = "stop"
        if not ids and finish is None:
            return None
        if finish is not None:
            texts.append(self._stream.finish())
        return self._add("".join(texts), ids, chances, finish, error)

    def _add(self, text, ids, chances, finish, error) -> Response:
        self._texts.append(text)
        whole = self._whole if finish is None else self.whole
        whole.token_ids += ids
        whole.generate_token_len += len(ids)
        whole.finish_reason, whole.error_message = finish, error
        if finish == "error" and whole.error_code is None:
            whole.error_code = 500
        whole.cached_tokens = self.request.cached if self.request else 0
        if whole.logprobs is not None:
            whole.logprobs += chances
        return Response(  # made for every token: dataclasses.replace would take three times as long
            text,
            whole.generate_token_len,
            whole.input_token_len,
            whole.session_id,
            finish,
            ids,
            None if whole.logprobs is None else chances,
            whole.index,
            whole.choice,
            whole.cached_tokens,
            error_code=whole.error_code,
            error_message=error,
        )


class Author:
    """Makes Replies to prompts of token ids, for one loaded model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        session_len: int,
        stop_ids: frozenset[int] = frozenset(),
        stop_words: Sequence[str] = (),
        seed: int | None = None,
    ):
        """stop_ids and stop_words: where the model's own answers end.  seed: of the requests that bring none."""
        self.tokenizer = tokenizer
        self.session_len = session_len
        self._stop_ids = stop_ids
        self._stop_words = tuple(stop_words)
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)
        self._sessions = itertools.count()
        self._name = os.urandom(6).hex()  # many authors may share an engine

    @functools.cached_property
    def table(self):
        """The vocabulary as llguidance has it; takes up to a second, once."""
        return grammars.token_table(self.tokenizer, stop_ids=self._stop_ids)

    def grammar(self, config: GenerationConfig, given: str | None = None) -> str | None:
        """What a reply must look like, as llguidance's JSON text: as given, or as config.response_format says.

        ValueError where it cannot be followed.
        """
        made = given
        if made is None and config.response_format is not None:
            made = grammars.from_response_format(dict(config.response_format))
        if made is not None:
            grammars.check(made, self.table)
        return made

    def replies(
        self,
        tokens: Sequence[int],
        config: GenerationConfig,
        *,
        index: int = 0,
        live: bool = False,
        continues: bool = False,
        grammar: str | None = None,
    ) -> list[Reply]:
        """config.n answers to one prompt, not yet submitted.

        live: somebody reads along.  continues: the answer goes on with the prompt's text, and so may begin with a
        space.  grammar: what it must look like, as llguidance's JSON text, in the place of
        config.response_format.  ValueError names what cannot be used.
        """
        if not tokens:
            raise ValueError("the prompt is empty")
        grammar = self.grammar(config, grammar)
        session = next(self._sessions)
        room = self.session_len - len(tokens)
        wanted = room if config.max_new_tokens is None else min(config.max_new_tokens, room)
        seed = self._seeds.getrandbits(32) if config.random_seed is None else int(config.random_seed)
        stop_ids, stop_words = self._stops(config)
        keep_stop = config.include_stop_str_in_output
        name = f"{self._name}-{session}"
        group = name if config.n > 1 else None
        made = []
        for choice in range(config.n):
            stream = TextStream(self.tokenizer, stop_words, config.skip_special_tokens, keep_stop, continues)
            logprobs: list | None = None if config.logprobs is None else []
            whole = Response("", 0, len(tokens), session, None, [], logprobs, index, choice)
            reply = Reply(stream, whole, live=live or bool(stop_words), keep_stop=keep_stop)
            if wanted > 0:
                params = sampling_params(config, self.tokenizer, (seed + choice) % 2**32)
                reply.request = Request(
                    list(tokens), wanted, params, stop_ids, reply, f"{name}.{choice}", group, grammar=grammar
                )
            made.append(reply)
        return made

    def _stops(self, config) -> tuple[frozenset[int], tuple[str, ...]]:
        """Token ids and texts that end an answer; ignore_eos leaves those that were asked for."""
        ids, words = self.tokenizer.split_stops(config.stop_words or ())
        ids |= frozenset(map(int, config.stop_token_ids or ()))
        if config.ignore_eos:
            return ids, words
        return ids | self._stop_ids, tuple(dict.fromkeys((*words, *self._stop_words)))


def drive(engine, source: Iterable[Reply | None], window: int) -> Generator[tuple[Reply, Response]]:
    """Submits replies from `source`, `window` at most at once, and yields each with what is new, as it comes.

    None in the source means: nothing more until something has been yielded.  Closing the generator aborts the rest.
    """
    news: SimpleQueue[Reply] = SimpleQueue()
    running: set[Reply] = set()
    replies, more = iter(source), True
    try:
        while more or running:
            while more and len(running) < window:
                try:
                    reply = next(replies)
                except StopIteration:
                    more = False
                    break
                if reply is None:
                    break
                reply.news = news
                running.add(reply)
                _submit(engine, reply)
            if not running:
                continue
            reply = news.get()
            delta = reply.take()
            if delta is None:
                continue
            if reply.finished:
                running.discard(reply)
                if reply.request and not reply.request.finish:  # ended by a stop word, which the engine does not know
                    engine.abort(reply.request)
            yield reply, delta
    finally:
        for reply in running:
            if reply.request:
                engine.abort(reply.request)


def _submit(engine, reply: Reply) -> None:
    if reply.request is None:
        return reply.put(Output(None, "length"))
    try:
        engine.submit(reply.request)
    except ValueError as error:  # it can never fit
        reply.whole.error_code = 400
        reply.put(Output(None, "error", error=str(error)))
