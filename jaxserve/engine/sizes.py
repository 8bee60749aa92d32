"""The sizes for which programs are compiled."""

from bisect import bisect_left
from dataclasses import dataclass

SCORED = 1024  # most tokens of a step that scores


@dataclass(frozen=True)
class Sizes:
    """The sizes for which programs are compiled, each ascending; the last is the most that a step may have.

    A step runs as one program (`fused`), or as two, of which the first computes and the second draws: always where
    nothing is `fused`, and where something must happen between them.
    """

    tokens: tuple[int, ...]  # steps with prompts
    rows: tuple[int, ...]  # steps of one token a row
    pages: tuple[int, ...]  # a row
    fused: bool
    apart_tokens: tuple[int, ...]  # as above, of steps that run as two programs
    apart_rows: tuple[int, ...]
    apart_pages: tuple[int, ...]

    @classmethod
    def choose(cls, platform, plan):
        """Few on the CPU, where compiling costs what running saves; more on a GPU.

        On the CPU two programs take no longer than one, and there is less to compile: the sampler and the vocabulary's
        product once for a number of rows, not once for each shape.  A GPU's steps are as short as their launches, so
        there the pairs come beside the fused ones, in few sizes, for guided decoding and for scoring alone.
        """
        table = -(-plan.session_len // plan.page_size)
        pages = (table,) if table <= 128 else (128, table)
        if platform == "cpu":
            tokens, rows = _upto((64, 256, 2048), plan.budget), _upto((1, 4, 16, 64, 256), plan.lanes)
            return cls(tokens, rows, pages, False, tokens, rows, pages)
        # XLA's product with one row is slower than that with two (0.7 ms a step of a 1.8B model on an H200).
        rows = (2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 224, 256, 384, 512, 768, 1024)
        tokens = (64, 128, 256, 320, 384, 448, 512, 576, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096)
        tokens += (6144, 8192, 12288, 16384)
        lanes = max(plan.lanes, rows[0])
        apart = _upto((320, 1024), plan.budget), _upto((16, 64, 256), lanes), pages[-1:]
        return cls(_upto(tokens, plan.budget), _upto(rows, lanes), pages, True, *apart)

    @property
    def scored(self):
        """Tokens of steps that score."""
        return tuple(size for size in self.apart_tokens if size <= SCORED) or self.apart_tokens[:1]


def _upto(sizes, most):
    return (*(size for size in sizes if size < most), most)


def bucket(n, sizes):
    """The smallest compiled size that holds n."""
    if n > sizes[-1]:
        raise ValueError(f"{n} is over the largest compiled size, {sizes[-1]}")
    return sizes[bisect_left(sizes, n)]
