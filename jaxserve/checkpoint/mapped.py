"""A file mapped into memory that gives the memory back: pages stay in the kernel's cache, not in the process."""

import mmap
import os
from pathlib import Path

import numpy as np

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

    def view(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        """The array at `offset` bytes, still in the file: copy what is needed, keep no reference, then `release`."""
        return np.ndarray(shape, dtype, self.buffer, offset)

    def release(self, offset: int, size: int) -> None:
        """Says that these bytes were copied: without it a process that reads a large file grows as large as it."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        self.buffer.madvise(mmap.MADV_DONTNEED, start, min(offset + size, self.size) - start)

    def close(self) -> None:
        self.buffer.close()
