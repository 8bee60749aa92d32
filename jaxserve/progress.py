"""Progress bars on standard error, and nothing where that is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UNITS: dict[str, dict] = {
    "loading": {"unit": "B", "unit_scale": True, "unit_divisor": 1024},
    "compiling": {"unit": " programs"},
}


def bar(total: int | None, wanted: bool | None = None, **style):
    """A tqdm bar; wanted=None shows it where people can see it."""
    from tqdm import tqdm

    hidden = not (sys.stderr.isatty() if wanted is None else wanted)
    return tqdm(total=total, disable=hidden, dynamic_ncols=True, file=sys.stderr, **style)


@contextmanager
def stages(wanted: bool | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A function progress(what, done, total) that draws one bar after the other, one for each `what`."""
    bars: dict = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            close()
            bars[what] = bar(total, wanted, desc=what, leave=False, **UNITS.get(what, {}))
        bars[what].total = total
        bars[what].update(done - bars[what].n)

    def close():
        for shown in bars.values():
            shown.close()

    try:
        yield progress
    finally:
        close()
