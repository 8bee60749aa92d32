"""JSON read a piece at a time: what has come in is known to be right before the rest is there.

Every character is looked at once, and no expression here can go back, so that a long answer costs what it is long.
"""

import json
import re
from collections.abc import Callable

BLANKS = " \t\r\n"
DEEPEST = 100  # objects and lists in one another
LONGEST_SCALAR = 400  # characters of a number

_BLANK = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[-+.0-9a-zA-Z]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")


def skip_blanks(text: str, at: int) -> int:
    """Where the first character is, from `at` on, that is no blank."""
    return _BLANK.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too


class Value:
    """One JSON value.  done: it is complete.  failed: what came can begin no JSON value.

    Line breaks and the like in strings, which models write and JSON forbids, become escapes.
    """

    def __init__(self):
        self.done = self.failed = False
        self._closers: list[str] = []
        self._step: Callable = self._value
        self._key = False  # the string that is read is the key of an object
        self._digits = 0  # of a \u escape, still to come
        self._word = ""

    def feed(self, text: str, at: int) -> tuple[str, int]:
        """Reads on from text[at]: the part of the value that is new, and where the first unread character is."""
        out: list[str] = []
        while at < len(text) and not self.done and not self.failed:
            at = self._step(text, at, out)
        return "".join(out), at

    def _blanks(self, text: str, at: int, out: list[str]) -> int:
        end = skip_blanks(text, at)
        if self._closers and end > at:
            out.append(text[at:end])
        return end

    def _value(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at == len(text):
            return at
        first = text[at]
        if first in "{[":
            self._closers.append("}" if first == "{" else "]")
            self._step = self._first_key if first == "{" else self._first_item
            self.failed = len(self._closers) > DEEPEST
        elif first == '"':
            self._key, self._step = False, self._string
        elif first in "-0123456789tfn":
            self._word, self._step = "", self._scalar
            return at
        else:
            self.failed = True
        if self.failed:
            return at
        out.append(first)
        return at + 1

    def _first_item(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at < len(text):
            if text[at] == "]":
                return self._close(text, at, out)
            self._step = self._value
        return at

    def _first_key(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at < len(text):
            if text[at] == "}":
                return self._close(text, at, out)
            self._step = self._next_key
        return at

    def _next_key(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at == len(text):
            return at
        if text[at] != '"':
            self.failed = True
            return at
        self._key, self._step = True, self._string
        out.append('"')
        return at + 1

    def _colon(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at == len(text):
            return at
        if text[at] != ":":
            self.failed = True
            return at
        self._step = self._value
        out.append(":")
        return at + 1

    def _after(self, text: str, at: int, out: list[str]) -> int:
        at = self._blanks(text, at, out)
        if at == len(text):
            return at
        if text[at] == self._closers[-1]:
            return self._close(text, at, out)
        if text[at] != ",":
            self.failed = True
            return at
        self._step = self._next_key if self._closers[-1] == "}" else self._value
        out.append(",")
        return at + 1

    def _close(self, text: str, at: int, out: list[str]) -> int:
        self._closers.pop()
        out.append(text[at])
        self._end()
        return at + 1

    def _end(self) -> None:
        self.done = not self._closers
        self._step = self._after

    def _string(self, text: str, at: int, out: list[str]) -> int:
        end = _PLAIN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if end > at:
            out.append(text[at:end])
        if end == len(text):
            return end
        special = text[end]
        if special == '"':
            if self._key:
                self._step = self._colon
            else:
                self._end()
        elif special == "\\":
            self._step = self._escape
        out.append(special if special in '"\\' else json.dumps(special)[1:-1])
        return end + 1

    def _escape(self, text: str, at: int, out: list[str]) -> int:
        if text[at] not in '"\\/bfnrtu':
            self.failed = True
            return at
        self._digits = 4
        self._step = self._hex if text[at] == "u" else self._string
        out.append(text[at])
        return at + 1

    def _hex(self, text: str, at: int, out: list[str]) -> int:
        if text[at] not in "0123456789abcdefABCDEF":
            self.failed = True
            return at
        self._digits -= 1
        if not self._digits:
            self._step = self._string
        out.append(text[at])
        return at + 1

    def _scalar(self, text: str, at: int, out: list[str]) -> int:
        end = _WORD.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        end = min(end, at + LONGEST_SCALAR + 1 - len(self._word))
        self._word += text[at:end]
        if len(self._word) > LONGEST_SCALAR:
            self.failed = True
        elif end < len(text):
            if self._word in ("true", "false", "null") or _NUMBER.fullmatch(self._word):
                out.append(self._word)
                self._end()
            else:
                self.failed = True
        return end
