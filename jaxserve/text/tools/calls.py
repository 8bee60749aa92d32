"""How answers write tool calls: objects with a name and arguments, and names with arguments after them.

A reader takes text from where a marker ended and tells a sink of calls.  It is `done` or `failed` at a character that
it leaves unread; where that is does not depend on how the text is cut into pieces.
"""

import json
from collections.abc import Callable
from typing import Protocol

from jaxserve.text.tools.values import BLANKS, Value, skip_blanks

LONGEST_NAME = 300  # characters, with what stands around it
KEYS = ("arguments", "parameters")
OTHERS = ("id", "type")  # of a call, without meaning here


class Sink(Protocol):
    """Who is told of calls."""

    def begin(self, name: str) -> bool:
        """A call of the tool `name`; False if there is no such tool."""

    def add(self, text: str) -> None:
        """More of its arguments."""

    def end(self) -> None:
        """Its arguments are complete."""


class Reader(Protocol):
    """Reads calls.  complete: it may end where it is, with nothing unfinished."""

    done: bool
    failed: bool

    @property
    def complete(self) -> bool: ...

    def feed(self, text: str, at: int) -> int:
        """Reads on from text[at], to the end of a call at most; where the first unread character is."""


class Word:
    """A short text in JSON, read whole."""

    def __init__(self):
        self.done = self.failed = False
        self.text = ""
        self._value = Value()
        self._held = ""
        self._room = LONGEST_NAME

    def feed(self, text: str, at: int) -> int:
        """As `Reader.feed`."""
        if not self._held:
            at = skip_blanks(text, at)
            if at < len(text) and text[at] != '"':
                self.failed = True
                return at
        taken, size = self._value.feed(text[at : at + self._room], 0)
        self._held += taken
        self._room -= size
        if self._value.done:
            self.done, self.text = True, json.loads(self._held)
        else:
            self.failed = self._value.failed or not self._room
        return at + size


class Object:
    """The arguments of a call: an object; or, as some models have it, null or a text with the object's JSON in it."""

    def __init__(self):
        self.done = self.failed = False
        self._value: Value | None = None
        self._held: list[str] | None = None

    def feed(self, text: str, at: int) -> tuple[str, int]:
        """As `Value.feed`."""
        if self._value is None:
            at = skip_blanks(text, at)
            if at == len(text):
                return "", at
            if text[at] not in '{"n':
                self.failed = True
                return "", at
            self._value = Value()
            self._held = None if text[at] == "{" else []
        taken, at = self._value.feed(text, at)
        self.done, self.failed = self._value.done, self._value.failed
        if self._held is None:
            return taken, at
        self._held.append(taken)
        return (self._unpacked() if self.done else ""), at

    def _unpacked(self) -> str:
        inner = json.loads("".join(self._held or ()))
        if inner is None:
            return "{}"
        inner, value = inner.strip(BLANKS), Value()
        taken, at = value.feed(inner, 0)
        if not (value.done and taken.startswith("{") and at == len(inner) and _unicode(taken)):
            self.done, self.failed = False, True
            return ""
        return taken


def _unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


