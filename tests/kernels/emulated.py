"""Triton's interpreter with inline assembly: kernels on a CPU as they are, their instructions by asm.py."""

import types

import jax.numpy as jnp
import numpy as np

from tests.kernels import asm

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint8": "u8"}


def on_the_host(monkeypatch):
    """The interpreter takes arrays of the host as they are, and works with NumPy 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_for_numpy_2_4(tensor, scope):  # where an array of one element is no Python integer any more
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_for_numpy_2_4)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *args: None)


def emulate(monkeypatch, module):
    """The interpreter for a module's kernels on a GPU of 4 cores.  What they load must be in their arguments."""
    on_the_host(monkeypatch)
    launcher = Launcher(monkeypatch)
    monkeypatch.setattr(module, "triton_call", launcher)
    monkeypatch.setattr(module, "cores", lambda: 4)
    return launcher


class Argument:
    """An array as the interpreter wants it."""

    def __init__(self, array):
        self.array, self.dtype = array, TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


class Launcher:
    """What `triton_call` does, by the interpreter.  No kernel changes its inputs; what it does not write is NaN."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpreterBuilder

        self.memory, self.shared = None, {}
        launcher = self

        def inline_asm(_, *arguments):
            return launcher._assembly(*arguments)

        monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", inline_asm)

    def __call__(self, kernel, *inputs, out, grid, warps, stages, **constants):
        assert constants["WARPS"] == warps
        arrays = [x if isinstance(x, int) else np.array(x) for x in inputs]
        outputs = [np.full(x.shape, np.nan, x.dtype) for x in out]
        self.memory = asm.Memory(*(a for a in [*arrays, *outputs] if not isinstance(a, int)))
        kernel[grid](*(a if isinstance(a, int) else Argument(a) for a in [*arrays, *outputs]), **constants)
        for array, x in zip(arrays, inputs, strict=True):
            assert isinstance(array, int) or array.tobytes() == np.asarray(x).tobytes()  # NaN, too
        return tuple(jnp.asarray(a) for a in outputs)

    def _assembly(self, text, kinds, values, results, is_pure, pack):
        from triton.runtime.interpreter import TensorHandle, _get_np_dtype

        assert pack == 1
        sizes = [-bits for bits in asm.parse(text)[0].values() if bits < 0]
        if sizes:  # it stays what it is until a program, or the next of its instructions, declares some
            self.shared = {"shared": asm.unset(*sizes)}
        with np.errstate(over="ignore", invalid="ignore"):  # of what nobody will read
            out = asm.run(text, kinds, [v.data for v in values], **{"global": self.memory}, **self.shared)
        handles = [TensorHandle(bits.view(_get_np_dtype(t)), t.scalar) for bits, t in zip(out, results, strict=True)]
        return types.SimpleNamespace(get_result=handles.__getitem__)


def close(got, want, error):
    """Whether the largest difference is at most `error` of the largest value."""
    assert got.shape == want.shape
    got, want = (np.asarray(a, np.float64) for a in (got, want))
    assert np.abs(got - want).max() <= error * np.abs(want).max()
