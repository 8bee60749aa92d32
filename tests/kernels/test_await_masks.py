"""Waiting for masks: the definition, and the kernels in Triton's interpreter with a thread that opens later."""

import os
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import await_masks as module
from pallas_kernels import triton_call
from tests.kernels.emulated import Argument, on_the_host

interpreted = pytest.mark.skipif(
    bool(triton_call.MISSING) or os.environ.get("TRITON_INTERPRET") != "1", reason="needs triton and TRITON_INTERPRET=1"
)
R, W, AT = 6, 1100, 128


def shared(seed=0, words=W):
    """The shared memory, and views of its flag, of which rows are bound, and of the masks."""
    memory = np.zeros(AT + -(-R * words // module.LINE) * module.LINE, np.int32)
    flag, bound = memory[:1], memory[module.HEAD : module.HEAD + R]
    masks = memory[AT : AT + R * words].reshape(R, words)
    draw = np.random.default_rng(seed)
    masks[:], bound[:] = draw.integers(-(1 << 31), 1 << 31, (R, words)), [1, 0, 1, 1, 0, 1]
    return memory, flag, bound, masks


def reference(ticket, flag, bound, masks, rows):
    return np.asarray(module.await_masks_reference(ticket, flag[0], bound, masks, rows=rows))


@pytest.mark.parametrize(
    "newest, number, there", [(5, 5, True), (6, 5, True), (4, 5, False), (0, 15, True), (15, 0, False), (-1, 9, True)]
)
def test_definition(newest, number, there):
    memory, flag, bound, masks = shared()
    flag[0] = newest
    got = reference(module.ticket(memory.ctypes.data, number, AT, 60), flag, bound, masks, 5)
    assert got.shape == (5, W)
    for row in range(5):
        expected = (masks[row] if bound[row] else -1) if there else 0
        assert (got[row] == expected).all()
    free = reference(module.ticket(memory.ctypes.data, module.FREE, AT, 60), flag, bound, masks, 5)
    assert (free == -1).all()


def test_ticket():
    for address in (0x7FFF_FFFF_F000, 0x5555_8000_0040, 64):
        words = module.ticket(address, 3, AT, 0.25).tolist()
        assert words[1] << 31 | words[0] == address and words[2:5] == [3, AT, 250]
    for address, masks in ((68, AT), (64, AT + 4)):
        with pytest.raises(ValueError, match=f"begin {masks} words behind address {address:#x}"):
            module.ticket(address, 3, masks, 0.25)


@pytest.fixture
def run(monkeypatch):
    """`await_masks` by the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    on_the_host(monkeypatch)

    def assembly(_, text, kinds, values, results, is_pure, pack):
        assert not is_pure
        if text == module.CLOCK:
            found = time.monotonic_ns()
        elif text == module.TELL:
            found = values[1].data.item()
            np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int32 * 1).from_address(int(values[0].data.item())))[0] = found
        else:
            assert (text, kinds) == (module.FLAG, "=r,l")
            time.sleep(1e-4)
            found = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int32 * 1).from_address(int(values[0].data.item())))[0]
        data = np.full(1, found, _get_np_dtype(results[0]))
        return types.SimpleNamespace(get_result=lambda i: TensorHandle(data, results[i].scalar))

    def call(kernel, *inputs, out, grid, warps, stages, **constants):
        outputs = [np.full(x.shape, 99, x.dtype) for x in out]
        kernel[grid](*(Argument(np.asarray(a)) for a in [*inputs, *outputs]), **constants)
        return tuple(outputs)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", assembly)
    monkeypatch.setattr(module, "triton_call", call)
    return lambda ticket, rows, words=W: module.await_masks(ticket, np.zeros(1, np.float32), rows=rows, words=words)


@interpreted
@pytest.mark.parametrize("number", [module.FREE, 0, 3, 15])
def test_kernels(run, number):
    memory, flag, bound, masks = shared(number + 1)
    wanted, opened = masks.copy(), []
    masks[:], flag[0] = 0, (number - 1) % module.CYCLE
    ticket = module.ticket(memory.ctypes.data, number, AT, 60)

    def open_it():
        masks[:] = wanted
        opened.append(time.monotonic())
        flag[0] = number

    timer = threading.Timer(0.1, open_it)
    if number != module.FREE:
        timer.start()
    got, ended = run(ticket, 5), time.monotonic()
    if number != module.FREE:
        timer.join()
        assert ended >= opened[0]
    np.testing.assert_array_equal(got, reference(ticket, flag, bound, wanted, 5))
    # What came after it has opened it, too.
    flag[0] = (number + 3) % module.CYCLE
    np.testing.assert_array_equal(run(ticket, R), reference(ticket, flag, bound, wanted, R))
    flag[0] = module.WIDE
    np.testing.assert_array_equal(run(ticket, R), reference(ticket, flag, bound, wanted, R))


@interpreted
@pytest.mark.parametrize("words", [1, 7, 32, 511, 1001, 1024])
def test_rows_that_begin_within_a_line(run, words):
    memory, flag, bound, masks = shared(words, words)
    ticket = module.ticket(memory.ctypes.data, 2, AT, 60)
    flag[0] = 2
    for rows in (1, 5, R):
        np.testing.assert_array_equal(run(ticket, rows, words), reference(ticket, flag, bound, masks, rows))


@interpreted
def test_tell(run):
    memory, *_, masks = shared()
    before, at = masks.copy(), AT + (R - 1) * W  # in the place of the last masks
    tokens = np.arange(40, 40 + R, dtype=np.int32)
    for number, place in ((3, 0), (module.FREE, at), (9, at)):
        assert memory[module.TOLD] == 0 and (masks == before).all()
        ticket = module.ticket(memory.ctypes.data, number, AT, 60, place)
        assert (module.tell(ticket, tokens) == tokens).all()
    assert memory[module.TOLD] == 9 and (memory[at : at + R] == tokens).all()
    assert (masks[:-1] == before[:-1]).all() and (masks[-1, R:] == before[-1, R:]).all()


@interpreted
def test_patience_ends(run):
    memory, *_ = shared()
    began = time.monotonic()
    assert not run(module.ticket(memory.ctypes.data, 1, AT, 0.05), R).any()
    assert time.monotonic() - began >= 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("words", [W, 1001])
def test_on_a_gpu(words):
    """A program that waits while another thread opens, beside transfers that must not wait for it."""
    from jaxserve.engine.gate import Gate

    gate = Gate(jax.devices()[0], jax.device_put, R, words)
    program = jax.jit(lambda ticket: module.await_masks(ticket, jnp.zeros(1), rows=R, words=words))
    told = jax.jit(module.tell)
    assert (np.asarray(program(gate.free)) == -1).all()
    draw = np.random.default_rng(0)
    for _ in range(2 * module.CYCLE):
        number, ticket = gate.next()
        waits, other = program(ticket), jax.device_put(np.arange(9))
        wanted, bound = draw.integers(-(1 << 31), 1 << 31, (R, words)), draw.integers(0, 2, R)

        def opens(number=number, wanted=wanted, bound=bound):
            gate.masks[:], gate.bound[:] = wanted, bound
            gate.open(number)

        threading.Timer(0.005, opens).start()
        np.testing.assert_array_equal(np.asarray(waits), np.where(bound[:, None], wanted, -1))
        assert int(other.sum()) == 36
        tokens = draw.integers(0, 1 << 31, R).astype(np.int32)
        returned = told(ticket, tokens)
        seen = gate.told(number, returned)
        assert seen is None or seen == tokens.tolist()
        assert np.asarray(returned).tolist() == tokens.tolist() == gate.tokens.tolist()
