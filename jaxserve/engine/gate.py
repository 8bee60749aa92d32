"""Memory that the host and the device share: masks, for which steps that are launched already wait on the device.

There is room for the masks of one step: those of the next are made when its tokens have come.
"""

import atexit
import ctypes
import logging
import weakref

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.ops import waiting

log = logging.getLogger("jaxserve")
CYCLE, HEAD = waiting.CYCLE, waiting.HEAD
PATIENCE = 60.0  # seconds that a step waits; then its rows have nothing left to choose


class Gate:
    """Steps wait before it for their masks."""

    def __init__(self, device, put, rows, words):
        """put: places an array of the host, or a list of them, where programs take it; rows: of masks, at most.

        The memory is of `device`, and others of its process read it as well.
        """
        begin = -(-(HEAD + rows) // HEAD) * HEAD
        memory, owner = _shared(device, begin + rows * words)
        self.bound = memory[HEAD : HEAD + rows]  # int32[rows]  0: a row may draw everything, and has no mask
        self.masks = memory[begin:].reshape(rows, words)
        self._flag, self._newest = memory[:1], 0
        address = memory.ctypes.data
        numbers = (*range(CYCLE), waiting.FREE)
        *self._tickets, self.free = put([waiting.ticket(address, n, begin, PATIENCE) for n in numbers])
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

    def open_wide(self):
        """Nobody waits any more, whatever may be in `masks`."""
        self._flag[0] = waiting.WIDE


def _open_wide(gate):
    if (left := gate()) is not None:
        left.open_wide()


def _shared(device, count):
    """int32[count] that the device can read, all 0, and what keeps it."""
    try:
        return _by_jax(device, count)
    except Exception as error:
        if device.platform == "cpu":
            raise
        log.debug("no page-locked memory by JAX: %s", error)
        return _by_cuda(device, count)


def _by_jax(device, count):
    where = SingleDeviceSharding(device, memory_kind="pinned_host")
    owner = jax.block_until_ready(jax.device_put(np.zeros(count, np.int32), where))
    memory = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(owner.unsafe_buffer_pointer()))
    memory[::HEAD] = 1 + np.arange(len(memory[::HEAD]))
    there = jax.device_put(owner, SingleDeviceSharding(device, memory_kind="device"))
    if not np.array_equal(np.asarray(there), memory):
        raise ValueError("the memory is not where it says")
    memory[:] = 0
    return memory, owner


def _by_cuda(device, count):
    cuda, context, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    for error in (
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.local_hardware_id),
        cuda.cuCtxSetCurrent(context),
        cuda.cuMemHostAlloc(ctypes.byref(address), ctypes.c_size_t(4 * count), 3),  # portable, and mapped
    ):
        if error:
            raise ValueError(f"no page-locked memory: CUDA's error {error}")
    memory = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address.value))
    memory[:] = 0
    return memory, cuda  # never given back
