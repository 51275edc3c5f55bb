"""Processes for work that may hang, crash or leak: what happens to one of them costs its task alone.

A process that dies is replaced and its task tried again; one that takes too long over a task is killed, and the task is
lost. Processes retire when they hold too much memory; nothing is lost by that. They end with their parent, ignore
interrupts (Ctrl-C is the parent's to handle), and are killed by `close`, which also runs when the pool is collected or
the interpreter ends.

The parent never waits for one process alone, neither to send nor to receive: it moves as many bytes as a connection
takes or has, and turns to the others. So tasks and answers may have any size, and a process that stops in the midst of
either is noticed like any that hangs.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from flashi2v_data.start_methods import StartMethod, only_importable_main, startup_advice, without_interrupts

logger = logging.getLogger(__name__)

A = TypeVar("A")
R = TypeVar("R")

# A process killed by someone else (out of memory, say) is not the fault of its task; two of them over one task are.
_ATTEMPTS = 2
# So many in a row that end before they are ready will never be.
_STILLBORN = 3
# To import libraries and unpickle the function, on a busy machine with a slow disk.
_STARTUP_SECONDS = 300.0
# How often the memory of processes at work is looked at.
_LOOK_SECONDS = 0.2
# Before every message, its length. More than a connection holds need not be asked of it at once.
_LENGTH = struct.Struct("!Q")
_CHUNK_BYTES = 256 << 10
# A worker's messages begin with one of these; an answer follows the last two.
_READY, _STAYS, _RETIRES = b"r", b"+", b"-"


class Limits(NamedTuple):
    """What a worker may take; None for no limit.

    Attributes:
        timeout_seconds: for one task.
        memory_bytes: of its own, shared memory not counted; looked at after every task.
        max_tasks: after so many it is replaced.
        most_bytes: as memory_bytes, but looked at while it works, where the system tells: it is then ended.
    """

    timeout_seconds: float | None = None
    memory_bytes: int | None = None
    max_tasks: int | None = None
    most_bytes: int | None = None


NO_LIMITS = Limits()


class WorkerLost(RuntimeError):
    """A task was not done in time (`is_late`), took too much memory (`is_too_large`), or ended its processes."""

    exit_code = 1

    def __init__(self, reason: str, *, is_late: bool = False, is_too_large: bool = False) -> None:
        super().__init__(reason)
        self.is_late, self.is_too_large = is_late, is_too_large


class WorkerError(Exception):
    """Stands as the cause of an error that a worker raised; its text is the worker's traceback."""

    def __str__(self) -> str:
        """Return the traceback."""
        return f"in a worker:\n{self.args[0]}"


@dataclass(eq=False)
class Task(Generic[A, R]):
    """One call in a worker."""

    argument: A
    num_deaths: int = 0  # of processes that worked on it
    done: bool = False
    result: R | None = None
    error: Exception | None = None

    def lose(self, lost: WorkerLost) -> None:
        """End without a result."""
        self.error, self.done = lost, True


class _Worker:
    """The parent's side of one process."""

    def __init__(self, context: Any, function: Callable[[Any], Any], limits: Limits) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.setblocking(False)
        self.process = context.Process(target=_serve, args=(theirs, function, limits), daemon=True)
        with theirs, only_importable_main(), without_interrupts(context):
            self.process.start()
        self.is_ready = False
        self.tasks: deque[Task[Any, Any]] = deque()  # at the first of these it works
        self.deadline = time.monotonic() + _STARTUP_SECONDS
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()

    @property
    def awaits(self) -> int:
        """What is worth waiting for, as selectors name it."""
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)

    def send(self, message: bytes) -> None:
        """Send a message, as far as the connection takes it; `send_more` sends the rest."""
        self._unsent += memoryview(_LENGTH.pack(len(message))), memoryview(message)
        self.send_more()

    def send_more(self) -> None:
        """Send what the connection takes now."""
        try:
            while self._unsent:
                num_sent = self.connection.send(self._unsent[0])
                self._unsent[0] = self._unsent[0][num_sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:  # it has ended, as `receive` will tell
            self._unsent.clear()

    def receive(self) -> Iterator[memoryview]:
        """Yield the messages that end in what has arrived.

        Raises:
            EOFError: the process has ended.
        """
        try:
            chunk = self.connection.recv(_CHUNK_BYTES)
        except OSError:
            chunk = b""
        if not chunk:
            raise EOFError
        self._received += chunk
        while len(self._received) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._received)[0]
            if len(self._received) < end:
                break
            message = memoryview(self._received[_LENGTH.size : end])
            del self._received[:end]
            yield message

    def stop(self) -> str:
        """End the process; return how it ended, if it had done so before."""
        self.process.kill()
        self.process.join(5)  # one that cannot even be killed (a dead network disk) is left behind
        self.connection.close()
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


