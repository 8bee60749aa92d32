"""Runs the PTX that kernels have between the lines of Triton and Mosaic, all threads at once, in NumPy.

Knows the few instructions that ours are made of, and raises on what else it meets: a register of another width or one
that nobody has written, an address outside of the arrays or not aligned, an input read after an output that may have
its register was written.  What an instruction leaves alone, because its predicate is false, is junk.
"""

import functools
import re

import ml_dtypes
import numpy as np

WIDTH = {"r": 32, "f": 32, "l": 64, "h": 16}  # bits of an operand, by LLVM's letter
TYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
SHARED = 1 << 12  # where shared memory begins that the code declares
JUNK = np.random.default_rng(0)


class Memory:
    """Arrays that stand where `at` says, or at their own addresses."""

    def __init__(self, *arrays, at=None):
        at = [a.ctypes.data for a in arrays] if at is None else at
        self.coming = [[]]  # groups of copies to this memory, the last one still open
        self.places = [(start, a.reshape(-1).view(np.uint8)) for start, a in zip(at, arrays, strict=True)]

    def __call__(self, address, wanted, size, aligned):
        """For each array that is meant: its bytes, which threads mean it, and where in it [threads, size]."""
        address, left = address.astype(np.int64), wanted.copy()
        assert not (address[wanted] % aligned).any(), f"an address is not a multiple of {aligned}"
        for start, data in self.places:
            mine = left & (address >= start) & (address + size <= start + data.size)
            left &= ~mine
            yield data, mine, (address[mine] - start)[:, None] + np.arange(size)
        assert not left.any(), f"threads {np.flatnonzero(left)} read or write outside of all arrays"

    def check(self, address, wanted, size):
        for _ in self(address.reshape(-1), wanted.reshape(-1), size, size):
            pass


@functools.cache
def parse(text):
    """Declared registers {name: bits} and arrays {name: -bytes}, and the instructions (predicate, name, operands)."""
    registers, instructions = {}, []
    text = re.fullmatch(r"\s*\{(.*)\}\s*", text, re.S)[1]
    for line in filter(None, (line.strip() for line in text.split(";"))):
        if declared := re.fullmatch(r"\.shared \.align 16 \.b8 (\w+)\[(\d+)\]", line):
            registers[declared[1]] = -int(declared[2])
        elif declared := re.fullmatch(r"\.reg \.(\w+) (.*)", line):
            bits = 1 if declared[1] == "pred" else int(declared[1][1:])
            for name in declared[2].split(","):
                name, count = re.fullmatch(r"(\w+)(?:<(\d+)>)?", name.strip()).groups()
                registers |= {f"{name}{i}": bits for i in range(int(count))} if count else {name: bits}
        else:
            predicate, name, rest = re.fullmatch(r"(?:@(\w+) )?([\w.:]+)(?: (.*))?", line, re.S).groups()
            operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest or "")
            instructions.append((predicate, name, [_operand(o) for o in operands]))
    return registers, instructions


def _operand(text):
    """A name, a number, [name, offset] of an address, or (names) of several."""
    if text[0] == "{":
        return tuple(re.findall(r"[\w$]+", text))
    if text[0] == "[":
        name, offset = re.fullmatch(r"\[([\w$]+)(?: \+ (\d+))?\]", text).groups()
        return [name, int(offset or 0)]
    return int(text, 0) if re.fullmatch(r"\d+|0x[\dA-F]+", text) else text


def unset(size):
    """Shared memory that nobody has written."""
    return Memory(np.full(size, 255, np.uint8), at=[SHARED])


def run(text, kinds, inputs, **memories):
    """What the outputs of inline assembly are, as unsigned integers [threads], for inputs [threads] of any type.

    kinds: LLVM's constraints; memories: a Memory for each state space.
    """
    threads = Threads(text, kinds, inputs, memories)
    for instruction in parse(text)[1]:
        threads.execute(*instruction)
    return [threads.values[f"${i}"] for i in range(threads.outputs)]


