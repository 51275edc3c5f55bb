"""The command `flashi2v-data merge`: what several shards did, as one would have done it."""

from collections.abc import Sequence
from pathlib import Path

from flashi2v_data.curation import score, split, spread
from flashi2v_data.curation.passes import ledger_of
from flashi2v_data.engines import Shards
from flashi2v_data.errors import InputError


def merge(output: Path, own: Sequence[str] = (), *, plots: bool = False) -> str:
    """Unite the shards of a command, when all are done.

    Args:
        output: what the command was to write.
        own: module:Class of signals that it was given.
        plots: draw a filter's report.png.

    Returns:
        What is to be said of it.

    Raises:
        InputError: there is no ledger, or a shard is missing or unfinished; an option that has no effect was given.
    """
    if spread.ledger_of(output).is_dir():
        if own:
            raise InputError("--signal is of score: leave it out")
        path, report = spread.unite(Shards(spread.ledger_of(output)), plots=plots)
        return f"written to {path}: {report.kept:,} of {report.total:,} clips, as report.txt tells"
    if plots:
        raise InputError("--plots is of filter: leave it out")
    shards = Shards(ledger_of(output))
    if shards.purpose["command"] == "split":
        if own:
            raise InputError("--signal is of score: leave it out")
        return f"{split.unite(shards, output).describe()}\nwritten to {output}"
    return f"{score.unite(shards, output, own).describe()}\nwritten to {output}"