class WorkerPool(Generic[A, R]):
    """Calls a function in processes that are replaced where they hang, crash or reach a limit.

    It has no threads: work is handed out and answers are taken whenever `submit` or `result` is called.

    Args:
        function: picklable where the start method is not "fork", as are arguments and results everywhere.
        jobs: processes; they start when there is work for them.
        limits: of each process.
        start: how; not "fork" for work with threads of its own, such as decoders.
        depth: tasks that a process is given at a time; more than one where the parent is busy for longer than a task.
        on_result: called with every task that was done, as soon as the parent hears of it.
    """

    def __init__(
        self,
        function: Callable[[A], R],
        jobs: int,
        limits: Limits = NO_LIMITS,
        *,
        start: StartMethod = "spawn",
        depth: int = 1,
        on_result: Callable[[Task[A, R]], None] | None = None,
    ) -> None:
        self._context = multiprocessing.get_context(start)
        self._function = function
        self._jobs = jobs
        self._limits = limits
        self._depth = depth
        self._on_result = on_result
        self._workers: list[_Worker] = []
        self._waiting: deque[Task[A, R]] = deque()
        self._num_stillborn = 0
        self._looked_at = 0.0
        self.close: Callable[[], object] = weakref.finalize(self, _close, self._workers)

    def start(self) -> None:
        """Start all processes now."""
        while len(self._workers) < self._jobs:
            self._workers.append(self._new_worker())

    def submit(self, argument: A) -> Task[A, R]:
        """Hand in a task; `result` waits for it."""
        task: Task[A, R] = Task(argument)
        self._waiting.append(task)
        if len(self._workers) < self._jobs and all(worker.tasks or not worker.is_ready for worker in self._workers):
            self._workers.append(self._new_worker())
        self._advance(0)
        return task

    def result(self, task: Task[A, R]) -> R:
        """Wait for a task and return what the function returned, or raise what it raised.

        Raises:
            WorkerLost: it hung, or crashed two processes.
        """
        while not task.done:
            self._advance(None)
        if task.error is not None:
            raise task.error
        return task.result  # type: ignore[return-value]  # without an error there is one

    def forget(self) -> None:
        """Drop the tasks that no process was given yet, and wait until the others are done."""
        self._waiting.clear()
        while any(worker.tasks for worker in self._workers):
            self._advance(None)

    def _advance(self, seconds: float | None) -> None:
        """Take answers, waiting for one so long (None: as long as it takes), and hand out what waits."""
        assert self._workers, "the pool is closed"
        # Read before the wait, so that answers come first after a time in which the parent was away.
        now = time.monotonic()
        if seconds is None:
            until = min(worker.deadline for worker in self._workers)
            seconds = None if until == float("inf") else max(0.0, until - now)
            if self._limits.most_bytes is not None:
                seconds = min(_LOOK_SECONDS, _LOOK_SECONDS if seconds is None else seconds)
        events = _wait(self._workers, seconds)
        for worker, event in events.items():
            if event & selectors.EVENT_WRITE:
                worker.send_more()
            if event & selectors.EVENT_READ:
                self._receive(worker)
            if event and worker.is_ready:
                self._set_deadline(worker)  # what moves does not hang, however long the parent was away
            elif not event and now >= worker.deadline:
                self._lose(worker, is_late=True)
        if self._limits.most_bytes is not None and now >= self._looked_at + _LOOK_SECONDS:
            self._looked_at = now
            for worker in [worker for worker in self._workers if worker.is_ready and worker.tasks]:
                if _own_bytes(worker.process.pid) > self._limits.most_bytes:
                    self._lose(worker, is_late=False, is_too_large=True)
        for depth in range(1, self._depth + 1):  # one for each before a second for any
            for worker in self._workers:
                if self._waiting and worker.is_ready and len(worker.tasks) < depth:
                    self._give(worker, self._waiting.popleft())

    def _receive(self, worker: _Worker) -> None:
        try:
            for message in worker.receive():
                self._take(worker, message)
        except EOFError:
            worker.process.join(1)  # it may be about to say why
            self._lose(worker, is_late=False)

    def _take(self, worker: _Worker, message: memoryview) -> None:
        kind = bytes(message[:1])
        if kind == _READY:
            worker.is_ready = True
            worker.deadline = float("inf")
            self._num_stillborn = 0
            return
        task = worker.tasks.popleft()
        task.result, failure = pickle.loads(message[1:])
        if failure is not None:
            task.error, text = failure
            task.error.__cause__ = WorkerError(text)
        task.done = True
        if kind == _RETIRES:
            logger.info("a worker has reached a limit and is replaced")
            worker.stop()
            self._replace(worker)
        if self._on_result is not None and task.error is None:
            self._on_result(task)

    def _give(self, worker: _Worker, task: Task[A, R]) -> None:
        worker.tasks.append(task)
        if len(worker.tasks) == 1:
            self._set_deadline(worker)
        worker.send(pickle.dumps(task.argument))

    def _set_deadline(self, worker: _Worker) -> None:
        worker.deadline = float("inf")
        if self._limits.timeout_seconds is not None and worker.tasks:
            worker.deadline = time.monotonic() + self._limits.timeout_seconds

    def _lose(self, worker: _Worker, *, is_late: bool, is_too_large: bool = False) -> None:
        how = worker.stop()
        if is_too_large:
            assert self._limits.most_bytes is not None
            how = f"it took more than {self._limits.most_bytes / 2**30:.3g} GiB of memory"
        if not worker.is_ready:
            self._num_stillborn += 1
        elif is_late:
            seconds = f"{self._limits.timeout_seconds:g} seconds"
            worker.tasks.popleft().lose(WorkerLost(f"no answer within {seconds}", is_late=True))
        else:
            logger.warning("a worker has ended (%s) and is replaced", how)
            if worker.tasks:
                worker.tasks[0].num_deaths += 1
                if worker.tasks[0].num_deaths == _ATTEMPTS:
                    reason = f"ended the process that read it {_ATTEMPTS} times ({how})"
                    worker.tasks.popleft().lose(WorkerLost(reason, is_too_large=is_too_large))
        if self._num_stillborn == _STILLBORN:
            self.close()
            raise RuntimeError(f"{_STILLBORN} workers in a row ended while starting ({how}): {startup_advice()}")
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Put another in the place of a worker that has ended; its tasks wait again."""
        self._waiting.extendleft(reversed(worker.tasks))
        self._workers[self._workers.index(worker)] = self._new_worker()

    def _new_worker(self) -> _Worker:
        try:
            return _Worker(self._context, self._function, self._limits)
        except BrokenPipeError:  # it ended before it had taken in the function
            raise RuntimeError(f"a worker has ended while starting: {startup_advice()}") from None


def _wait(workers: list[_Worker], seconds: float | None) -> dict[_Worker, int]:
    """Wait so long for any worker to send, or to take what was not sent yet; return what each is ready for."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.connection, worker.awaits, worker)
        ready = {key.data: event for key, event in selector.select(seconds)}
    return {worker: ready.get(worker, 0) for worker in workers}


