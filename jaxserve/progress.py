"""Progress bars on standard error, and nothing where that is not a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BYTES = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
STYLES: dict[str, dict] = {
    "loading": BYTES,
    "saving": BYTES,
    "compiling": {"bar_format": "{l_bar}{bar}| {n_fmt} of {total_fmt} programs [{elapsed}]"},
}


def bar(total: int | None, wanted: bool | None = None, **style):
    """A tqdm bar; wanted=None shows it where people can see it."""
    from tqdm import tqdm

    hidden = not (sys.stderr.isatty() if wanted is None else wanted)
    return tqdm(total=total, disable=hidden, dynamic_ncols=True, file=sys.stderr, **style)


@contextmanager
def stages(wanted: bool | None = None) -> Iterator[Callable[[str, int, int], None]]:
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
