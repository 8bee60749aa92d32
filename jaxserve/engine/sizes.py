"""The sizes for which programs are compiled, and the order in which they are."""

from bisect import bisect_left
from dataclasses import dataclass

SCORED = 1024  # most tokens of a step that scores
# Launching takes the host 0.9 to 1.4 ms.  Steps in one launch should take the device longer, yet no new request should
# wait long for them to end: as many as take ENOUGH seconds.
ENOUGH = 0.0025
MOST = 8
BANDWIDTH = 3e12  # bytes a second that an H200 reads while it decodes: the weights, and of each request ...
CONTEXT = 512  # ... so many tokens' keys and values; ...
KERNELS = 1e-4  # ... and seconds that a step takes besides


@dataclass(frozen=True)
class Sizes:
    """The sizes for which programs are compiled, each ascending; the last is the most that a step may have.

    A step is two programs, of which the first computes and the second draws.  Where one can do both it is in `whole`
    or in `bursts`.
    """

    tokens: tuple[int, ...]  # steps with prompts
    rows: tuple[int, ...]  # steps of one token a row
    pages: tuple[int, ...]  # a row
    scored: tuple[int, ...]  # tokens of steps that score, of `tokens`
    whole: tuple[int, ...] = ()  # rows of steps that are one program: one token a row, all of them greedy and plain
    bursts: tuple[tuple[int, int], ...] = ()  # (rows, steps) of programs of several steps with one token a row in each

    @classmethod
    def choose(cls, platform, plan, least=2):
        """Few on the CPU, where compiling costs what running saves; more on a GPU.

        Two programs take no longer than one where a step is long, and there is less to compile: the sampler once for a
        number of rows, not once for each shape.  A GPU's steps of one token a row can be as short as their launches.
        least: rows of the smallest such step.
        """
        table = -(-plan.session_len // plan.page_size)
        pages = (table,) if table <= 128 else (128, table)
        if platform == "cpu":
            tokens, rows = _upto((64, 256, 2048), plan.budget), _upto((1, 4, 16, 64, 256), plan.lanes)
            return cls(tokens, rows, pages, tuple(size for size in tokens if size <= SCORED) or tokens[:1])
        tokens = (64, 128, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
        tokens += (6144, 8192, 12288, 16384)
        whole, lanes = (4, 8, 16, 32, 48, 64, 96, 128, 192, 224, 256, 384, 512, 768, 1024), max(plan.lanes, least)
        whole, few = ((*range(least, 3), *more) for more in (whole, (8, 16, 32)))
        bursts = ((rows, _steps(plan, rows)) for rows in _upto(few, min(64, lanes)))
        return cls(
            _upto(tokens, plan.budget),
            _upto((8, 32, 64, 128, 256, 512), lanes),
            pages,
            _upto((320,), min(SCORED, plan.budget)),
            _upto(whole, lanes),
            tuple((rows, steps) for rows, steps in bursts if steps > 1),
        )

    @classmethod
    def single(cls, plan, tokens):
        """One of each, for work that is done once: what is compiled takes longer than what is padded.

        tokens: most of a step with prompts, or of one that scores.
        """
        return cls((tokens,), (max(plan.lanes, 2),), (-(-plan.session_len // plan.page_size),), (tokens,))

    def steps(self, rows):
        """How many steps a launch of so many rows may have."""
        return next((steps for most, steps in self.bursts if most >= rows), 1)


def _steps(plan, rows):
    """How many steps make a burst of so many rows."""
    read, steps = plan.weights + rows * CONTEXT * plan.cache / plan.tokens, 1
    one = read / BANDWIDTH + KERNELS
    while steps < MOST and steps * one < ENOUGH:
        steps *= 2
    return steps


def _upto(sizes, most):
    return (*(size for size in sizes if size < most), most)


def bucket(n, sizes):
    """The smallest compiled size that holds n."""
    if n > sizes[-1]:
        raise ValueError(f"{n} is over the largest compiled size, {sizes[-1]}")
    return sizes[bisect_left(sizes, n)]


def begun(key):
    """When to begin compiling a program: first what others wait for, then what takes long: the full sampler, prompts.

    Lowering takes one core a second a program, compiling other cores up to 15: what is begun last should be short.
    """
    if key[0] == "step" and key[1].steps > 1:
        return 2
    return {"pick": 0, "draw": 1, "sampled": 1, "advance": 3, "step": 4}.get(key[0], 5)


def products(key):
    """Which products with the weights are in a program, by its key: of layers or head, and of how many rows."""
    if key[0] in ("step", "sampled", "advance"):
        return [("layers", key[1].tokens), ("head", key[1].tokens)][: 1 if key[0] == "advance" else 2]
    return [("head", key[-1])] if key[0] in ("pick", "draw") else []