def _close(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    workers.clear()


def _serve(connection: socket.socket, function: Callable[[Any], Any], limits: Limits) -> None:
    """Be a worker: until the parent ends, or a limit is reached."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    num_tasks, retires = 0, False
    with contextlib.suppress(EOFError, OSError), connection.makefile("rb") as stream:  # the parent has closed the pool
        _send(connection, _READY)
        while not retires:
            # Plain pickle: multiprocessing's own would pass tensors as open files, which die with their sender.
            answer = _attempt(function, pickle.loads(_next(stream)))
            num_tasks += 1
            retires = num_tasks == limits.max_tasks or (
                limits.memory_bytes is not None and _own_bytes() > limits.memory_bytes
            )
            _send(connection, (_RETIRES if retires else _STAYS) + answer)


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)))
    connection.sendall(message)


def _next(stream: io.BufferedReader) -> bytes:
    length = stream.read(_LENGTH.size)
    if len(length) < _LENGTH.size:
        raise EOFError
    return stream.read(_LENGTH.unpack(length)[0])


def _end_with_parent() -> None:
    """End this process when its parent has, also while the main thread hangs in a decoder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _attempt(function: Callable[[Any], Any], argument: Any) -> bytes:
    """Return what the function returns, or its error with the traceback, for `_take`."""
    try:
        return pickle.dumps((function(argument), None))
    except Exception as error:
        text = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((None, (error, text)))


def _own_bytes(process: int | None = None) -> int:
    """Return the resident memory that a process shares with no other: this one, or one of this machine.

    Where the present is not told, it is the peak of this process, and 0 of others.
    """
    try:
        with open(f"/proc/{process or 'self'}/statm") as file:
            resident, shared = map(int, file.read().split()[1:3])
        return (resident - shared) * resource.getpagesize()
    except (OSError, ValueError):  # ValueError: it has just ended
        return 0 if process else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
