"""A pseudo terminal for commands that talk with a person."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ASKS = "double enter to end input >>>"
HOME = Path(__file__).parents[1]


class Ended(Exception):
    """The command has ended."""


class Screen:
    """A command, run in the project's folder, and what it wrote."""

    def __init__(self, command, **environment):
        self.terminal, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 100))
        take = (  # makes the terminal its own, as a shell does, so that Ctrl-C reaches it
            "import fcntl, os, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\nos.execv(sys.argv[1], sys.argv[1:])"
        )
        self.child = subprocess.Popen(
            [sys.executable, "-c", take, *command],
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": HOME, "start_new_session": True},
            env=os.environ | {"TERM": "xterm"} | environment,
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, text, seconds=60.0):
        """What came up to and with `text`, which is taken from the screen."""
        end = time.monotonic() + seconds
        while text not in plain(self.text):
            assert time.monotonic() < end, f"no {text!r} in {plain(self.text)!r}"
            self._read(end - time.monotonic())
        before, _, self.text = plain(self.text).partition(text)
        return before + text

    def _read(self, seconds):
        if select.select([self.terminal], [], [], max(0, seconds))[0]:
            try:
                self.text += os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise Ended(plain(self.text)) from None
        if "\x1b[6n" in self.text:  # asks where the cursor is
            self.text = self.text.replace("\x1b[6n", "")
            self.type("\x1b[1;1R")

    def type(self, text):
        os.write(self.terminal, text.encode())

    def ask(self, text):
        self.wait_for(ASKS)
        self.type(text + "\r\r")

    def status(self):
        """The exit status, once it has ended."""
        with pytest.raises(Ended):
            self.wait_for("what is never written")
        return self.child.wait(10)

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.terminal)


def plain(text):
    """Without the terminal's control sequences."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])|\r", "", text)
