"""What the engine's process and the web processes tell each other: the messages, and where one ends.

A frame is its length (four bytes, least significant first) and one message: a msgpack array that begins with its kind.
"""

import socket
import struct
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

VERSION = 1
MOST = 64 << 20  # bytes of a frame
CALLS = Literal["stats", "snapshot", "metrics", "drain", "keep", "recall", "forget"]
WANTS = Literal["logprobs", "alternatives", "logits", "hidden", "last"]


# From a web process.  `number` is chosen by it, and no other of its messages has the same.


class Submit(Struct, array_like=True, tag=1):
    """A request.  Answered by Done or Failed, and by Tokens."""

    number: int
    tokens: bytes  # int32
    max_new_tokens: int
    params: Raw  # SamplingParams; read apart, so that what is wrong with it concerns this request only
    stop_ids: list[int]
    id: str
    group: int | None
    salt: Any  # None, a text, a number, or bytes
    own_salt: int | None  # in its place, for a salt of another type: equal only within the connection
    grammar: str | None


class Abort(Struct, array_like=True, tag=2):
    """Ends the request or the scoring of that number."""

    number: int


class Score(Struct, array_like=True, tag=3):
    """Answered by Done with a list of (dtype, shape, bytes), or by Failed."""

    number: int
    tokens: bytes  # int32
    want: WANTS


class Call(Struct, array_like=True, tag=4):
    """Calls a method of the engine.  Answered by Done with what it returns, or by Failed."""

    number: int
    name: CALLS
    arguments: list[Any]  # texts and bytes


class Ping(Struct, array_like=True, tag=5):
    """Answered by State."""


# From the engine's process.


class Hello(Struct, array_like=True, tag=1):
    """The first message of a connection."""

    version: int
    info: dict[str, Any]
    state: str


class Tokens(Struct, array_like=True, tag=2):
    """What one turn of the engine made: a number, its token, a number, its token, and so on.

    In the place of a token there may be a whole output: (token, finish, logprob, top, error, cached prompt tokens).
    """

    entries: list[Any]


class Done(Struct, array_like=True, tag=3):
    number: int
    value: Any = None


class Failed(Struct, array_like=True, tag=4):
    number: int
    kind: Literal["value", "overloaded", "dead", "error"]
    message: str
    retry_after: float = 0.0


class State(Struct, array_like=True, tag=5):
    state: str


FROM_WEB: msgspec.msgpack.Decoder = msgspec.msgpack.Decoder(Submit | Abort | Score | Call | Ping)
FROM_ENGINE: msgspec.msgpack.Decoder = msgspec.msgpack.Decoder(Hello | Tokens | Done | Failed | State)
_encode = msgspec.msgpack.Encoder().encode


def frame(message: Struct) -> bytes:
    """The bytes of one frame.  ValueError for a message that is too large for any."""
    body = _encode(message)
    if len(body) > MOST:
        raise ValueError(
            f"{len(body) >> 20} MiB are too much to hand from process to process; {MOST >> 20} are the most"
        )
    return len(body).to_bytes(4, "little") + body


class Unframer:
    """Cuts a stream of bytes into the messages of its frames."""

    def __init__(self):
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that `data` completes.  ValueError for a frame that is too long."""
        rest, start = self._rest, 0
        rest += data
        while len(rest) - start >= 4:
            length = int.from_bytes(rest[start : start + 4], "little")
            if length > MOST:
                raise ValueError(f"a frame of {length} bytes")
            if len(rest) - start - 4 < length:
                break
            with memoryview(rest) as view:
                body = bytes(view[start + 4 : start + 4 + length])
            start += 4 + length
            yield body
        del rest[:start]


def plain(salt) -> bool:
    """Whether a salt means the same to every web process, and may be sent as it is."""
    return salt is None or type(salt) in (str, int, bytes)


def peer_uid(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket, as the kernel says."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid
