"""Turns a plan into one packed array and dispatches the step.  The only place where a shape is chosen.

T tokens of a step, R rows, P pages a row; a lane is a request's seat on the device, a row its place in one step.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import mesh as meshes
from jaxserve.cache import PagedKV
from jaxserve.engine.programs import compile_all
from jaxserve.sampling import Sampling, Tables, bias_rows, table_rows
from jaxserve.step import ROW, ROW_WIDTH, Shape, State, score, seat, step

NO_LANE = 2**30  # out of range: what the row draws is dropped
START, COUNT, LANE, ROPE = range(len(ROW))
SCORED = 64  # tokens of a step that scores a prompt
# From so many tokens cuBLAS multiplies faster than the kernels that XLA generates: a step of a 1.8B model on an H200
# takes 2.95 ms, not 3.19, at 64, 3.87, not 4.53, at 512, 19.2, not 20.8, at 4096; but 2.09, not 1.97, at 16.
CUBLAS_FROM = 48


@dataclass(frozen=True)
class Sizes:
    """The sizes for which programs are compiled, each ascending; the last is the most that a step may have."""

    tokens: tuple[int, ...]  # steps with prompts
    rows: tuple[int, ...]  # steps of one token a row
    pages: tuple[int, ...]  # a row

    @classmethod
    def choose(cls, platform, plan):
        """Few on the CPU, where compiling costs what running saves; more on a GPU."""
        cpu = platform == "cpu"
        if cpu:
            rows, tokens = (1, 4, 16, 64, 256), (64, 256, 2048)
        else:  # XLA's product with one row is slower than that with two (0.7 ms a step of a 1.8B model on an H200)
            rows = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 224, 256, 384, 512, 768, 1024)
            tokens = (64, 128, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
            tokens += (6144, 8192, 12288, 16384)
        table = -(-plan.session_len // plan.page_size)
        lanes = max(plan.lanes, rows[0])
        return cls(_upto(tokens, plan.budget), _upto(rows, lanes), (table,) if table <= 128 else (128, table))


def _upto(sizes, most):
    return (*(size for size in sizes if size < most), most)


def bucket(n, sizes):
    """The smallest compiled size that holds n."""
    if n > sizes[-1]:
        raise ValueError(f"{n} is over the largest compiled size, {sizes[-1]}")
    return sizes[bisect_left(sizes, n)]


class InFlight:
    """A step that was dispatched: reading waits for it."""

    def __init__(self, chunks, drawn, shape):
        self.chunks, self.drawn = chunks, drawn
        self.tokens, self.padded = sum(c.stop - c.start for c in chunks), shape.tokens
        self.wants = shape.full and any(c.emits and c.request.params.logprobs is not None for c in chunks)
        for array in self._wanted():  # asked for later, they would come when the step after this one ends
            array.copy_to_host_async()

    def _wanted(self):
        drawn = self.drawn
        return (drawn.tokens, drawn.logprob, drawn.top_ids, drawn.top_logprobs) if self.wants else (drawn.tokens,)

    def read(self):
        """(tokens, logprobs or None, tops or None), an entry for each chunk; a token below 0 stands for NaN logits."""
        tokens, *rest = (np.asarray(x)[: len(self.chunks)].tolist() for x in self._wanted())
        if not rest:
            return tokens, None, None
        logprobs, ids, values = rest
        counts = [c.request.params.logprobs for c in self.chunks]
        tops = [tuple(zip(i[:k], v[:k])) if k else () for i, v, k in zip(ids, values, counts)]
        return tokens, [p if k is not None else None for p, k in zip(logprobs, counts)], tops


class Runner:
    """Owns the device arrays and the compiled programs."""

    def __init__(self, cfg, mesh, plan, dtype, shapes):
        """cfg: the padded model.  shapes: Params as ShapeDtypeStructs; `params` is set when they are loaded."""
        self.cfg, self.mesh, self.plan, self.shapes, self.params = cfg, mesh, plan, shapes, None
        self.sizes = Sizes.choose(mesh.devices.flat[0].platform, plan)
        vocab = shapes.embed.shape[0]
        self.whole = whole = meshes.sharding(mesh)
        newest = jax.ShapeDtypeStruct((plan.lanes,), jnp.int32, sharding=whole)
        tables = Tables.shape(plan.lanes, vocab, whole)
        self.state_shape = State(PagedKV.shape(cfg, plan.pages, plan.page_size, mesh, dtype), newest, tables)
        self.programs, self.state = {}, None
        self.on_cpu = mesh.devices.flat[0].platform == "cpu"
        # XLA's collectives between virtual CPU devices deadlock when two programs run at once.
        self.one_at_a_time = mesh.size > 1 and self.on_cpu
        # By lane: what is the same in every step of the request seated there.
        self.seated = [None] * plan.lanes
        self.rows = np.zeros((plan.lanes, ROW_WIDTH), np.int32)
        self.table = np.zeros((plan.lanes, self.sizes.pages[-1]), np.int32)
        self.filled = [0] * plan.lanes

    def compile(self, folder, progress=None):
        """Compiles every program that can be needed; nothing is compiled after it."""
        jobs = {shape: (step, self._arguments(shape), self._options(shape)) for shape in self._shapes()}
        scoring = Shape(SCORED, 1, self.sizes.pages[-1], False)
        target = self._struct((SCORED,))
        jobs["score"] = (score, (*self._arguments(scoring), target), self._options(scoring))
        jobs["seat"] = (
            seat,
            (self.state_shape, *self._structs(table_rows(None, self.shapes.embed.shape[0], self.plan.session_len))),
            None,
        )
        # What float32 means: a GPU would round the factors of a product to 10 bits (TF32) otherwise.
        precision = "highest" if self.shapes.embed.dtype == jnp.float32 else None
        with meshes.on(self.mesh), jax.default_matmul_precision(precision):
            self.programs = compile_all(jobs, list(self.mesh.devices.flat), folder, progress)

    def _options(self, shape):
        """Compiler options of a program."""
        if self.on_cpu or shape.tokens < CUBLAS_FROM:
            return None
        return {"xla_gpu_enable_triton_gemm": False}

    def _shapes(self):
        for pages in self.sizes.pages:
            for full in (False, True):
                yield from (Shape(rows, rows, pages, full) for rows in self.sizes.rows)
                # One row more than tokens can never be: T == R means one token a row (cache.Spans).
                yield from (Shape(tokens, self._rows_of(tokens), pages, full) for tokens in self.sizes.tokens)

    def _rows_of(self, tokens):
        """Rows of a step with prompts."""
        return min(self.plan.lanes, tokens - 1)

    def _struct(self, shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(self.mesh))

    def _structs(self, arrays):
        return tuple(self._struct(np.shape(x), np.asarray(x).dtype) for x in arrays)

    def _arguments(self, shape):
        return (self.cfg, shape, self.shapes, self.state_shape, self._struct((shape.sections[-1],)))

    def workspace(self):
        """Bytes on a device that the largest program, as compiled, and the sampler's tables take."""
        found = (program.memory_analysis() for program in self.programs.values())
        sizes = [m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in found if m is not None]
        tables = jax.tree.leaves(self.state_shape.tables)
        return max(sizes, default=0) + sum(math.prod(x.shape) * x.dtype.itemsize for x in tables)

    def reset(self):
        """A fresh, empty state: at start, and after a step that failed with its state donated."""
        self.state = None  # the old pool goes before the new one is allocated
        make = jax.jit(
            lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.state_shape),
            out_shardings=jax.tree.map(lambda s: s.sharding, self.state_shape),
        )
        self.state = make()
        self.seated = [None] * self.plan.lanes

    def release(self):
        """Gives the device's memory back."""
        self.state = self.params = None
        self.programs = {}

    def warm_up(self):
        """Runs the programs on padding, so that the first request meets nothing new; on the CPU, one of them."""
        shapes = list(self._shapes())
        for shape in shapes[:1] if self.on_cpu else shapes:
            words = self._pack((), shape)
            for _ in range(2):  # the second run records the CUDA graph
                self.state, _drawn = self.programs[shape](self.params, self.state, words)
        if not self.on_cpu:
            self._sit(None, 0)
            self.score((), 0, np.zeros(self.sizes.pages[-1], np.int32), 0)
        jax.block_until_ready(self.state)

    def check(self, request):
        """ValueError if its biases and bad words name no tokens, or are too many.  Safe on any thread."""
        if request.params.tables:
            bias_rows(request.params, request.stop_ids, self.cfg.vocab)

    def dispatch(self, chunks):
        """Starts a step and returns at once."""
        for chunk in chunks:
            if chunk.grew:
                self._seat(chunk.request)
        tokens, rows = sum(c.stop - c.start for c in chunks), len(chunks)
        pages = bucket(max(len(c.request.pages) for c in chunks), self.sizes.pages)
        full = any(c.emits and not c.request.params.plain for c in chunks)
        if tokens == rows and rows <= self.sizes.rows[-1]:
            size = bucket(rows, self.sizes.rows)
            shape = Shape(size, size, pages, full)
        else:
            size = next(t for t in self.sizes.tokens if t >= tokens and self._rows_of(t) >= rows)
            shape = Shape(size, self._rows_of(size), pages, full)
        if self.one_at_a_time:
            jax.block_until_ready(self.state)
        # Placed first: a program that is called with an array of the host takes 0.2 ms longer over it.
        words = jax.device_put(self._pack(chunks, shape), self.whole)
        self.state, drawn = self.programs[shape](self.params, self.state, words)
        return InFlight(chunks, drawn, shape)

    def _seat(self, request):
        """Notes what does not change while a request keeps its lane, and its new pages."""
        lane, pages = request.lane, request.pages
        if self.seated[lane] != (request, request.preemptions):
            self.seated[lane], self.filled[lane] = (request, request.preemptions), 0
            self.rows[lane, ROPE] = request.prompt_len
            Sampling.pack(request.params, 0, self.rows[lane, len(ROW) :])
            if request.params.tables:
                self._sit(request, lane)
        if self.filled[lane] < len(pages):
            self.table[lane, self.filled[lane] : len(pages)] = pages[self.filled[lane] :]
            self.filled[lane] = len(pages)

    def _sit(self, request, lane):
        rows = table_rows(request, self.shapes.embed.shape[0], self.plan.session_len, lane)
        self.state = self.programs["seat"](self.state, *rows)

    def _pack(self, chunks, shape):
        """The step as one int32 array; see step.Batch.unpack."""
        at_rows, at_pages, end = shape.sections
        words, n = np.zeros(end, np.int32), len(chunks)
        token = words[: shape.tokens]
        rows = words[at_rows : at_rows + shape.rows * ROW_WIDTH].reshape(shape.rows, ROW_WIDTH)
        rows[:, LANE] = NO_LANE
        if not n:
            return words
        lanes = [c.request.lane for c in chunks]
        rows[:n] = self.rows[lanes]
        rows[:n, START] = [c.start for c in chunks]
        rows[:n, COUNT] = [c.stop - c.start for c in chunks]
        rows[:n, LANE] = [lane if c.emits else NO_LANE for lane, c in zip(lanes, chunks)]
        rows[:n, len(ROW) + Sampling.STEP] = [c.request.length - c.request.prompt_len - c.emits for c in chunks]
        words[at_pages:].reshape(shape.rows, shape.pages)[:n] = self.table[lanes, : shape.pages]
        at = 0
        for chunk in chunks:
            known = chunk.request.tokens[chunk.start : chunk.stop]
            stop = at + chunk.stop - chunk.start
            token[at : at + len(known)] = known
            token[at + len(known) : stop] = -1  # still on the device
            at = stop
        return words

    def score(self, tokens, start, pages, length, targets=()):
        """Computes `tokens` at positions from `start` of a sequence of `length` in the pages `pages`.  At most SCORED.

        Returns device arrays with SCORED rows: log-probability of each target, logits, hidden states.
        """
        shape = Shape(SCORED, 1, self.sizes.pages[-1], False)
        at_rows, at_pages, end = shape.sections
        words, target = np.zeros(end, np.int32), np.zeros(SCORED, np.int32)
        words[: len(tokens)], target[: len(targets)] = tokens, targets
        row = words[at_rows : at_rows + ROW_WIDTH]
        row[START], row[COUNT], row[LANE], row[ROPE] = start, len(tokens), NO_LANE, length
        words[at_pages : at_pages + len(pages)] = pages
        self.state, out = self.programs["score"](self.params, self.state, words, target)
        return out