class Threads:
    """The registers of all threads; `values` holds bits as unsigned integers."""

    def __init__(self, text, kinds, inputs, memories):
        kinds = [k for k in kinds.split(",") if k[0] != "~"]
        self.outputs = sum(k[0] == "=" for k in kinds)
        out, given = kinds[: self.outputs], kinds[self.outputs :]
        given = [out[int(k)][-1] if k.isdigit() else k for k in given]
        self.shared = {f"${i}": k[-1] for i, k in enumerate(out) if k[1] != "&"}  # with inputs, perhaps
        self.inputs = {f"${self.outputs + i}": k for i, k in enumerate(given)}
        self.lost = set()  # letters whose inputs may be overwritten
        self.count, self.memories = inputs[0].size, memories
        self.bits = parse(text)[0] | {f"${i}": WIDTH[k[-1]] for i, k in enumerate(out + given)}
        self.values = {}
        for name, bits in self.bits.items():  # shared memory that is not set
            if bits < 0:
                self.memories = {"shared": unset(-bits)} | memories
                self.values[name] = np.full(self.count, SHARED, np.uint32)
        self.bits = {name: 32 if bits < 0 else bits for name, bits in self.bits.items()}
        for (name, kind), value in zip(self.inputs.items(), inputs, strict=True):
            assert value.dtype.itemsize * 8 == WIDTH[kind], f"{name} is {value.dtype}, its constraint {kind}"
            self.values[name] = value.view(f"u{value.dtype.itemsize}")
        for i, kind in enumerate(kinds[self.outputs :]):
            if kind.isdigit():
                self.values[f"${kind}"] = self.values[f"${self.outputs + i}"]

    def read(self, name, bits=32):
        if isinstance(name, int):
            return np.full(self.count, name, f"u{bits // 8}")
        assert self.inputs.get(name) not in self.lost, f"{name} may be the register of an output that is written"
        assert self.bits[name] == bits, f"{name} has {self.bits[name]} bits, not {bits}"
        return self.values[name]

    def write(self, name, value, where):
        assert name not in self.inputs, f"{name} is an input"
        bits = self.bits[name]
        kind = bool if bits == 1 else f"u{bits // 8}"
        if not where.all():
            old = self.values.get(name, JUNK.integers(0, 2 if bits == 1 else 1 << bits, self.count, dtype=kind))
            value = np.where(where, value, old)
        self.values[name] = value.astype(kind)
        if name in self.shared:
            self.lost.add(self.shared[name])

    def execute(self, predicate, name, operands):
        where = self.read(predicate, 1) if predicate else np.ones(self.count, bool)
        op, *how = name.split(".")
        if op in ("ld", "st"):
            return self.move(op, how, operands, where)
        if op == "cp":
            return self.copy(name.split(".")[2], operands, where)
        to, *of = operands
        if op == "bar":  # all threads are at the same instruction anyway
            return None
        if op == "shfl":
            assert how == ["sync", "bfly", "b32"]
            assert of[1:] in ([n, 31, 0xFFFFFFFF] for n in (1, 2, 4, 8, 16))
            values = (self.read(of[0])[np.arange(self.count) ^ of[1]],)
        elif op == "mma":
            values = (_mma_of_bytes if "s32" in how else _mma)(how, *([self.read(n) for n in names] for names in of))
        elif op == "mov" and isinstance(to, tuple):
            assert len(to) == 2
            both = self.read(of[0])
            values = both & 0xFFFF, both >> 16
        elif op == "mov" and isinstance(of[0], tuple):
            low, high = (self.read(n, 16).astype(np.uint32) for n in of[0])
            to, values = (to,), (low | high << 16,)
        else:
            values = (INSTRUCTIONS[op](how, *(self.read(n, _width(op, how)) for n in of)),)
        to = (to,) if isinstance(to, str) else to
        bits = 1 if op == "setp" else 16 if len(values) == 2 or how[-1] == "b16" else 32
        for n, value in zip(to, values, strict=True):
            assert self.bits[n] == bits, f"{n} has {self.bits[n]} bits, {name} makes {bits}"
            self.write(n, value, where)

    def copy(self, what, operands, where):
        """cp.async: 16 bytes, or zeros, from global to shared memory; there when their group has been waited for."""
        groups = self.memories["shared"].coming
        if what == "commit_group":
            groups.append([])
        elif what in ("wait_group", "wait_all"):
            while len(groups) > (operands[0] if operands else 0) + 1:
                for data, at, moved in groups.pop(0):
                    data[at] = moved
            assert operands or not groups[0], "copies that are in no group"
        else:
            (to, offset), (source, of), size, given = operands
            assert (what, size) == ("cg", 16)
            given, moved = self.read(given), np.zeros((self.count, 16), np.uint8)
            assert np.isin(given, (0, 16)).all()
            for data, mine, at in self.memories["global"](self.read(source, 64) + of, where & (given > 0), 16, 16):
                moved[mine] = data[at]
            for data, mine, at in self.memories["shared"](self.read(to) + offset, where, 16, 16):
                groups[-1].append((data, at, moved[mine]))

    def move(self, op, how, operands, where):
        """ld and st: `how` is the space, what caches do, how many, and the type of each."""
        place, names = operands if op == "st" else operands[::-1]
        names = names if isinstance(names, tuple) else (names,)
        assert len(names) == (4 if "v4" in how else 2 if "v2" in how else 1)
        memory, item = self.memories[how[0]], int(how[-1][1:]) // 8
        address = self.read(place[0], 64 if how[0] == "global" else 32).astype(np.int64) + place[1]
        size = item * len(names)
        moved = np.zeros((self.count, size), np.uint8)
        if op == "st":
            moved = np.stack([self.read(n, 8 * item) for n in names], 1).view(np.uint8)
        for data, mine, at in memory(address, where, size, size):
            if op == "st":
                data[at] = moved[mine]
            else:
                moved[mine] = data[at]
        if op == "ld":
            for n, value in zip(names, moved.view(f"u{item}").T, strict=True):
                self.write(n, value.astype(f"u{max(item, self.bits[n] // 8)}"), where)


