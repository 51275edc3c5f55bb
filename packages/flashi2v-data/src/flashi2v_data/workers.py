"""Processes for work that may hang or crash: what happens to one costs its task alone."""

import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Literal, TypeVar

A = TypeVar("A")
R = TypeVar("R")

# Forking a process of one thread is safe, and 100 times faster than starting afresh; elsewhere it is neither.
QUICK_START: Literal["fork", "spawn"] = "fork" if sys.platform == "linux" else "spawn"


class WorkerLost(RuntimeError):
    """The process that worked on a task did not answer in time, or died."""


@dataclass
class Task(Generic[A, R]):
    """One call in a worker."""

    argument: A
    done: bool = False
    result: R | None = None
    error: Exception | None = None


class _Worker:
    """The parent's side of one process."""

    def __init__(self, context: Any, function: Callable[[Any], Any], timeout: float | None) -> None:
        self.connection, theirs = context.Pipe()
        # A forked child must close its copy of the parent's end, or it would not learn of the parent's death.
        inherited = self.connection if context.get_start_method() == "fork" else None
        self.process = context.Process(target=_serve, args=(theirs, inherited, function, timeout), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.tasks: deque[Task[Any, Any]] = deque()  # at the first of these it works
        self.deadline = float("inf")

    def stop(self) -> int | None:
        self.process.kill()
        self.process.join(1)  # one that cannot even be killed (a dead network disk) is left behind
        self.connection.close()
        return self.process.exitcode


class WorkerPool(Generic[A, R]):
    """Calls a function in processes that are killed and replaced where they hang or crash.

    It has no threads: work is handed out and answers are taken whenever `submit` or `result` is called.

    Args:
        function: picklable where the start method is "spawn".
        jobs: processes; they start when there is work for them.
        timeout: seconds for one task.
        start: "spawn" for work with threads of its own, such as decoders.
        depth: tasks that a process is given at a time; more than one where the parent is busy for longer than a task.
        on_result: called with every task that was done, as soon as the parent hears of it.
    """

    def __init__(
        self,
        function: Callable[[A], R],
        jobs: int,
        *,
        timeout: float | None = None,
        start: Literal["fork", "spawn"] = "spawn",
        depth: int = 1,
        on_result: Callable[[Task[A, R]], None] | None = None,
    ) -> None:
        self._context = multiprocessing.get_context(start)
        self._function = function
        self._jobs = jobs
        self._timeout = timeout
        self._depth = depth
        self._on_result = on_result
        self._workers: list[_Worker] = []
        self._waiting: deque[Task[A, R]] = deque()

    def start(self) -> None:
        """Start all processes now."""
        while len(self._workers) < self._jobs:
            self._workers.append(_Worker(self._context, self._function, self._timeout))

    def submit(self, argument: A) -> Task[A, R]:
        """Hand in a task; `result` waits for it."""
        task: Task[A, R] = Task(argument)
        self._waiting.append(task)
        if len(self._workers) < self._jobs and all(worker.tasks or not worker.is_ready for worker in self._workers):
            self._workers.append(_Worker(self._context, self._function, self._timeout))
        self._advance(0)
        return task

    def result(self, task: Task[A, R]) -> R:
        """Wait for a task and return what the function returned, or raise what it raised.

        Raises:
            WorkerLost: the worker hung or crashed.
        """
        while not task.done:
            self._advance(None)
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]

    def close(self) -> None:
        """End all processes, whatever they do."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def _advance(self, seconds: float | None) -> None:
        """Take answers, waiting for one so long (None: as long as it takes), and hand out what waits."""
        now = time.monotonic()
        until = min((worker.deadline for worker in self._workers), default=now)
        if seconds is None:
            seconds = None if until == float("inf") else max(0.0, until - now)
        ready = wait([worker.connection for worker in self._workers], seconds)
        now = time.monotonic()
        for worker in list(self._workers):
            if worker.connection in ready:
                self._receive(worker)
            elif now >= worker.deadline:
                self._lose(worker, f"no answer within {self._timeout:g} s")
        for depth in range(1, self._depth + 1):  # one for each before a second for any
            for worker in self._workers:
                if self._waiting and worker.is_ready and len(worker.tasks) < depth:
                    self._give(worker, self._waiting.popleft())

    def _receive(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker, None)
            return
        if not worker.is_ready:
            worker.is_ready = True
            return
        task = worker.tasks.popleft()
        task.result, task.error = answer
        task.done = True
        self._set_deadline(worker)
        if self._on_result is not None and task.error is None:
            self._on_result(task)

    def _give(self, worker: _Worker, task: Task[A, R]) -> None:
        worker.tasks.append(task)
        if len(worker.tasks) == 1:
            self._set_deadline(worker)
        with suppress(OSError):  # it died meanwhile, as the next wait will tell
            worker.connection.send(task.argument)

    def _set_deadline(self, worker: _Worker) -> None:
        worker.deadline = float("inf")
        if self._timeout is not None and worker.tasks:
            worker.deadline = time.monotonic() + self._timeout

    def _lose(self, worker: _Worker, reason: str | None) -> None:
        self._workers.remove(worker)
        code = worker.stop()
        if not worker.is_ready:
            raise RuntimeError(
                "a worker process ended before it began: scripts need `if __name__ == '__main__':` around their calls"
            )
        if worker.tasks:
            lost = worker.tasks.popleft()
            lost.error = WorkerLost(reason or f"the process that read it died ({_name(code)})")
            lost.done = True
            self._waiting.extendleft(reversed(worker.tasks))
        if self._waiting:
            self._workers.append(_Worker(self._context, self._function, self._timeout))


def _name(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _serve(
    connection: Connection, inherited: Connection | None, function: Callable[[Any], Any], timeout: float | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    if inherited is not None:
        inherited.close()
    connection.send(None)  # ready
    while True:
        try:
            argument = connection.recv()
        except EOFError:
            return
        # Should the parent be killed while this hangs, the kernel's alarm ends it.
        _alarm(0 if timeout is None else 2 * timeout + 10)
        answer: tuple[Any, Exception | None]
        try:
            answer = function(argument), None
        except Exception as error:
            answer = None, error
        _alarm(0)
        try:
            connection.send(answer)
        except OSError:
            return


def _alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, seconds)
