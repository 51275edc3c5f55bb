"""Numbers that a process and its workers see alike."""

import math
import mmap
import os
import tempfile
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SharedArray:
    """An array in memory that belongs to no process; one that starts with it sees the same numbers.

    Attributes:
        array: uint8.
    """

    def __init__(self, shape: tuple[int, ...], file: Any = None) -> None:
        num_bytes = math.prod(shape)
        self._file: int = _nameless_file(num_bytes) if file is None else file.detach()
        weakref.finalize(self, os.close, self._file)
        # No file of no bytes can be mapped.
        memory = mmap.mmap(self._file, max(num_bytes, 1))
        self.array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8, num_bytes).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        """Hand the file over to a process that is being started."""
        return SharedArray, (self.array.shape, DupFd(self._file))


def _nameless_file(num_bytes: int) -> int:
    """Return a file in memory. /dev/shm would do, but is small in many containers."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("flashi2v_data")
    else:
        file, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(file, max(num_bytes, 1))
    return file
