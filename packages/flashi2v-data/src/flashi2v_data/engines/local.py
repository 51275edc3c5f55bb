"""The processes of this machine."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

from flashi2v_data.engines.protocol import P, R, Stage

# Pieces that wait behind the one whose result is taken next: one slow entry must not make the others wait.
_AHEAD = 4


class LocalEngine:
    """One worker, in this process, with `jobs` processes of its own."""

    def __init__(self, jobs: int) -> None:
        self.num_processes = jobs

    def run(self, stage: Stage[P, R], pieces: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
        """Yield number and result of every piece, in their order."""
        pending: deque[tuple[int, Any]] = deque()
        with closing(stage.start(self.num_processes)) as worker:
            for number, piece in pieces:
                pending.append((number, worker.submit(piece)))
                if len(pending) > _AHEAD + self.num_processes:
                    done, submitted = pending.popleft()
                    yield done, worker.result(submitted)
            while pending:
                done, submitted = pending.popleft()
                yield done, worker.result(submitted)

    def close(self) -> None:
        """Nothing outlives a run."""