class CallObject:
    """{"name": "add", "arguments": {"a": 3}}, the keys in any order.

    strict: no keys but those that calls have, and arguments must be there: it may be JSON that is no call.
    """

    def __init__(self, sink: Sink, strict: bool = False):
        self.done = self.failed = False
        self._sink, self._strict = sink, strict
        self._step: Callable[[str, int], int] = self._open
        self._word = Word()  # a key, or the name
        self._arguments: Object | None = None
        self._other = Value()  # of a key without meaning
        self._name: str | None = None
        self._early: list[str] = []  # arguments that came before the name
        self._begun = False  # whether the sink knows of the call

    def feed(self, text: str, at: int) -> int:
        """As `Reader.feed`."""
        while at < len(text) and not self.done and not self.failed:
            at = self._step(text, at)
        return at

    def _sign(self, text: str, at: int, signs: str) -> tuple[str, int]:
        """Reads one of the signs that may come here; "" as long as there are only blanks."""
        at = skip_blanks(text, at)
        if at == len(text):
            return "", at
        self.failed = text[at] not in signs
        return ("", at) if self.failed else (text[at], at + 1)

    def _open(self, text: str, at: int) -> int:
        sign, at = self._sign(text, at, "{")
        if sign:
            self._step = self._read_key
        return at

    def _read_key(self, text: str, at: int) -> int:
        at = self._word.feed(text, at)
        self.failed = self._word.failed
        if self._word.done:
            key = self._word.text
            again = self._name is not None if key == "name" else self._arguments is not None and key in KEYS
            self.failed = again or (self._strict and key not in ("name", *KEYS, *OTHERS))
            self._step = self._colon
        return at

    def _colon(self, text: str, at: int) -> int:
        sign, at = self._sign(text, at, ":")
        if sign:
            key, self._word, self._other = self._word.text, Word(), Value()
            if key == "name":
                self._step = self._read_name
            elif key in KEYS:
                self._arguments = Object()
                self._step = self._read_arguments
            else:
                self._step = self._skip
        return at

    def _read_name(self, text: str, at: int) -> int:
        at = self._word.feed(text, at)
        self.failed = self._word.failed
        if self._word.done:
            self._name, self._step = self._word.text, self._after
            if self._early:
                self._tell("".join(self._early))
        return at

    def _read_arguments(self, text: str, at: int) -> int:
        assert self._arguments is not None
        taken, at = self._arguments.feed(text, at)
        if taken and self._name is None:
            self._early.append(taken)
        elif taken:
            self._tell(taken)
        self.failed = self.failed or self._arguments.failed
        if self._arguments.done:
            self._step = self._after
        return at

    def _skip(self, text: str, at: int) -> int:
        _, at = self._other.feed(text, at)
        self.failed = self._other.failed
        if self._other.done:
            self._step = self._after
        return at

    def _after(self, text: str, at: int) -> int:
        sign, after = self._sign(text, at, ",}")
        if sign == ",":
            self._word, self._step = Word(), self._read_key
        elif sign and (self._name is None or (self._strict and self._arguments is None)):
            self.failed = True
            return after - 1
        elif sign:
            if not self._begun:
                self._tell("{}")
            if self.failed:
                return after - 1
            self.done = True
            self._sink.end()
        return after

    def _tell(self, arguments: str) -> None:
        assert self._name is not None
        if not self._begun:
            self._begun = True
            self.failed = not self._sink.begin(self._name)
        if not self.failed:
            self._sink.add(arguments)


class Objects:
    """Call objects one after the other, with any of `separators` between them, until `close` or something else.

    skips: anything may stand before the first.
    """

    def __init__(
        self, sink: Sink, close: str = "", separators: str = BLANKS, strict: bool = False, skips: bool = False
    ):
        self.done = self.failed = False
        self._make = lambda: CallObject(sink, strict)
        self._close, self._separators, self._skips = close, separators, skips
        self._call: CallObject | None = None
        self._closing = 0  # characters of `close` that have come
        self._calls = 0

    @property
    def complete(self) -> bool:
        return self._call is None and self._calls > 0

    def feed(self, text: str, at: int) -> int:
        while at < len(text) and not self.done and not self.failed:
            if self._call is None:
                at = self._between(text, at)
                continue
            at = self._call.feed(text, at)
            self.failed = self._call.failed
            if self._call.done:
                self._call = None
                self._calls += 1
                return at
        return at

    def _between(self, text: str, at: int) -> int:
        if self._close and text[at] == self._close[self._closing]:
            self._closing += 1
            self.done = self._closing == len(self._close)
            return at + 1
        if text[at] == "{" and not self._closing:
            self._call = self._make()
        elif not self._closing and (text[at] in self._separators or (self._skips and not self._calls)):
            return at + 1
        elif self._closing or not self._calls:
            self.failed = True
        else:
            self.done = True
        return at


class Named:
    """A name, then its arguments: `add[ARGS]{"a": 3}`.  name_of: the name in what stands before the arguments."""

    def __init__(self, sink: Sink, name_of: Callable[[str], str], close: str = ""):
        self.done = self.failed = False
        self._sink, self._name_of, self._close = sink, name_of, close
        self._head = ""
        self._object: Object | None = None
        self._closing = 0

    @property
    def complete(self) -> bool:
        return self._object is not None and self._object.done

    def feed(self, text: str, at: int) -> int:
        while at < len(text) and not self.done and not self.failed:
            if self._object is None:
                at = self._name(text, at)
            elif self._object.done:
                at = self._end(text, at)
            else:
                taken, at = self._object.feed(text, at)
                if taken:
                    self._sink.add(taken)
                self.failed = self._object.failed
                if self._object.done:
                    self._sink.end()
                    self.done = not self._close
                    return at
        return at

    def _name(self, text: str, at: int) -> int:
        if text[at] == "{":
            self._object = Object()
            self.failed = not self._sink.begin(self._name_of(self._head))
            return at
        self._head += text[at]
        self.failed = len(self._head) > LONGEST_NAME or (text[at] == "\n" and bool(self._head.strip()))
        return at + 1

    def _end(self, text: str, at: int) -> int:
        if not self._closing and text[at] in BLANKS:
            return at + 1
        if text[at] == self._close[self._closing]:
            self._closing += 1
            self.done = self._closing == len(self._close)
            return at + 1
        self.done, self.failed = not self._closing, self._closing > 0
        return at
