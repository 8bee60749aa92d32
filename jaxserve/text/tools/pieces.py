"""What a tool parser finds in an answer."""

from dataclasses import dataclass


@dataclass(slots=True)
class Text:
    """Words for the user."""

    text: str


@dataclass(slots=True)
class Call:
    """A call begins.  index: of the call in the answer; name: of a tool that was offered; id: what its result names."""

    index: int
    name: str
    id: str


@dataclass(slots=True)
class Arguments:
    """More of a call's arguments; joined, they are the text of a JSON object."""

    index: int
    text: str


Piece = Text | Call | Arguments
