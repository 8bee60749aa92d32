"""Processes that the launcher forks: each in a session of its own, so that Ctrl-C reaches the launcher alone.

Their messages to the launcher are JSON, one a line.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator

DESCRIPTORS = 65536  # open files, where the machine allows as many
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def name_process(name: str) -> None:
    """What `top` and `ps -o comm` show; 15 bytes of it."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent, whose id that is, ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def fork(name: str, main: Callable[[], int | None]) -> int:
    """Runs `main` in a child, whose exit status is what it returns, and returns the child's id."""
    flush()
    child = os.fork()
    if child:
        return child
    status: int | None = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        name_process(name)
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        flush()
        os._exit(status or 0)


def flush() -> None:
    """Writes what waits to be written; a full disk is no reason to end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass


def kill_group(child: int) -> None:
    """Ends a child, and whom it has forked, at once."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its own group yet
        os.kill(child, signal.SIGKILL)


class Line:
    """One end of a conversation between launcher and child, in lines of JSON."""

    def __init__(self, sock: socket.socket):
        self.socket = sock
        self._rest = b""

    def tell(self, **message) -> None:
        """Sends a message; one that cannot be sent, because nobody is there any more, is dropped."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def hear(self) -> Iterator[dict] | None:
        """The messages that have come, after waiting for one; None when the other end is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return map(json.loads, lines)

    def close(self) -> None:
        self.socket.close()


def ended(status: int) -> str:
    """How a child ended, from what `os.waitpid` says: "was killed by SIGKILL", "ended with status 1"."""
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def more_descriptors() -> None:
    """Raises the number of open files that this process and its children may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
