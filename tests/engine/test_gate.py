"""The gate's memory, and the tickets of steps."""

import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import jax
import numpy as np

from jaxserve import ops
from jaxserve.engine.gate import CYCLE, HEAD, Gate

ROWS, WORDS = 70, 5


def read(gate, ticket):
    """What a step with this ticket finds: whether it may pass, and the masks."""
    address, number, begin = int(ticket[1]) << 31 | int(ticket[0]), int(ticket[2]), int(ticket[3])
    memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int32 * (begin + ROWS * WORDS)).from_address(address))
    bound, masks = memory[HEAD:begin], memory[begin:].reshape(ROWS, WORDS)
    found = ops.waiting.await_masks_reference(ticket, memory[0], bound, masks, rows=ROWS)
    return bool(ops.waiting.is_open(memory[0], number)), np.asarray(found)


def test_who_has_a_ticket_finds_the_masks():
    gate = Gate(jax.devices()[0], jax.device_put, ROWS, WORDS)
    assert (read(gate, gate.free)[1] == -1).all()
    tickets = [gate.next() for _ in range(2)]
    for step in range(3 * CYCLE):
        number, ticket = tickets.pop(0)
        assert not read(gate, ticket)[0] and not read(gate, tickets[0][1])[0]
        gate.masks[:], gate.bound[:] = step, np.arange(ROWS) % 2
        gate.open(number)
        passes, masks = read(gate, ticket)
        assert passes and not read(gate, tickets[0][1])[0]
        assert (masks[1::2] == step).all() and (masks[::2] == -1).all()
        tickets.append(gate.next())
    gate.open_wide()
    gate.open(number)
    assert all(read(gate, ticket)[0] for _, ticket in tickets)


def test_tokens_are_told():
    gate = Gate(jax.devices()[0], jax.device_put, ROWS, WORDS)
    number, ticket = gate.next()
    there = [False, False, True]
    array = SimpleNamespace(is_ready=lambda: there.pop(0))
    assert gate.told(number, array) is None and not there  # the device's own way was the first
    size = int(ticket[5]) + ROWS
    address = int(ticket[1]) << 31 | int(ticket[0])
    memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int32 * size).from_address(address))
    memory[-ROWS:], memory[ops.waiting.TOLD] = np.arange(ROWS), number
    assert gate.told(number, None) == list(range(ROWS)) and not gate.masks.any() and not gate.bound.any()


def test_nothing_keeps_it():
    gate = Gate(jax.devices()[0], jax.device_put, ROWS, WORDS)
    ref = weakref.ref(gate)
    del gate
    gc.collect()
    assert ref() is None


def test_it_opens_when_the_process_ends():
    code = """
import atexit, jax
from jaxserve.engine.gate import Gate
gate = Gate(jax.devices()[0], jax.device_put, 2, 2)
atexit._run_exitfuncs()
print("flag", gate._flag[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["flag", "-1"], done.stderr
