"""Calls Triton kernels from JAX, whichever jax-triton is installed.

jax-triton 0.3 lowers to a custom call that XLA keeps out of CUDA graphs, so here its compiled kernel is launched
through the FFI target that jaxlib has beside the old one. 0.4 uses that target itself, but takes other arguments and
leaves the outputs that are aliased out of the kernel's parameters; here they are left out under 0.3 as well.

Without triton (a machine without a GPU) the module still imports, and `available` says what is missing.
"""

import types
import warnings
import zlib

import jax

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    MISSING = None
except ImportError as error:
    tl = types.SimpleNamespace(constexpr=None)  # enough for the kernels' signatures
    MISSING = f"{error.name or 'triton'} is not installed"

    def jit(function):
        return function


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no inline assembly."""
    return not MISSING and triton.knobs.runtime.interpret


OLDEST_COMPUTE_CAPABILITY = 80  # Ampere
TRITON_IR = (1, 1, 5)  # of a serialized call: kernel_call.kernel.ttir, which nothing reads
# Devices that are compiled for without being there, by device kind.
COMPUTE_CAPABILITY = {"NVIDIA H200": 90, "NVIDIA H100 80GB HBM3": 90, "NVIDIA A100-SXM4-80GB": 80, "NVIDIA L4": 89}


def available() -> str | None:
    """None where the kernels can run, otherwise the reason why not."""
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}, not on a GPU"
    if MISSING:
        return MISSING
    try:
        import jax_triton  # noqa: F401
    except Exception as error:  # whatever a mismatch of jax, jaxlib and triton makes it raise
        return f"jax_triton does not import ({error})"
    kind, capability = device()
    if capability < OLDEST_COMPUTE_CAPABILITY:
        return f"{kind} has compute capability {capability / 10}; the kernels need 8.0"
    return None


def device() -> tuple[str, int]:
    """Kind and compute capability (90 for 9.0) of the GPU compiled for: this machine's, or the abstract mesh's."""
    if jax.default_backend() == "gpu":
        first = jax.devices()[0]
        return first.device_kind, round(10 * float(first.compute_capability))
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None or abstract.device_kind not in COMPUTE_CAPABILITY:
        raise ValueError(f"no GPU to compile a Triton kernel for (backend {jax.default_backend()}, mesh of {abstract})")
    return abstract.device_kind, COMPUTE_CAPABILITY[abstract.device_kind]


def cores() -> int:
    """Streaming multiprocessors of the GPU compiled for."""
    if jax.default_backend() == "gpu":
        return jax.devices()[0].core_count
    return jax.sharding.get_abstract_mesh().abstract_device.num_cores


def triton_call(kernel, *inputs, out, grid, in_place=(), warps: int, stages: int, registers=None, **constants):
    """Launches a Triton kernel and returns its outputs as a tuple.

    The kernel's parameters are the inputs (arrays, or Python integers, which are int32 run-time arguments), then one
    pointer for each ShapeDtypeStruct of `out`, then the constants. The inputs at the indices `in_place` (counted
    among all inputs) are also outputs: the kernel writes through the input's pointer, and they are returned after
    `out`.  `registers`: at most so many a thread, where the compiler would take more than occupancy can bear.
    """
    import jax_triton

    launch = _launch_03 if jax_triton.__version__.startswith("0.3.") else _launch_04
    grid = (*grid, 1, 1)[:3]
    return launch(kernel, inputs, tuple(out), grid, tuple(in_place), warps, stages, registers, constants)


def _launch_03(kernel, inputs, out, grid, in_place, warps, stages, registers, constants):
    from jax._src.lib import gpu_triton  # the same module that jax-triton uses
    from jax_triton import triton_lib

    def backend(*target):
        made = triton_lib.get_cuda_backend(*target)
        parse = made.parse_options
        made.parse_options = lambda options: parse(options | {"maxnreg": registers})
        return made

    arrays = [x for x in inputs if not isinstance(x, int)]
    types_ = [
        f"*{triton_lib._JAX_TO_TRITON_TYPE_MAP[x.dtype]}" if not isinstance(x, int) else "i32" for x in (*inputs, *out)
    ]
    integers = [(i, "i32", 0) for i, x in enumerate(inputs) if isinstance(x, int)]  # 0: no program of its own for a 1
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # half of the PTX
        compiled, _ = triton_lib.get_or_create_triton_kernel(
            backend, "cuda", kernel, types_, integers, num_warps=warps, num_stages=stages,
            num_ctas=1, compute_capability=device()[1], enable_fp_fusion=True, metaparams=constants, dump=False,
        )  # fmt: skip
    parameters = [
        gpu_triton.create_scalar_parameter(x, "i32") if isinstance(x, int) else gpu_triton.create_array_parameter(0, 16)
        for x in (*inputs, *out)
    ]
    call = gpu_triton.TritonKernelCall(compiled, *grid, parameters)
    aliases = {sum(not isinstance(x, int) for x in inputs[:i]): len(out) + n for n, i in enumerate(in_place)}
    results = [*out, *(jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in in_place)]
    run = jax.ffi.ffi_call("triton_kernel_call_ffi", results, input_output_aliases=aliases)
    # At every launch of a program XLA looks each kernel in it up by all of these bytes.
    lean = without_field(call.to_proto(kernel.__name__, b""), TRITON_IR)
    return tuple(run(*arrays, opaque=zlib.compress(lean, 9)))


def _launch_04(kernel, inputs, out, grid, in_place, warps, stages, registers, constants):
    import jax_triton
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    # jax 0.12 asks whether a call is needed with one argument more than 0.4.1 takes.  A kernel is, whoever asks.
    partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = lambda *asked: ([True] * len(asked[-1].invars), asked[-1])
    triton.knobs.compilation.disable_line_info = True  # half of the PTX; it is made when the program is lowered
    with warnings.catch_warnings():
        # 0.4 would rather have Refs; aliases are what both versions know.
        warnings.simplefilter("ignore", DeprecationWarning)
        results = jax_triton.triton_call(
            *inputs, kernel=kernel, out_type=[*out, *(jax.typeof(inputs[i]) for i in in_place)], grid=grid,
            name=kernel.__name__, input_output_aliases={i: len(out) + n for n, i in enumerate(in_place)},
            num_warps=warps, num_stages=stages, compute_capability=device()[1],
            backend_options={} if registers is None else {"maxnreg": registers}, **constants,
        )  # fmt: skip
    return tuple(results)


def without_field(message: bytes, path: tuple[int, ...]) -> bytes:
    """A serialized protocol buffer without the field at the end of `path`, numbers of fields that hold each other."""
    out, at = b"", 0
    while at < len(message):
        begin = at
        tag, at = _varint(message, at)
        end = at
        if (kind := tag & 7) == 2:  # a length, and so many bytes
            size, at = _varint(message, at)
            end = at + size
        elif kind == 0:
            _, end = _varint(message, at)
        else:
            end += {1: 8, 5: 4}[kind]
        if tag >> 3 != path[0]:
            out += message[begin:end]
        elif path[1:]:
            inner = without_field(message[at:end], path[1:])
            out += _as_varint(tag) + _as_varint(len(inner)) + inner
        at = end
    return out


def _varint(message, at):
    """An integer of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        value |= (message[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if message[at - 1] < 128:
            return value, at


def _as_varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def cdiv(a, b):
    """a / b, rounded up; integers or integer arrays."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
