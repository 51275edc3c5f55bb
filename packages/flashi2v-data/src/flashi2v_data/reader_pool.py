"""Worker processes that may die: results in order, whatever becomes of the process that computes them.

Every worker has a seat: a pipe, the tasks given to it, and memory that belongs to the parent and in which the worker
leaves large results. A worker that dies is replaced and the replacement is given the same tasks. A worker that takes
too long over a task, or dies over the same task twice, costs that task alone: its outcome is `Lost`. Workers retire
when they hold too much memory; nothing is lost by that.

There is no thread: the parent looks after its workers while it waits for a result, and each of them has tasks ahead.
Workers end with their parent, ignore interrupts (Ctrl-C is the parent's to handle), and are killed by `close`, which
also runs when the pool is collected or the interpreter ends.
"""

import collections
import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any, Generic, NamedTuple, TypeVar

from flashi2v_data.reader_process import Limits, Memory, map_memory, serve, shared_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A worker killed by someone else (out of memory, say) is no fault of its task; two of them over one task are.
_ATTEMPTS = 2
# So many in a row that end before they say anything will not start at all.
_STILLBORN = 3
# To import libraries and unpickle the work, on a busy machine with a slow disk.
_STARTUP_SECONDS = 300.0

Work = Callable[[T, Memory], Any]


class Lost(NamedTuple):
    """The outcome of a task that hung or crashed its worker."""

    reason: str


class WorkerError(Exception):
    """Stands as the cause of an error that a worker raised; its text is the worker's traceback."""

    def __str__(self) -> str:
        """Return the traceback."""
        return f"in a worker:\n{self.args[0]}"


class _Task(Generic[T]):
    """A task on its way."""

    def __init__(self, content: T, slot: int) -> None:
        self.content = content
        self.slot = slot
        self.deaths = 0
        self.is_wanted = True
        self.outcome: tuple[str, Any] | None = None


class ReaderPool(Generic[T]):
    """Processes that run `work(task, memory)`.

    Args:
        work: can be pickled; what it returns, too. It may leave numbers in `memory`, uint8.
        num_workers: processes.
        memory_bytes: size of the memory that a task is given.
        limits: of a worker.
        depth: tasks that each worker is given at a time.
    """

    def __init__(self, work: Work[T], num_workers: int, memory_bytes: int, limits: Limits, *, depth: int = 2) -> None:
        context = worker_context()
        self._seats = [_Seat[T](work, memory_bytes, limits, depth, context) for _ in range(num_workers)]
        self._order: collections.deque[tuple[_Seat[T], _Task[T]]] = collections.deque()
        self.close: Callable[[], object] = weakref.finalize(self, _close, self._seats)

    @property
    def has_room(self) -> bool:
        """Whether another task may be submitted."""
        return any(seat.free for seat in self._seats)

    def submit(self, content: T, *, first: bool = False) -> None:
        """Give a task to the worker with the least to do; its result comes last, or first."""
        seat = max(self._seats, key=lambda seat: len(seat.free))
        entry = seat, seat.submit(content)
        if first:
            self._order.appendleft(entry)
        else:
            self._order.append(entry)

    def result(self) -> tuple[Any, Memory]:
        """Wait for the oldest task; return what `work` returned, or `Lost`, and the task's memory.

        The memory is valid until the next call of any method. An error of `work` is raised.
        """
        seat, task = self._order[0]
        while task.outcome is None:
            self._look_after()
        self._order.popleft()  # not before: an interrupt may end the wait
        seat.free.append(task.slot)
        kind, value = task.outcome
        if kind == "error":
            error, text = value
            raise error from WorkerError(text)
        return value, seat.memory[task.slot]

    def forget(self) -> None:
        """Drop the results of all tasks submitted so far."""
        while self._order:
            seat, task = self._order.popleft()
            task.is_wanted = False
            if task.outcome is not None:
                seat.free.append(task.slot)

    def _look_after(self) -> None:
        """Wait until a worker says something, ends, or has had its time."""
        seats: dict[Any, _Seat[T]] = {
            handle: seat for seat in self._seats for handle in (seat.pipe, seat.process.sentinel)
        }
        soonest = min(seat.seconds_left() for seat in self._seats)
        for handle in connection.wait([*seats], max(soonest, 0)):
            seats[handle].listen()
        for seat in self._seats:
            if seat.seconds_left() <= 0:
                seat.give_up()


