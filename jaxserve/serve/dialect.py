"""What the APIs beside OpenAI's chat share: parameters under other names, ids of calls, tokens, cancelling by name."""

import secrets
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import orjson
from msgspec import Struct

from jaxserve import bodies
from jaxserve.bodies import ParamError
from jaxserve.engine.request import EngineDead
from jaxserve.serve import body
from jaxserve.serve.service import offload

MOST_CHARACTERS = 4_000_000  # of a text that is only tokenized: seconds of work
LOOK = 0.5  # seconds between two looks at what other web workers want cancelled


def read[Body: Struct](kind: type[Body]) -> Body:
    """The body of the current request as a Struct.  ParamError or ApiError if it is none."""
    raw = body.read()
    try:
        orjson.dumps(raw)  # parts of it are told, or kept, as JSON, which is written less deep than it is read
    except TypeError:
        raise ParamError(None, "the body is nested too deeply") from None
    return cast(Body, bodies.convert(raw, kind))


@contextmanager
def renamed(names: dict[str, str]) -> Iterator[None]:
    """Errors of a chat's parameters are told under the names that they have here."""
    try:
        yield
    except ParamError as error:
        name = names.get(error.param or "")
        if name is None:
            raise
        raise ParamError(name, str(error).replace(error.param or "", name, 1)) from None


def unique(id: str | None, taken: set[str]) -> str:
    """A call's id that is not taken yet: some formats number calls by the tool, and clients tell calls apart by it."""
    made = id or f"call_{uuid.uuid4().hex}"
    while made in taken:
        made += f"_{len(taken)}"
    taken.add(made)
    return made


def stopped_by(token_ids: list[int], config, tokenizer) -> str | None:
    """Which of config.stop_words ended an answer of these tokens; None: it ended by itself."""
    if not config.stop_words:
        return None
    text = tokenizer.decode(token_ids, config.skip_special_tokens)
    found = [(start + len(word), -len(word), word) for word in config.stop_words if (start := text.find(word)) >= 0]
    return min(found)[2] if found else None  # the first to be complete; of several, the longest


class Running:
    """Answers that can be cancelled by a name, from any web worker; kind tells its names from others'.

    The workers share only the engine's small memory: one mark there says that something is to be cancelled, and while
    anything runs here, a thread looks at it.
    """

    def __init__(self, engine, kind: str):
        self._engine, self._kind = engine, kind
        self._answers: dict[str, object] = {}
        self._lock = threading.Lock()
        self._watching = False

    @contextmanager
    def named(self, name: str, answer) -> Iterator[None]:
        """While inside, `cancel(name)` closes the answer."""
        with self._lock:
            self._answers[name] = answer
            start, self._watching = not self._watching, True
        if start:
            threading.Thread(target=self._watch, name="jaxserve-cancel", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                if self._answers.get(name) is answer:
                    del self._answers[name]

    def cancel(self, name: str) -> None:
        """Closes an answer, wherever it runs; in another worker after half a second at most."""
        with self._lock:
            answer = self._answers.get(name)
        if answer is not None:
            answer.close()  # type: ignore[attr-defined]
            return
        self._engine.keep(f"cancel-{self._kind}", name, b"1")
        self._engine.keep(f"cancel-{self._kind}", "", secrets.token_bytes(8))

    def _watch(self) -> None:
        seen, wait = self._mark(), threading.Event()
        while True:
            wait.wait(LOOK)
            with self._lock:
                names = list(self._answers)
                if not names:
                    self._watching = False
                    return
            if (mark := self._mark()) == seen:
                continue
            seen = mark
            for name in names:
                if self._recall(name) is not None:
                    self._engine.forget(f"cancel-{self._kind}", name)
                    self.cancel(name)

    def _mark(self) -> bytes | None:
        return self._recall("")

    def _recall(self, name: str) -> bytes | None:
        try:
            return self._engine.recall(f"cancel-{self._kind}", name)
        except EngineDead:
            return None  # its answers end by themselves


def tokens(service, name: str, text: str, *, bos: bool = True) -> list[int]:
    """Token ids of a text of any length up to MOST_CHARACTERS; name: the parameter that it came in."""
    _bounded(name, len(text))
    return _encoded(name, lambda: service.tokenizer.encode(text, bos=bos))


def chat_tokens(service, ask, **variables) -> list[int]:
    """Token ids of a chat's prompt, which need not fit into the model."""
    (prompt,) = ask.prompts
    _bounded("messages", _characters(prompt))
    if isinstance(prompt, str):
        return _encoded("messages", lambda: service.tokenizer.encode(prompt))
    return _encoded("messages", lambda: service.template.encode(prompt, ask.tools, **(ask.variables | variables)))


def _encoded(name: str, work) -> list[int]:
    try:
        return offload(work)
    except ValueError as error:
        raise ParamError(name, str(error)) from None


def _bounded(name: str, characters: int) -> None:
    if characters > MOST_CHARACTERS:
        raise ParamError(name, f"{name}: {MOST_CHARACTERS} characters at most, not {characters}")


def _characters(value) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    return sum(map(_characters, value)) if not isinstance(value, int | float | None) else 0