def _width(op, how):
    """Bits of what an instruction reads."""
    return 16 if how[-1] in ("b16", "f16") and op in ("mov", "cvt") else 32


def _pairs(kind, *registers):
    """The two values of each, as float64."""
    return [r[:, None].view(TYPES[kind]).astype(np.float64) for r in registers]


def _packed(kind, values):
    return values.astype(TYPES[kind]).view(np.uint32)[:, 0]


def _lop3(how, a, b, c, table):
    """Bit by bit: the bits of a, b, c make an index into the table."""
    terms = (((table >> i) & 1) * 0xFFFFFFFF & (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
             for i in range(8))  # fmt: skip
    return functools.reduce(np.bitwise_or, (t.astype(np.uint32) for t in terms))


def _prmt(how, a, b, selector):
    data = np.stack([a, b], 1).view(np.uint8)
    of = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & 15
    assert (of < 8).all()
    return np.take_along_axis(data, of.astype(np.int64), 1).view(np.uint32)[:, 0]


def _two(how, function, *registers):
    assert how[0] == "rn"
    assert how[1].endswith("x2")
    kind = how[1][:-2]
    return _packed(kind, function(*_pairs(kind, *registers)))


def _add(how, a, b):
    return (a.view(np.float32) + b.view(np.float32)).view(np.uint32) if how == ["f32"] else a + b


def _mul(how, a, b):
    if how == ["f32"]:
        return (a.view(np.float32) * b.view(np.float32)).view(np.uint32)
    return _two(how, np.multiply, a, b)


def _cvt(how, *of):
    if how == ["f32", "f16"]:
        return of[0].view(np.float16).astype(np.float32).view(np.uint32)
    assert how[0] == "rn"
    assert how[2] == "f32"
    return _packed(how[1][:-2], np.stack([a.view(np.float32) for a in of[::-1]], 1))  # the first stands above


def _setp(how, a, b):
    assert how == ["ne", "b32"]
    return a != b


def _fma(how, a, b, c):
    if how == ["rn", "f32"]:
        a, b, c = (r.view(np.float32).astype(np.float64) for r in (a, b, c))
        return (a * b + c).astype(np.float32).view(np.uint32)
    return _two(how, lambda a, b, c: a * b + c, a, b, c)


def _approximately(function):
    def run(how, a):
        assert how == ["approx", "ftz", "f32"]
        with np.errstate(over="ignore", divide="ignore"):
            return function(a.view(np.float32)).astype(np.float32).view(np.uint32)

    return run


def _max(how, a, b):
    if how == ["s32"]:
        return np.maximum(a.view(np.int32), b.view(np.int32)).view(np.uint32)
    assert how == ["NaN", "f32"]
    return np.maximum(a.view(np.float32), b.view(np.float32)).view(np.uint32)


INSTRUCTIONS = {
    "mov": lambda how, a: a,
    "shr": lambda how, a, n: a >> n,
    "shl": lambda how, a, n: a << n,
    "and": lambda how, a, b: a & b,
    "or": lambda how, a, b: a | b,
    "lop3": _lop3,
    "prmt": _prmt,
    "fma": _fma,
    "xor": lambda how, a, b: a ^ b,
    "sub": lambda how, a, b: a - b,
    "max": _max,
    "abs": lambda how, a: a & 0x7FFFFFFF,
    "mul": _mul,
    "add": _add,
    "cvt": _cvt,
    "setp": _setp,
    "ex2": _approximately(np.exp2),
    "rcp": _approximately(np.reciprocal),
}


def _mma(how, a, b, c):
    """mma.m16n8k16: registers of a lane as PTX's specification has them; rows of lanes are 4 lanes."""
    kind = how[-2]
    assert how == ["sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32"]
    # [warp, row, column, register, of two] -> matrices
    a, b = (np.stack(_pairs(kind, *r), 1).reshape(-1, 8, 4, len(r), 2) for r in (a, b))
    a = a.reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
    b = b.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    c = np.stack([r.view(np.float32) for r in c], 1).reshape(-1, 8, 4, 2, 2)
    product = (a @ b).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
    return (c + product).astype(np.float32).reshape(-1, 4).view(np.uint32).T


def _mma_of_bytes(how, a, b, c):
    """mma.m16n8k32 of unsigned bytes and signed ones."""
    assert how == ["sync", "aligned", "m16n8k32", "row", "col", "s32", "u8", "s8", "s32"]
    # [warp, row, column, register, of four] -> matrices
    a = np.stack([r[:, None].view(np.uint8) for r in a], 1).astype(np.int64).reshape(-1, 8, 4, 2, 2, 4)
    b = np.stack([r[:, None].view(np.int8) for r in b], 1).astype(np.int64).reshape(-1, 8, 4, 2, 4)
    a = a.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 32)
    b = b.transpose(0, 3, 2, 4, 1).reshape(-1, 32, 8)
    c = np.stack(c, 1).reshape(-1, 8, 4, 2, 2)
    product = (a @ b).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).astype(np.uint32)
    return (c + product).reshape(-1, 4).T
