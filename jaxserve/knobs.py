"""How a knob is declared: a field of a frozen dataclass, with its default, its help and its check.

Knows no knob: those of the engine and of a request are in `config`, those of the server in `serve/options.py`.
"""

import functools
import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What a knob may hold: in words that complete "NAME is ...", as a test, and as it is read from a command line."""

    words: str
    holds: Callable[[Any], bool]
    parse: Callable[[str], Any] = str
    choices: tuple = ()
    later: tuple = ()  # known values that are not there yet


def option(default, help: str, kind: Kind, **metadata):
    """A dataclass field that carries its help and its Kind."""
    return field(default=default, metadata={"help": help, "kind": kind, **metadata})


def is_whole(value) -> bool:
    """Whether it is an integer of any library, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value) -> bool:
    """Whether it is a finite number of any library, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, high: int | None = None) -> Kind:
    """An integer from `low` to `high`, both included."""
    words = f"a whole number from {low} to {high}" if high is not None else f"a whole number, {low} or more"
    return Kind(words, lambda v: is_whole(v) and v >= low and (high is None or v <= high), int)


def number(low: float, high: float = math.inf, *, above: bool = False) -> Kind:
    """A finite number from `low` to `high`; `above`: low itself is excluded."""
    words = f"a number above {low:g}" if above else f"a number, {low:g} or more"
    if high < math.inf:
        words = f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"
    return Kind(words, lambda v: is_real(v) and (v > low if above else v >= low) and v <= high, float)


def one_of(*values, later: tuple = ()) -> Kind:
    """One of a few values; those in `later` are known and refused as not there yet."""
    words = " or ".join(map(repr, values))
    parse = int if all(map(is_whole, values)) else str
    return Kind(words, lambda v: not isinstance(v, bool) and v in values, parse, tuple(values), later)


def optional(kind: Kind) -> Kind:
    """The same, or None."""
    return Kind(f"{kind.words} (or None)", lambda v: v is None or kind.holds(v), kind.parse, kind.choices, kind.later)


def list_of(kind: Kind) -> Kind:
    """A list of the same, or None."""
    return Kind(
        f"a list, each {kind.words} (or None)",
        lambda v: v is None or (isinstance(v, list | tuple) and all(map(kind.holds, v))),
        lambda text: [kind.parse(part) for part in text.split(",")],
    )


FLAG = Kind("True or False", lambda v: isinstance(v, bool))
TEXT = Kind("a text", lambda v: isinstance(v, str) and v != "")


def check(config) -> None:
    """Raises ValueError for the first field whose value its Kind does not hold."""
    for knob in fields(config):
        value, kind = getattr(config, knob.name), knob.metadata["kind"]
        if any(value == known and type(value) is type(known) for known in kind.later):
            raise ValueError(f"{knob.name}={value!r} is not there yet; {knob.name} is {kind.words}")
        if not kind.holds(value):
            raise ValueError(f"{knob.name} is {kind.words}, not {value!r}")


def accepts(renamed: dict[str, tuple[str, Callable]], unused: dict[str, tuple], missing: dict[str, tuple]):
    """Lets a dataclass take names that others use for its fields, or that have no field here.

    renamed: name -> (field, conversion).  unused and missing: name -> (neutral value, reason); another value than the
    neutral one is ignored with a warning (unused) or is an error, as it would change the answer (missing).
    """

    def wrap(cls):
        declared = cls.__init__

        @functools.wraps(declared)
        def __init__(self, *positional, **given):
            ignored = []
            for name in [name for name in given if name in renamed or name in unused or name in missing]:
                value = given.pop(name)
                if name in renamed:
                    target, convert = renamed[name]
                    if target in given:
                        raise ValueError(f"{name} is another name of {target}: give one of the two")
                    if value is not None:
                        given[target] = convert(value)
                    continue
                neutral, reason = unused.get(name) or missing[name]
                if value is None or value == neutral:
                    continue
                if name in missing:
                    raise ValueError(f"{name}={value!r} is not supported: {reason}")
                ignored.append(f"{name}={value!r} ({reason})")
            if ignored:
                warnings.warn(f"{cls.__name__} ignores {', '.join(ignored)}", stacklevel=2)
            declared(self, *positional, **given)

        cls.__init__ = __init__
        return cls

    return wrap
