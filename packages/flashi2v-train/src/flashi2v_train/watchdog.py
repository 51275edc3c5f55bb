"""A run that hangs is ended, and the process that it waits for is named.

The processes of a run wait for each other, so one that stands still holds up all. Each says where it is (`beat`); a
thread of each publishes that and reads the others' from a store; when nobody has moved for too long, the one that has
stood still longest is at fault, or the one that no longer publishes. The first verdict counts for all: the one at
fault shows where it stands, then another says why the run ends, and then all end.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Literal, NamedTuple, NoReturn, get_args

import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # public, but not declared so

logger = logging.getLogger(__name__)

# In their order within a step: who is in an earlier one is behind.
Phase = Literal[
    "starting", "reading and encoding", "forward and backward", "exchanging gradients", "saving", "validating"
]
_ORDER = get_args(Phase)

# In the store, beside the numbers of the processes.
_VERDICT, _SHOWN, _SAID = "verdict", "shown", "said"
# How long processes that are about to end wait for each other; on a busy machine a thread may come late.
_PATIENCE_SECONDS = 20.0


class _Verdict(NamedTuple):
    """Who is at fault, whether it can still show where it stands, and what is said of it."""

    at_fault: list[int]
    answers: bool
    words: str


class Watchdog:
    """Watches this process and the others: made by all of them at the same time, it does so within each `with`.

    Args:
        rank: of this process.
        size: number of processes.
        control: gloo group of all processes; used only here, at the start.
        timeout_seconds: for how long nobody may move.
    """

    def __init__(self, rank: int, size: int, control: dist.ProcessGroup, timeout_seconds: float) -> None:
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._interval = min(timeout_seconds / 20, 10.0)
        self._closed = threading.Event()  # of the latest `with`
        self._own: tuple[int, Phase, float] = (0, "starting", time.monotonic())
        self._hosts = [""] * size
        dist.all_gather_object(self._hosts, socket.gethostname(), control)
        self._verdict: _Verdict | None = None
        self._store = self._open_store(control)
        self._others = ["" for _ in range(size)]  # as published
        self._changed: list[float] = []  # when that last changed, by this machine's clock
        self._answered = 0.0
        self._serial = 0
        self._publish()
        if rank == 0:
            for key in (_VERDICT, _SHOWN, _SAID):
                self._store.set(key, "")
        dist.barrier(control)  # from here on every key is there

    def _open_store(self, control: dist.ProcessGroup) -> HashStore | TCPStore:
        """The first process serves it, on a port of its own: the store of the process groups is not public."""
        patience = timedelta(seconds=60)
        if self.size == 1:
            return HashStore()
        # MASTER_ADDR is the machine of the first process, for torchrun and Slurm alike.
        host = os.environ["MASTER_ADDR"]
        ports: list[int | None] = [None]
        store = None
        if self.rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
            ports = [store.port]
        dist.broadcast_object_list(ports, 0, control)
        if store is None:
            assert ports[0] is not None
            store = TCPStore(host, ports[0], is_master=False, timeout=patience)
        return store

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this process has come to a phase of a step, or moves on within a long one; costs nothing."""
        self._own = (step, phase, time.monotonic())

    def __enter__(self) -> "Watchdog":
        now = time.monotonic()
        self._own = (*self._own[:2], now)
        self._changed, self._answered = [now] * self.size, now
        self._closed = threading.Event()
        # Two threads: the one that asks the store may wait for ever, if the store's process is the one that stopped.
        for task in (self._exchange, self._watch):
            threading.Thread(target=task, args=(self._closed,), name=f"watchdog{task.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._verdict is not None:
            time.sleep(_PATIENCE_SECONDS)  # the others end: what is lost with them is no cause, and must not be told
        self._closed.set()

    def _publish(self) -> None:
        step, phase, since = self._own
        self._store.set(str(self.rank), json.dumps([self._serial, step, phase, time.monotonic() - since]))
        self._serial += 1

    def _exchange(self, closed: threading.Event) -> None:
        keys = [*map(str, range(self.size)), _VERDICT]
        while not closed.wait(self._interval):
            try:
                self._publish()
                if self._verdict is not None:
                    self._store.compare_set(_VERDICT, "", json.dumps(self._verdict))
                *published, verdict = (value.decode() for value in self._store.multi_get(keys))
                if verdict:
                    self._verdict = _Verdict(*json.loads(verdict))
                    self._end_together(self._verdict)
            except dist.DistError:
                return  # the first process has ended: the others will, or `_watch` says that it does not answer
            now = time.monotonic()
            for rank, value in enumerate(published):
                if value != self._others[rank]:
                    self._others[rank], self._changed[rank] = value, now
            self._answered = now

    def _watch(self, closed: threading.Event) -> None:
        while not closed.wait(self._interval):
            now = time.monotonic()
            if now - self._own[2] <= self.timeout_seconds:
                continue
            if now - self._answered > self.timeout_seconds / 2:
                self._end_alone(f"{self._name(0)} has not answered for {now - self._answered:.0f} s")
            positions = [json.loads(value)[1:] for value in self._others]
            ages = [age + now - changed for (_, _, age), changed in zip(positions, self._changed)]
            if min(ages) <= self.timeout_seconds:
                continue
            silent = [rank for rank, changed in enumerate(self._changed) if now - changed > self.timeout_seconds / 2]
            # Within one phase: who has been there longest, where the others came later and wait.
            progress = [(step, _ORDER.index(phase), -age) for (step, phase, _), age in zip(positions, ages)]
            behind = silent[0] if silent else progress.index(min(progress))
            step, phase, _ = positions[behind]
            if silent:
                words = (
                    f"{', '.join(map(self._name, silent))} has stopped: last seen {ages[behind]:.0f} s ago in "
                    f"{phase!r} of step {step}"
                )
            else:
                words = f"{self._name(behind)} has been in {phase!r} of step {step} for {ages[behind]:.0f} s"
                if all(position[:2] == [step, phase] for position in positions) and self.size > 1:
                    words += ", as have all others"
                elif self.size > 1:
                    words += " while all others wait for it"
            self._verdict = _Verdict(silent or [behind], not silent, words)  # `_exchange` may speak to the store

    def _name(self, rank: int) -> str:
        return f"process {rank} (host {self._hosts[rank]})"

    def _end_together(self, verdict: _Verdict) -> NoReturn:
        self._closed.set()
        # Whatever stands still below, this process ends.
        last = threading.Timer(2 * _PATIENCE_SECONDS, os._exit, (1,))
        last.daemon = True
        last.start()
        try:
            if verdict.answers and self.rank in verdict.at_fault:
                faulthandler.dump_traceback()  # where it stands still
                self._store.set(_SHOWN, "yes")
            # Once one ends, the launcher ends the others: not before all is said.
            if self.rank == self._speaker(verdict.at_fault):
                if verdict.answers:
                    self._wait_for(_SHOWN)
                self._say(verdict.words)
                self._store.set(_SAID, "yes")
                time.sleep(min(self._interval, 1.0))  # to let the others end before the store does
            else:
                self._wait_for(_SAID)
        finally:
            os._exit(1)  # the main thread cannot be interrupted

    def _wait_for(self, key: str) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with suppress(dist.DistError):  # the store has ended
            while not self._store.multi_get([key])[0] and time.monotonic() < deadline:
                time.sleep(0.1)

    def _end_alone(self, words: str) -> NoReturn:
        """End without the store, whose process has stopped."""
        if self.rank == self._speaker([0]):
            self._say(words)
        else:
            time.sleep(_PATIENCE_SECONDS)
        os._exit(1)

    def _speaker(self, at_fault: list[int]) -> int:
        """Return the one that speaks for all: the first that is sure to be able to."""
        return min(set(range(self.size)) - set(at_fault), default=at_fault[0])

    def _say(self, words: str) -> None:
        logger.error(
            "%s: look at that process and its machine; if the step is only slow, raise "
            "--distributed-timeout-minutes (now %g)",
            words,
            self.timeout_seconds / 60,
        )
