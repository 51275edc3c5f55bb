"""A worker of a `ReaderPool`: the process that computes, and the memory it shares with its parent."""

import mmap
import multiprocessing
import os
import pickle
import resource
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Memory = NDArray[np.uint8]


class Limits(NamedTuple):
    """What a worker may take.

    Attributes:
        timeout_seconds: for one task.
        memory_bytes: of its own, shared memory not counted; looked at after every task.
        max_tasks: after so many it is replaced; None for no limit.
    """

    timeout_seconds: float
    memory_bytes: int
    max_tasks: int | None = None


def shared_file(num_bytes: int) -> int:
    """Return a file in memory that has no name. /dev/shm would do, but is small in many containers."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("flashi2v_data")
    else:
        file, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(file, max(num_bytes, 1))
    return file


def map_memory(file: int, depth: int, memory_bytes: int) -> NDArray[np.uint8]:
    """Return a file's memory as (depth, memory_bytes)."""
    if memory_bytes == 0:
        return np.empty((depth, 0), np.uint8)
    return np.frombuffer(mmap.mmap(file, depth * memory_bytes), np.uint8).reshape(depth, memory_bytes)


def serve(pipe: Any, work: Callable[[Any, Memory], Any], file: Any, shape: tuple[int, int], limits: Limits) -> None:
    """Be a worker: until the parent ends, or a limit is reached."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    memory = map_memory(file.detach(), *shape)
    num_tasks = 0
    try:
        while limits.max_tasks is None or num_tasks < limits.max_tasks:
            # Plain pickle: a pipe's own `send` would pass tensors as open files, which die with their sender.
            content, slot = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(pickle.dumps(("started", time.monotonic())))
            pipe.send_bytes(pickle.dumps(_attempt(work, content, memory[slot])))
            num_tasks += 1
            if _own_bytes() > limits.memory_bytes:
                return
    except (EOFError, OSError):
        return  # the parent has closed the pool


def _end_with(parent: BaseProcess) -> None:
    """End this process when its parent has, also while the main thread hangs in a decoder."""
    parent.join()
    os._exit(1)


def _attempt(work: Callable[[Any, Memory], Any], content: Any, memory: Memory) -> tuple[str, Any]:
    try:
        return "value", work(content, memory)
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return "error", (error, text)


def _own_bytes() -> int:
    """Return the resident memory that this process shares with no other; its peak where the present is not told."""
    try:
        with open("/proc/self/statm") as file:
            resident, shared = map(int, file.read().split()[1:3])
        return (resident - shared) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
