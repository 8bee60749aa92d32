"""Progress on standard error: bars where that is a terminal, lines where it is not and somebody wants to know."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
STYLES: dict[str, dict] = {
    "loading": BYTES,
    "saving": BYTES,
    "compiling": {"bar_format": "{l_bar}{bar}| {n_fmt} of {total_fmt} programs [{elapsed}]", "unit": " programs"},
}
EVERY = 10  # seconds between two lines of one stage


class Lines(NamedTuple):
    """In the place of True and False: no bars, but a line every ten seconds, and one in the end of each stage."""

    write: Callable[[str], object]


def bar(total: int | None, wanted: "bool | Lines | None" = None, **style):
    """A tqdm bar, or what writes lines in its place; wanted=None shows a bar where people can see it."""
    if isinstance(wanted, Lines):
        return Log(wanted.write, total, style)
    from tqdm import tqdm

    hidden = not (sys.stderr.isatty() if wanted is None else wanted)
    return tqdm(total=total, disable=hidden, dynamic_ncols=True, file=sys.stderr, **style)


class Log:
    """What a caller uses of a tqdm bar, written as lines."""

    def __init__(self, write: Callable[[str], object], total: int | None, style: dict):
        self.write, self.total, self.n = write, total, 0
        self.name, self.unit = style.get("desc", "done"), style.get("unit", "").strip()
        self.began = self.told = time.perf_counter()

    def update(self, more: int = 1) -> None:
        """So much more is done."""
        self.n += more
        if time.perf_counter() - self.told >= EVERY and self.n != self.total:
            self._tell()

    def close(self) -> None:
        """The stage is over."""
        if self.n:
            self._tell()
        self.n = 0

    def _tell(self):
        self.told, unit = time.perf_counter(), self.unit
        counts = [str(count) for count in (self.n, self.total) if count is not None]
        if unit == "B":
            counts, unit = [f"{int(count) / 2**30:.2f}" for count in counts], "GiB"
        of = " of ".join(counts)
        self.write(f"{self.name}: {of} {unit} after {self.told - self.began:.1f} s".replace("  ", " "))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@contextmanager
def stages(wanted: "bool | Lines | None" = None) -> Iterator[Callable[[str, int, int], None]]:
    """A function progress(what, done, total) that draws one bar after the other, one for each `what`."""
    shown, name = bar(0, wanted=False), None

    def progress(what: str, done: int, total: int) -> None:
        nonlocal shown, name
        if what != name:
            shown.close()
            shown, name = bar(total, wanted, desc=what, leave=False, **STYLES.get(what, {})), what
        shown.total = total
        shown.update(done - shown.n)
        if done >= total:  # lines that come now begin where it was
            shown.close()
            name = None

    try:
        yield progress
    finally:
        shown.close()


class Clock:
    """How long the stages of some work took, in its order."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is done inside belongs to a stage; stages that come again add up."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before

    def __str__(self):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"seconds: {parts}; {time.perf_counter() - self.began:.1f} in all"
