"""A file mapped into memory that gives the memory back: pages stay in the kernel's cache, not in the process."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from jaxserve.checkpoint import CheckpointError


class MappedFile:
    """A read-only mapping.  Reads from several threads at once are safe."""

    def __init__(self, path: Path):
        """CheckpointError where the file is not there or empty."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise CheckpointError(f"{path}: the file is empty; copy or download it again")
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error

    def view(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """The array at `offset` bytes, still in the file: copy what is needed inside `reading`, keep no reference."""
        return np.ndarray(shape, dtype, self.buffer, offset)

    @contextmanager
    def reading(self, offset: int, size: int) -> Iterator[None]:
        """Around the copying of these bytes: reads them ahead, and afterwards lets go of their memory.

        1 GiB that is not in the kernel's cache takes 0.6 s in place of 4.2 s (a virtual disk), and
        a process that reads a large file does not grow as large as it.
        """
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(offset + size, self.size) - start
        if size:
            self.buffer.madvise(mmap.MADV_WILLNEED, start, length)
        yield
        if size:
            self.buffer.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        self.buffer.close()
