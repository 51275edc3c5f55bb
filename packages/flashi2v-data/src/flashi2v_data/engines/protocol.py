"""Who does what when work is spread, from the set to the result.

    pieces          the set, cut into numbered pieces: the same numbers whoever runs them, and however often
    Stage           what is done with a piece; picklable, and knows no engine
    Worker          a stage at work on some processor or device; what may hang or crash, it gives to a `WorkerPool`
    Engine          gives pieces to workers: `local` to one in this process, `ray` to one in each actor of a cluster
    ledger.Ledger   every result, under its number, on the disk; a run that was killed does only what is missing there
    ledger.Shards   the results of all shards in the order of their numbers, from which the output is made

Results reach the ledger in any order and leave it in theirs, so the output is the same for every engine, number of
processes and shards, and after any interruption.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

P = TypeVar("P")
R = TypeVar("R")
P_contra = TypeVar("P_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class Worker(Protocol[P_contra, R_co]):
    """A stage at work."""

    def submit(self, piece: P_contra) -> Any:
        """Take a piece in; return what `result` is to be given."""
        ...

    def result(self, submitted: Any) -> R_co:
        """Wait for a piece, and return what became of it: plain values, as msgpack has them."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class Stage(Protocol[P_contra, R_co]):
    """What is done with pieces.

    Attributes:
        resources: that a worker of one job takes, by the names that Ray has for them: CPU, GPU, NPU.
    """

    @property
    def resources(self) -> Mapping[str, float]: ...

    def start(self, jobs: int) -> Worker[P_contra, R_co]:
        """Begin to work here, by so many processes."""
        ...


class Engine(Protocol):
    """Spreads pieces over workers.

    Attributes:
        num_processes: that work; of a cluster it is known when a run has begun.
    """

    @property
    def num_processes(self) -> int: ...

    def run(self, stage: Stage[P, R], pieces: Iterable[tuple[int, P]]) -> Iterator[tuple[int, R]]:
        """Yield number and result of every piece, as they are done; pieces are taken in only as fast as they are done.

        Raises:
            InputError: what a worker raised because of what it was given.
            EngineError: a piece ended its worker again and again.
        """
        ...

    def close(self) -> None:
        """End what was started."""
        ...
