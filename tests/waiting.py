"""How tests wait for what another thread or process does."""

import time


def soon(condition, seconds=120.0):
    """How many seconds it took until the condition held; AssertionError if it does not in time.

    That is long enough for a busy machine; a smaller limit is part of what is tested.
    """
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"it did not happen in {seconds:g} s"
        time.sleep(0.005)
    return time.monotonic() - began
