"""A person at a terminal, or a pipe in the place of one: what is asked, what is read, how it is shown.

Standard output has the conversation and nothing else; everything beside it goes to standard error.
"""

import io
import os
import sys
import time
from collections.abc import Callable

import click

from jaxserve import hub

PROMPT = "\ndouble enter to end input >>> "
FULL = "WARNING: exceed session max length. Please end the session."
HINT = "(Ctrl-C again or Ctrl-D leaves; end and an empty line start a new conversation)"
# What a reply may do to a terminal: lines and tabs; the other control characters are shown as pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421, 155: 0xFFFD}


def note(text: str) -> None:
    """A line for the person, not part of the conversation."""
    click.echo(dim(text), err=True)


def dim(text: str) -> str:
    """Text that a terminal shows fainter, unless the person wants none of that (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, dim=True)


def say(text: str) -> None:
    """A piece of a reply, at once."""
    sys.stdout.write(text.translate(PICTURES) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class Pace:
    """When the tokens of a reply came, from now on."""

    def __init__(self):
        self._began = time.perf_counter()
        self._first: tuple[float, int] | None = None  # when, and how many there were
        self._last = (self._began, 0)

    def reached(self, tokens: int) -> None:
        """So many have come by now."""
        if tokens > self._last[1]:
            self._last = (time.perf_counter(), tokens)
            self._first = self._first or self._last

    def figures(self) -> list[str]:
        """What a line about the reply says of it.

        A busy server puts several tokens into a piece, and those of the first say nothing about the speed: a reply that
        came in one piece has none.
        """
        if self._first is None:
            return []
        (began, first), (ended, last) = self._first, self._last
        rate = [f"{(last - first) / (ended - began):.1f} tokens/s"] if last > first and ended > began else []
        return [*rate, f"first after {began - self._began:.2f} s"]


def tolerant() -> None:
    """What is no UTF-8, or cannot be shown, is replaced and ends nothing."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def converse(ask: Callable[[], str | None], turn: Callable[[str], None], end: Callable[[], None]) -> None:
    """Turns until `ask` returns None or exit; the input end is for `end`."""
    while (prompt := ask()) is not None and prompt.strip() != "exit":
        if prompt.strip() == "end":
            end()
            note("a new conversation")
        elif prompt.strip():
            turn(prompt)


def asker() -> Callable[[], str | None]:
    """What asks for the next input and returns it; None where there is no more."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        note("exit leaves, end starts a new conversation, Ctrl-C stops a reply")
        return _terminal()
    return lambda: read(sys.stdin)


def read(stream) -> str | None:
    """Lines up to an empty one or the end of the input; None where there is no more."""
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    lines: list[str] = []
    for line in iter(stream.readline, ""):
        if not (line := line.rstrip("\r\n")):
            return "\n".join(lines)
        lines.append(line)
    sys.stderr.write("\n")
    return "\n".join(lines) if lines else None


def _terminal() -> Callable[[], str | None]:
    """Input with line editing and history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and not buffer.document.current_line:
            buffer.text = buffer.text.rstrip("\n")  # the history keeps no empty lines
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    session: PromptSession = PromptSession(
        multiline=True, key_bindings=keys, history=_history(), reserve_space_for_menu=0
    )

    def ask() -> str | None:
        warned = False
        while True:
            try:
                print()
                return session.prompt(PROMPT.lstrip("\n"), prompt_continuation="").rstrip("\n")
            except KeyboardInterrupt:
                if warned:
                    return None
                warned = True
                note(HINT)
            except EOFError:
                return None

    return ask


def _history():
    """The history file of the cache folder, or none where it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = hub.cache_dir() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab"):
            return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
