"""Finds tool calls in an answer while it comes in.

What it returns does not depend on how the answer is cut into pieces, every character costs the same, and nothing that a
model can write raises: what is no call is text.
"""

import re
from collections.abc import Callable, Mapping

from jaxserve.text.tools.calls import Reader, Sink
from jaxserve.text.tools.pieces import Arguments, Call, Piece, Text
from jaxserve.text.tools.values import BLANKS, skip_blanks

MakeReader = Callable[[Sink], Reader]


class Scanner:
    """One answer's text as pieces.

    tools: OpenAI's list of those that were offered.  markers: what begins calls, and who reads on from there.  first:
    who reads an answer that begins with "{".  new_id: a call's id, from its tool's place in the list.  trims: blanks
    around calls are dropped.  whole: a call is told when it is complete, so that a broken one is all text; else its
    arguments are told as they come.
    """

    def __init__(
        self,
        tools: list[dict],
        markers: Mapping[str, MakeReader],
        new_id: Callable[[int], str],
        first: MakeReader | None = None,
        trims: bool = True,
        whole: bool = False,
    ):
        self._places: dict[str, int] = {}
        for place, tool in enumerate(tools):
            self._places.setdefault(tool["function"]["name"], place)
        self._markers, self._first, self._new_id = markers, first, new_id
        self._trims, self._whole = trims, whole
        self._marker = re.compile("|".join(map(re.escape, markers)))
        self._held = ""  # the end of the text, which may become a marker
        self._blanks: list[str] = []  # they are text if text follows
        self._reader: Reader | None = None
        self._raw: list[str] = []  # what the reader has read of a call that nobody was told of
        self._call: list[Piece] | None = None  # the call that is being read, if it is to be told whole
        self._told = False  # whether a call was told that is not yet complete
        self._ended = False  # a call, in the reader's last turn
        self._index = -1
        self._after_call = False  # nothing but blanks since
        self._out: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """What is certain once `text` has come."""
        self._out = []
        text, self._held, at = self._held + text, "", 0
        while at < len(text):
            at = self._words(text, at) if self._reader is None else self._read(text, at)
        return self._out

    def finish(self) -> list[Piece]:
        """What is left when no more text comes."""
        self._out = []
        if self._reader is not None:
            if not self._reader.complete:
                self._give_up()
            self._reader = None
        held, self._held = self._held, ""
        self._say(held)
        if self._blanks and not self._after_call:
            self._emit("".join(self._blanks))
        self._blanks = []
        return self._out

    # The text between calls

    def _words(self, text: str, at: int) -> int:
        if self._first is not None:
            start = skip_blanks(text, at)
            if start < len(text):
                make, self._first = self._first, None
                if text[start] == "{":
                    self._say(text[at:start])
                    self._begin(make, "")
                    return start
        found = self._marker.search(text, at)
        if found:
            self._say(text[at : found.start()])
            self._begin(self._markers[found.group()], found.group())
            return found.end()
        keep = self._kept(text, at)
        self._say(text[at : len(text) - keep])
        self._held = text[len(text) - keep :]
        return len(text)

    def _kept(self, text: str, at: int) -> int:
        """How many characters of the end may be the beginning of a marker."""
        longest = min(len(text) - at, max(map(len, self._markers)) - 1)
        sizes = range(longest, 0, -1)
        return next((size for size in sizes if text.endswith(tuple(marker[:size] for marker in self._markers))), 0)

    def _say(self, text: str) -> None:
        """Text for the user; blanks wait for what follows."""
        if not text:
            return
        if not self._trims:
            self._emit(text)
            return
        words = text.rstrip(BLANKS)
        if not words:
            self._blanks.append(text)
            return
        before = "" if self._after_call else "".join(self._blanks)
        self._emit(before + (words.lstrip(BLANKS) if self._after_call else words))
        self._after_call, self._blanks = False, [text[len(words) :]]

    def _emit(self, text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, Text):
            last.text += text
        elif text:
            self._out.append(Text(text))

    # Calls

    def _begin(self, make: MakeReader, marker: str) -> None:
        self._reader, self._raw = make(self), [marker]

    def _read(self, text: str, at: int) -> int:
        reader = self._reader
        assert reader is not None
        self._ended = False
        after = reader.feed(text, at)
        if self._ended:
            self._raw = []
        elif not self._told:
            self._raw.append(text[at:after])
        if reader.failed:
            self._give_up()
        if reader.failed or reader.done:
            self._reader = None
        return after

    def _give_up(self) -> None:
        """What was read is no call."""
        raw, self._raw = "".join(self._raw), []
        if self._call is not None:
            self._call = None
            self._index -= 1
        if self._told:
            self._told = False
        else:
            self._say(raw)

    def begin(self, name: str) -> bool:
        """As `Sink.begin`."""
        place = self._places.get(name)
        if place is None:
            return False
        self._index += 1
        call = Call(self._index, name, self._new_id(place))
        if self._whole:
            self._call = [call]
        else:
            self._told = True
            self._tell(call)
        return True

    def add(self, text: str) -> None:
        """As `Sink.add`."""
        out = self._out if self._call is None else self._call
        last = out[-1] if out else None
        if isinstance(last, Arguments) and last.index == self._index:
            last.text += text
        else:
            out.append(Arguments(self._index, text))

    def end(self) -> None:
        """As `Sink.end`."""
        self._ended = True
        call, self._call, self._told = self._call, None, False
        for piece in call or ():
            self._tell(piece)

    def _tell(self, piece: Piece) -> None:
        self._blanks, self._after_call = [], True
        self._out.append(piece)