class _Seat(Generic[T]):
    """A worker, its successors, and what they are working on."""

    pipe: Any
    process: BaseProcess

    def __init__(self, work: Work[T], memory_bytes: int, limits: Limits, depth: int, context: BaseContext) -> None:
        self._work, self._limits, self._context = work, limits, context
        self._file = shared_file(depth * memory_bytes)
        self.memory = map_memory(self._file, depth, memory_bytes)
        self.free = list(range(depth))
        self._tasks: collections.deque[_Task[T]] = collections.deque()
        self._started: float | None = None  # when the first of the tasks was
        self._stillborn = 0
        self._start()

    def submit(self, content: T) -> _Task[T]:
        task = _Task(content, self.free.pop())
        self._tasks.append(task)
        self._send(task)
        return task

    def seconds_left(self) -> float:
        """Return the time left to the worker: for its task, or to start."""
        if self._started is not None:
            return self._started + self._limits.timeout_seconds - time.monotonic()
        return _STARTUP_SECONDS if self._is_up else self._born + _STARTUP_SECONDS - time.monotonic()

    def listen(self) -> None:
        """Take what the worker has said, and replace it if it has ended."""
        has_ended = not self.process.is_alive()
        try:
            while self.pipe.poll():
                kind, value = pickle.loads(self.pipe.recv_bytes())
                self._is_up = True
                if kind == "started":
                    # The worker's clock is the machine's, so that a parent that was away does not count as waiting.
                    self._started = value
                else:
                    self._finish((kind, value))
        except (EOFError, OSError):
            has_ended = True
        if has_ended:
            self._replace()

    def give_up(self) -> None:
        """Stop a worker that has had its time, unless it has just finished."""
        self.listen()
        if self.seconds_left() > 0:
            return
        if self._started is not None:
            self._finish(("lost", Lost(f"no answer within {self._limits.timeout_seconds:g} seconds")))
        self._replace()

    def close(self) -> None:
        self._stop()
        os.close(self._file)

    def _stop(self) -> None:
        self.process.kill()
        # One that waits for a dead network disk cannot even be killed; it is left behind.
        self.process.join(5)
        self.pipe.close()

    def _finish(self, outcome: tuple[str, Any]) -> None:
        task = self._tasks.popleft()
        task.outcome = outcome
        if not task.is_wanted:
            self.free.append(task.slot)
        self._started = None
        self._num_done += 1

    def _replace(self) -> None:
        self._stop()
        self._stillborn = 0 if self._is_up else self._stillborn + 1
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if self._stillborn >= _STILLBORN:
            raise RuntimeError(f"{_STILLBORN} loader workers in a row ended while starting: {how}")
        if code == 0:
            logger.info("a loader worker has reached its limit after %d samples and is replaced", self._num_done)
        else:
            logger.warning("a loader worker has ended (%s) and is replaced", how)
        if self._started is not None:
            self._tasks[0].deaths += 1
            if self._tasks[0].deaths >= _ATTEMPTS:
                self._finish(("lost", Lost(f"ended its reader {_ATTEMPTS} times ({how})")))
        self._start()
        for task in self._tasks:
            self._send(task)

    def _start(self) -> None:
        self._started = None
        self._is_up = False
        self._num_done = 0
        self._born = time.monotonic()
        self.pipe, theirs = self._context.Pipe()
        # As a daemon it is ended with the interpreter.
        self.process = self._context.Process(  # type: ignore[attr-defined]
            target=serve,
            args=(theirs, self._work, DupFd(self._file), self.memory.shape, self._limits),
            daemon=True,
        )
        self.process.start()
        theirs.close()

    def _send(self, task: _Task[T]) -> None:
        # One that has ended is noticed by `listen`.
        with contextlib.suppress(OSError):
            self.pipe.send_bytes(pickle.dumps((task.content, task.slot)))


def _close(seats: list[_Seat[Any]]) -> None:
    for seat in seats:
        seat.close()


def worker_context() -> BaseContext:
    """Start workers from a clean process: forked from one that has decoded or computed, they may deadlock."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # Torch is then imported once, not by every worker.
    context.set_forkserver_preload(["flashi2v_data.dataset"])
    return context
