"""The command `flashi2v-data merge`: what several shards did, as one would have done it."""

from collections.abc import Sequence
from pathlib import Path

from flashi2v_data.curation.score import ledger_of, unite
from flashi2v_data.engines import Shards


def merge(output: Path, own: Sequence[str] = ()) -> str:
    """Unite the shards of a command, when all are done.

    Args:
        output: what the command was to write.
        own: module:Class of signals that it was given.

    Returns:
        What is to be said of it.

    Raises:
        InputError: there is no ledger, or a shard is missing or unfinished.
    """
    report = unite(Shards(ledger_of(output)), output, own)
    return f"{report.describe()}\nwritten to {output}"
