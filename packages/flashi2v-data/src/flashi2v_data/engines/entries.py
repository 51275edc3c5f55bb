"""A stage that calls a function with every entry of a piece, where a hang or a crash costs that entry alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from flashi2v_data.console import one_line, told_as
from flashi2v_data.errors import DecodeError
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool

E = TypeVar("E")


class Fault(NamedTuple):
    """Why an entry has no result.

    Attributes:
        kind: unreadable, hung, crashed, too_large (of memory), or failed (the function raised an exception).
        text: the reason, one line.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class EachEntry(Generic[E]):
    """Calls a function with each entry of a piece, in processes that are replaced where they hang, crash or bloat.

    The result of a piece is a list of `[value, None, [computing, in all]]` or `[None, Fault, [0, 0]]`, an item for each
    entry: what the function returned, and the seconds that it took of a processor and of the clock.

    Args:
        function: picklable; it returns plain values. An `InputError` that it raises ends the run.
        limits: of its processes; two tries for an entry that ends them or takes too much memory, one where it hangs.
    """

    function: Callable[[E], Any]
    limits: Limits

    @property
    def resources(self) -> Mapping[str, float]:
        """A processor each."""
        return {"CPU": 1}

    def start(self, jobs: int) -> "_Entries":
        """Start the processes."""
        return _Entries(WorkerPool(_Timed(self.function), jobs, self.limits, depth=2))


class _Timed:
    """A function that also returns the seconds that it took, of its process and of the clock."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, entry: Any) -> tuple[Any, list[float]]:
        begun, computed = time.monotonic(), time.process_time()
        value = self._function(entry)
        return value, [time.process_time() - computed, time.monotonic() - begun]


class _Entries:
    def __init__(self, pool: WorkerPool[Any, Any]) -> None:
        self._pool = pool

    def submit(self, piece: Sequence[Any]) -> list[Task[Any, Any]]:
        return [self._pool.submit(entry) for entry in piece]

    def result(self, submitted: list[Task[Any, Any]]) -> list[Any]:
        return [self._outcome(task) for task in submitted]

    def close(self) -> None:
        self._pool.close()

    def _outcome(self, task: Task[Any, Any]) -> list[Any]:
        try:
            value, seconds = self._pool.result(task)
            return [value, None, seconds]
        except Exception as error:
            # What the pool itself raises, or what other entries fare no better with: wrong input, a failing machine.
            if task.error is None or (told_as(error) is not None and not isinstance(error, (DecodeError, WorkerLost))):
                raise
            return [None, _fault(error), [0.0, 0.0]]


def _fault(error: Exception) -> Fault:
    if isinstance(error, WorkerLost):
        return Fault("hung" if error.is_late else "too_large" if error.is_too_large else "crashed", str(error))
    if isinstance(error, DecodeError):
        return Fault("unreadable", one_line(error.reason))
    return Fault("failed", one_line(f"{type(error).__name__}: {error}"))
