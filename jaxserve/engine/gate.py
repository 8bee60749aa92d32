"""Memory that the host and the device share: masks, for which steps that are launched already wait on the device, and
the tokens that were drawn by them.

There is room for those of one step: the masks of the next are made when its tokens have come.
"""

import atexit
import ctypes
import time
import weakref

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.ops import waiting

CYCLE, HEAD = waiting.CYCLE, waiting.HEAD
LOOK = 20e-6  # seconds between looks for tokens; it takes 50 us more to wake up
PATIENCE = 60.0  # seconds that a step waits; then its rows have nothing left to choose


class Gate:
    """Steps wait before it for their masks."""

    def __init__(self, device, put, rows, words):
        """put: places an array of the host, or a list of them, where programs take it; rows: of masks, at most.

        The memory is of `device`, and others of its process read it as well.
        """
        begin = -(-(HEAD + rows) // HEAD) * HEAD
        end = begin + -(-rows * words // HEAD) * HEAD  # masks are read by whole lines
        memory, owner = _shared(device, end + rows)
        self.bound = memory[HEAD : HEAD + rows]  # int32[rows]  0: a row may draw everything, and has no mask
        self.masks = memory[begin : begin + rows * words].reshape(rows, words)
        self.tokens = memory[end:]  # int32[rows]  of the step whose number is `told`
        self._flag, self._told, self._newest = memory[:1], memory[waiting.TOLD : waiting.TOLD + 1], 0
        address = memory.ctypes.data
        numbers = (*range(CYCLE), waiting.FREE)
        *self._tickets, self.free = put([waiting.ticket(address, n, begin, PATIENCE, end) for n in numbers])
        self._owner = owner
        atexit.register(_open_wide, weakref.ref(self))  # before JAX's own end, which waits for all that was launched

    def next(self):
        """The number of the next opening, and what the step that waits for it takes."""
        self._newest = (self._newest + 1) % CYCLE
        return self._newest, self._tickets[self._newest]

    def open(self, number):
        """Lets those pass who wait for this opening, or an earlier one: `masks` and `bound` are theirs."""
        if self._flag[0] != waiting.WIDE:
            self._flag[0] = number

    def told(self, number, array):
        """What the step with this ticket drew, a list with an entry for each row and more; waits for it.

        None where `array`, its tokens on the device, is known to be there before they are told: to be asked itself.
        """
        while not (known := self._told[0] == number) and not array.is_ready():
            time.sleep(LOOK)
        return self.tokens.tolist() if known else None

    def open_wide(self):
        """Nobody waits any more, whatever may be in `masks`."""
        self._flag[0] = waiting.WIDE


def _open_wide(gate):
    if (left := gate()) is not None:
        left.open_wide()


def _shared(device, count):
    """int32[count] that the device can read and write, all 0, and what keeps it."""
    where = SingleDeviceSharding(device, memory_kind="pinned_host")
    owner = jax.block_until_ready(jax.device_put(np.zeros(count, np.int32), where))
    memory = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(owner.unsafe_buffer_pointer()))
    memory[::HEAD] = 1 + np.arange(len(memory[::HEAD]))
    there = jax.device_put(owner, SingleDeviceSharding(device, memory_kind="device"))
    if not np.array_equal(np.asarray(there), memory):
        raise ValueError("the memory is not where it says")
    memory[:] = 0
    return memory, owner
