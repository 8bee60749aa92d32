"""What all routes share: the engine's end in this process, the tokenizer, the chat template, and how a body is started.

Knows nothing of Flask.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxserve import answers, protocol
from jaxserve.protocol import Ask, ParamError
from jaxserve.reply import Author
from jaxserve.serve.answer import Answer
from jaxserve.serve.errors import MISSING, ApiError
from jaxserve.text.tokenizer import stop_ids, stop_strings
from jaxserve.voice import Formats

TOO_LONG = "context_length_exceeded"  # the code by which clients know that they must send less
MANY = 1000  # messages, or token ids, that are looked through where they are; more in the thread pool
AT_ONCE = 16  # known sequences of one body that are with the engine at the same time
QUICK = 4000  # characters that are tokenized where they are; more go to the thread pool


@dataclasses.dataclass(frozen=True)
class Limits:
    """heartbeat: seconds of silence after which a stream says that it lives.  slow_reader: seconds that one write to a
    client may take.  window: answers of one body that are with the engine at once."""

    heartbeat: float = 10.0
    slow_reader: float = 30.0
    window: int = 128


class Service:
    """One loaded model, as a web process has it.  Greenlets and threads may share it.

    engine: an Engine, a Door, or a Link.  info: the engine's.  created: when, in seconds since 1970.
    """

    def __init__(
        self,
        engine,
        tokenizer,
        template,
        *,
        model_names: Sequence[str],
        tool_format: str | None = None,
        reasoning_format: str | None = None,
        limits: Limits | None = None,
        seed: int | None = None,
        generation_config: dict | None = None,
    ):
        """model_names: those under which it answers, the first being told.  tool_format, reasoning_format: names of
        jaxserve.text.tools and .reasoning.  generation_config: in the place of the model's own."""
        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        self.info = engine.info
        self.model_names, self.limits = list(model_names), limits or Limits()
        self.formats = Formats(tokenizer, tool_format, reasoning_format)
        self.generation_config = self.info["generation_config"] if generation_config is None else generation_config
        self.session_len, self.vocab = self.info["session_len"], self.info["vocab"]
        self.created = int(time.time())
        self.ends = stop_ids(tokenizer, self.generation_config, template)
        self.author = Author(tokenizer, self.session_len, self.ends, stop_strings(tokenizer, template), seed)
        self.window = max(self.limits.window, 2 * self.info["max_batch_size"])
        self._longest_token = max(map(len, tokenizer.token_bytes), default=1)

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """ApiError 404 for a model that is not here; no name means the one that is."""
        if name and name not in self.model_names:
            raise ApiError(
                404,
                f"there is no model {protocol.shown(name)} here; this server has {', '.join(self.model_names)}",
                MISSING,
                param="model",
                code="model_not_found",
            )

    def parse(self, url: str, body: dict) -> Ask:
        """A body as an Ask, with what it leaves open as the model's authors advise."""
        large = any(isinstance(value, list) and len(value) > MANY for value in body.values())
        return (offload if large else _here)(Ask.parse, url, body, self.generation_config)

    def start(self, ask: Ask) -> Answer:
        """Tokenizes and submits; errors come now, before anything is sent.

        ParamError or ValueError (400), ApiError, Overloaded or EngineDead.
        """
        self.check_model(ask.model)
        if ask.tools and self.formats.tools is None:
            raise ParamError(
                "tools",
                "tools: how this model writes tool calls is not known; start the server with --tool-call-parser",
            )
        prompts = [self.tokens(prompt, ask) for prompt in ask.prompts]
        return self.submit(ask, prompts)

    def submit(self, ask: Ask, prompts: list[list[int]]) -> Answer:
        """Starts answers to prompts that are tokens already; raises as `start` does."""
        for name in ("logit_bias", "stop_token_ids", "bad_token_ids"):
            for token in getattr(ask.config, name) or ():
                if int(token) >= self.vocab:
                    raise ParamError(name, f"{name}: {self._ids()}, not {token}")
        work = offload if ask.grammar or ask.tools else _here  # a grammar is checked by compiling it
        voices = work(self.formats.voices, self.author, ask, prompts, ask.stream)
        return Answer(self.engine, ask, prompts, voices, window=self.window, heartbeat=self.limits.heartbeat)

    def _ids(self) -> str:
        return f"token ids of this model are 0 to {self.vocab - 1}"

    def tokens(self, prompt, ask: Ask) -> list[int]:
        """One prompt of an Ask as token ids.  ParamError if it is empty, too long, or no prompt of this model."""
        name = "messages" if ask.chat else "prompt"
        if isinstance(prompt, list) and not ask.chat:
            self._check_length(name, prompt)
            bad = next((token for token in prompt if not 0 <= token < self.vocab), None)
            if bad is not None:
                raise ParamError(name, f"{name}: {self._ids()}, not {bad}")
            tokens = prompt
        else:
            size = _characters(prompt) + _characters(ask.tools)
            self._check_size(name, size)
            work = offload if size > QUICK else _here
            try:
                if isinstance(prompt, str):
                    tokens = work(self.tokenizer.encode, prompt)
                else:
                    tokens = work(lambda: self.template.encode(prompt, ask.tools, **ask.variables))
            except ValueError as error:
                raise ParamError(name, str(error)) from None
        if not tokens:
            raise ParamError(name, f"{name}: the prompt is empty")
        self._check_length(name, tokens)
        return tokens

    def _check_length(self, name: str, tokens: list[int]) -> None:
        if len(tokens) > self.session_len:
            raise ParamError(
                name,
                f"{name}: the prompt has {len(tokens)} tokens; prompt and answer together may have {self.session_len}",
                TOO_LONG,
            )

    def known(self, sequences: Sequence[list[int]], want: str) -> list:
        """What the engine makes of known sequences (`Engine.score`), several at once, in their order.  Waits."""
        if len(sequences) < 2:
            return [self.engine.score(tokens, want) for tokens in sequences]
        with ThreadPoolExecutor(min(AT_ONCE, len(sequences))) as pool:
            jobs = [pool.submit(self.engine.score, tokens, want) for tokens in sequences]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def scores(self, prompts: Sequence[list[int]], alternatives: int) -> list[answers.Scores]:
        """Each token of each prompt with its log-probability given those before it, and so many others.  Waits."""
        try:
            scored = iter(self.known([tokens for tokens in prompts if len(tokens) > 1], "alternatives"))
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return [answers.scores(tokens, next(scored) if len(tokens) > 1 else None, alternatives) for tokens in prompts]

    def _check_size(self, name: str, characters: int) -> None:
        """Refuses, without tokenizing it, a text that cannot fit whatever its tokens are."""
        most = self.session_len * self._longest_token
        if characters > most:
            raise ParamError(
                name,
                f"{name}: the prompt has {characters} characters; the {self.session_len} tokens of this model hold "
                f"{most} at most",
                TOO_LONG,
            )


def _characters(prompt) -> int:
    """The characters of a text, or of all texts in messages or tools."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, dict):
        prompt = prompt.values()
    elif not isinstance(prompt, list):
        return 0
    return sum(map(_characters, prompt))


def offload(work: Callable, *arguments):
    """Calls `work` where it does not hold up others: in gevent's thread pool if gevent runs this process, else here."""
    if not _gevent():
        return work(*arguments)
    from gevent import get_hub

    result, error = get_hub().threadpool.apply(_caught, (work, arguments))
    if error is not None:
        raise error
    return result


def _caught(work: Callable, arguments) -> tuple:
    """gevent writes what is raised in its threads to the log, though somebody waits for it."""
    try:
        return work(*arguments), None
    except Exception as error:
        return None, error


def _here(work: Callable, *arguments):
    return work(*arguments)


def _gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("socket")
