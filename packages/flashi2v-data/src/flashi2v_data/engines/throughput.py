"""How quickly a run goes, and what bounds it: what is said when it ends."""

import time
from dataclasses import dataclass, field


@dataclass
class Throughput:
    """Counts clips, and the seconds in which workers worked or waited.

    Attributes:
        workers: what there are several of.
        working: what they do.
        bound: what bounds a run in which they mostly do that.
        awaited: what they wait for, which bounds a run in which they mostly do that.
        num_clips: so far.
    """

    workers: str = "processes"
    working: str = "computing"
    bound: str = "processors"
    awaited: str = "files or a processor"
    num_clips: int = 0
    _working: float = 0.0
    _waiting: float = 0.0
    _begun: float = field(default_factory=time.monotonic)

    def add(self, num_clips: int, working: float, waiting: float) -> None:
        """Count clips that are done, and the seconds of all workers that they took."""
        self.num_clips += num_clips
        self._working += working
        self._waiting += waiting

    @property
    def rate(self) -> float:
        """Clips a second."""
        return self.num_clips / max(time.monotonic() - self._begun, 1e-9)

    def describe(self, num_workers: int) -> str:
        """Say how many clips a second there were, where the workers' time went, and which ceiling that leaves."""
        seconds, rate = time.monotonic() - self._begun, self.rate
        whole = num_workers * seconds
        working, waiting = self._working / whole, self._waiting / whole
        busy = min(1.0, working + waiting)
        bound = self.bound if working >= waiting else self.awaited
        return (
            f"{self.num_clips:,} clips in {seconds:,.1f} s, {rate:,.1f} a second by {num_workers} {self.workers}: "
            f"{working:.0%} of their time {self.working}, {waiting:.0%} waiting for {self.awaited}, {1 - busy:.0%} "
            f"without work; bound by {bound}: {busy:.0%} of the {rate / busy if busy else rate:,.1f} a second that "
            "this allows"
        )
