"""Keeps workers alive: one per device, started again where it ends, told of news, and ended with the server."""

import logging
import multiprocessing
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from flashi2v_data.start_methods import clean_start, without_interrupts
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import Model
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.worker import READY, Setup, work

logger = logging.getLogger(__name__)

_LONGEST_PAUSE, _END_SECONDS = 60.0, 10.0


def num_devices(model: Model, execution: Execution) -> int:
    """Return how many workers this machine has devices for.

    Raises:
        InputError: it has no such device.
    """
    device = model.settle().device
    if device.type == "cpu" or ":" in (execution.device or ""):
        return 1
    return max(1, getattr(torch, device.type).device_count() // execution.processes_per_video)


class Workers:
    """The workers of a server. A thread looks after them.

    Args:
        setup: what they are told.
        jobs: the queue.
        number: of workers, each of `processes_per_video` processes.
    """

    def __init__(self, setup: Setup, jobs: Jobs, number: int) -> None:
        self._groups = [_Group(setup, index, number) for index in range(number)]
        self._jobs, self._stopping = jobs, threading.Event()
        self._thread = threading.Thread(target=self._look_after, daemon=True)

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Start them all; what others left unfinished is named, and not tried again.

        Args:
            on_failure: is called once, where none can load the model.
        """
        self._on_failure = on_failure
        for job in self._jobs.interrupted(None, "the server ended"):
            logger.warning("%s was %s", job.id, "interrupted when the server ended before")
        self._thread.start()

    def _look_after(self) -> None:
        while not self._stopping.is_set():
            for group in self._groups:
                group.tend(self._jobs)
            if self.have_failed:
                return self._on_failure()
            wait([handle for group in self._groups for handle in group.handles()], timeout=0.5)

    def wake(self) -> None:
        """Tell them that there is news: something was queued."""
        for group in self._groups:
            group.wake()

    def num_ready(self) -> int:
        """Return how many have loaded the model."""
        return sum(group.is_ready for group in self._groups)

    @property
    def have_failed(self) -> bool:
        """Whether one could not load the model, and none ever did."""
        never = not any(group.is_ready or group.was_ready for group in self._groups)
        return never and any(group.num_failures for group in self._groups)

    def stop(self) -> None:
        """End them at once; what they work on goes back into the queue."""
        self._stopping.set()
        self._thread.join()
        for group in self._groups:
            group.end()
        self._jobs.interrupted(None, "the server ended", again=True)


class _Group:
    """The processes of one worker."""

    def __init__(self, setup: Setup, index: int, num_groups: int) -> None:
        self._setup, self._index, self._num_groups = setup, index, num_groups
        self._size = setup.execution.processes_per_video
        self._context: Any = multiprocessing.get_context(clean_start(work.__module__))
        self._name = ""
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._connections: list[Connection] = []
        self._next_start = 0.0
        self.is_ready, self.was_ready, self.num_failures = False, False, 0

    def handles(self) -> list[Connection | int]:
        """Return what shows that there is something to tend."""
        loading = [] if self.is_ready else self._connections[:1]
        return [*loading, *(process.sentinel for process in self._processes)]

    def tend(self, jobs: Jobs) -> None:
        """Start the processes if they are not there; see to what they did if one has ended."""
        if not self._processes:
            if time.monotonic() >= self._next_start:
                self._start()
            return
        ended = [process for process in self._processes if not process.is_alive()]
        if ended:
            code = ended[0].exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.was_ready |= self.is_ready
            self.num_failures = 0 if self.is_ready else self.num_failures + 1
            pause = min(_LONGEST_PAUSE, 2.0**self.num_failures - 1)
            self.end()
            for job in jobs.interrupted(self._name, f"its worker ended ({how})"):
                logger.error("%s: %s", job.id, f"interrupted, its worker ended ({how})")
            logger.error("a worker ended (%s); it starts again in %g s", how, pause)
            self._next_start = time.monotonic() + pause
        elif not self.is_ready:
            with suppress(EOFError, OSError):
                self.is_ready = self._connections[0].poll() and self._connections[0].recv_bytes() == READY

    def _start(self) -> None:
        self._name = f"{self._index}-{uuid.uuid4().hex[:8]}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self._size):
            ours, theirs = self._context.Pipe()
            os.set_blocking(ours.fileno(), False)  # a worker that is stuck holds up nobody
            environment = {
                "RANK": rank,
                "WORLD_SIZE": self._size,
                "LOCAL_RANK": self._index * self._size + rank,
                "LOCAL_WORLD_SIZE": self._num_groups * self._size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            words = {name: str(value) for name, value in environment.items()}
            process = self._context.Process(target=work, args=(self._setup, self._name, theirs, words), daemon=True)
            with without_interrupts(self._context):
                process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def wake(self) -> None:
        """Tell the first process that there is news, unless it has not yet heard of much."""
        for connection in self._connections[:1]:
            with suppress(OSError):
                connection.send_bytes(b"news")

    def end(self) -> None:
        """End all processes at once."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._connections, self.is_ready = [], [], False
