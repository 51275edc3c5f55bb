"""What a signal is: a picklable object that looks at one clip and fills columns of its record."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from flashi2v_data.signals.clip import Clip, Frames

# What a column may hold: a number, a text, a truth value, or a list of numbers or texts.
Column = type[float] | type[int] | type[str] | type[bool] | type[list]


@runtime_checkable
class Signal(Protocol):
    """Looks at one clip at a time, in any process and order.

    It is pickled to the processes that score, so weights and sessions are loaded there, at the first call. A clip costs
    at most two tries: one that hangs, crashes its process or takes too much memory is named and left out, and so is one
    of which a signal raises an exception.

    Attributes:
        name: a word; what `--signals` and the provenance call it.
        version: changes whenever a clip may be scored differently; libraries that decide it belong into it.
        licence: SPDX expression of the code and the weights that it runs.
        columns: what it adds to a record, and of which type. A value may also be None, which leaves the key out.
        frames: what it asks the clip for; what all signals ask for is decoded in one go.
    """

    name: str
    version: str
    licence: str
    columns: Mapping[str, Column]
    frames: Sequence[Frames]

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Return a value for every column; of a `SetSignal`, what its `finish` needs (plain values, as in JSON).

        Raises:
            DecodeError: the clip cannot be read.
        """
        ...


@runtime_checkable
class SetSignal(Signal, Protocol):
    """A signal whose columns depend on the whole set: near-duplicates, ranks."""

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the columns of every clip, given what calls returned for all of them, in the order of the set.

        It is called once, in one process, when all clips are scored, over all shards. `rows` comes from the disk and is
        read once: a signal keeps of it only what it must.
        """
        ...


def provenance(signals: Iterable[Signal]) -> dict[str, Any]:
    """Return what columns were made by, for the store and the ledger."""
    return {
        signal.name: {
            "version": signal.version,
            "licence": signal.licence,
            "columns": {name: kind.__name__ for name, kind in signal.columns.items()},
        }
        for signal in signals
    }
