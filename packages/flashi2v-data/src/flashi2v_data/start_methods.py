"""How to start processes that are safe from what their parent is doing: its threads, its script, its interrupts."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any, Literal

StartMethod = Literal["fork", "spawn", "forkserver"]


def quick_start() -> StartMethod:
    """Return the quickest start method for work without threads of its own that is safe in this process, as it is now.

    Forking a process of one thread is safe, and 100 times faster than starting afresh; the child of one with more may
    wait forever for a lock that another thread held. Threads that never run Python, such as BLAS's, see to theirs.
    """
    return "fork" if sys.platform == "linux" and _num_threads() == 1 else clean_start()


def _num_threads() -> int:
    """Return how many threads run Python, those that `threading` knows nothing of, too."""
    collects = gc.isenabled()
    gc.disable()  # up to Python 3.11.8, garbage that is collected within the call may wait forever (CPython's 106883)
    try:
        return len(sys._current_frames())
    finally:
        if collects:
            gc.enable()


def clean_start(preload: str | None = None) -> StartMethod:
    """Return how to start from a clean process: forked from one that has decoded or computed, workers may deadlock.

    Args:
        preload: a module that is then imported once, not by every worker.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    if preload is not None:
        multiprocessing.set_forkserver_preload([preload])
    return "forkserver"


def _has_script() -> bool:
    """Tell whether new processes import a script, as the function that they are given may be defined there."""
    return os.path.isfile(getattr(sys.modules["__main__"], "__file__", ""))


@contextlib.contextmanager
def only_importable_main() -> Iterator[None]:
    """Keep new processes from importing a script that is not a file: it came from standard input, or was removed.

    They need it only for what it defines, and would end without it. In a notebook Python does the same.
    """
    main = sys.modules["__main__"]
    if not hasattr(main, "__file__") or _has_script():
        yield
        return
    name = main.__file__
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = name


@contextlib.contextmanager
def without_interrupts(context: Any) -> Iterator[None]:
    """Start processes that no interrupt reaches, even while they import what they need to ignore it."""
    if context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # which would end the block, once
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def startup_advice() -> str:
    """Return what usually keeps new processes from starting."""
    if _has_script():
        return "scripts need `if __name__ == '__main__':` around their calls"
    return "they could import no script (this one came from stdin, say): what they are given must come from a module"
