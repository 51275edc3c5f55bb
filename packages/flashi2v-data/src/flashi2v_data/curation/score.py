"""The command `flashi2v-data score`: a meta JSON in, the same with columns that signals fill out.

Scoring                     calls every signal with a clip, opened once, in a process that may die over it
passes.run_over_entries     does so with all entries that the ledger does not hold yet, on this machine or a cluster
unite                       entries and the ledger's columns, in order; what concerns the whole set is decided
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashi2v_data
from flashi2v_data.atomic import atomic_file
from flashi2v_data.curation.folder import write_meta
from flashi2v_data.curation.meta import SIGNALS_SUFFIX, state_of
from flashi2v_data.curation.passes import (
    annotations_of,
    check_output,
    checked_entry,
    entries_with_results,
    ledger_of,
    run_over_entries,
    unchanged_annotations,
)
from flashi2v_data.curation.stream import plain
from flashi2v_data.engines import EachEntry, Engine, Shard, Shards
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation
from flashi2v_data.signals import Clip, SetSignal, Signal, find_signals
from flashi2v_data.signals.protocol import Column, provenance
from flashi2v_data.workers import Limits

# So many may be lost by a kill for each process, and are sent at once.
PIECE_ENTRIES = 16


@dataclass
class ScoreReport:
    """What became of all clips.

    Attributes:
        scored: clips that are in the output.
        failed: others, by the kind of their fault; `<output>.failed.jsonl` names them.
    """

    scored: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """Lay out the counts as a table."""
        rows = [("total", self.scored + self.failed.total()), ("scored", self.scored), *sorted(self.failed.items())]
        return "\n".join(f"{name:16}{count:>12,}" for name, count in rows)


class Scoring:
    """Calls signals with one clip after the other; sent to the processes that score."""

    def __init__(self, signals: Sequence[Signal]) -> None:
        self._signals = signals
        self._wanted = [frames for signal in signals for frames in signal.frames]

    def __call__(self, entry: Any) -> dict[str, Any]:
        """Return what each signal says of an entry's clip.

        Raises:
            DecodeError: the clip cannot be read.
            Exception: of a signal.
        """
        with Clip(checked_entry(entry), self._wanted) as clip:
            return {signal.name: self._values(signal, clip) for signal in self._signals}

    def _values(self, signal: Signal, clip: Clip) -> Any:
        values = plain(signal(clip))
        return values if isinstance(signal, SetSignal) else _checked(signal, values)


def _checked(signal: Signal, values: Any) -> dict[str, Any]:
    """Return a signal's columns, if they are what it declares.

    Raises:
        InputError: they are not.
    """
    if not isinstance(values, dict) or values.keys() != signal.columns.keys():
        raise InputError(f"signal {signal.name} gave {values!r:.100}, not its columns {', '.join(signal.columns)}")
    for name, kind in signal.columns.items():
        if values[name] is not None and not _fits(values[name], kind):
            raise InputError(f"signal {signal.name}: column {name} is {values[name]!r:.60}, not {kind.__name__}")
    return values


def _fits(value: Any, kind: Column) -> bool:
    return type(value) in ((int, float) if kind is float else (kind,))


def score(
    meta: Path,
    output: Path,
    signals: Sequence[str],
    own: Sequence[str],
    engine: Engine,
    *,
    root: str | None = None,
    limits: Limits,
    shard: Shard | None = None,
) -> ScoreReport | None:
    """Score all clips of a meta JSON, or a shard of them; a run that was ended goes on from its ledger.

    Args:
        meta: a meta JSON or a table, or an annotation file (.txt) that names several.
        output: the meta JSON to write, .json; its ledger lies beside it until it is written.
        signals: names.
        own: module:Class of others.
        engine: spreads the clips.
        root: that the paths of a meta JSON are relative to; by default its own directory.
        limits: for one clip in one process.
        shard: of the pieces; None for all, which are then united.

    Returns:
        The counts, or None where other shards are to come.

    Raises:
        InputError: something given is wrong, or another run writes this ledger.
        StorageError, EngineError: the disk or the engine fails.
    """
    check_output(output)
    annotations = annotations_of(meta, root)
    found = find_signals(signals, own)
    stage = EachEntry(Scoring(found), limits)
    purpose = _purpose(annotations, found, signals, own)
    run_over_entries(engine, stage, annotations, PIECE_ENTRIES, ledger_of(output), purpose, shard)
    return None if shard is not None and shard.count > 1 else unite(Shards(ledger_of(output)), output, own)


def _purpose(
    annotations: Sequence[Annotation], found: Sequence[Signal], signals: Sequence[str], own: Sequence[str]
) -> dict[str, Any]:
    return {
        "command": "score",
        "version of flashi2v-data": flashi2v_data.__version__,
        "size of pieces": PIECE_ENTRIES,
        "meta JSON": state_of(annotations),
        "--signals": [*signals],
        "--signal": [*own],
        "signals": provenance(found),
    }


def unite(shards: Shards, output: Path, own: Sequence[str]) -> ScoreReport:
    """Write the output from a ledger, and remove the ledger.

    Args:
        shards: all that there are.
        output: as `score` takes it.
        own: module:Class of signals that decide over the whole set; code is never taken from a ledger's word.

    Raises:
        InputError: the meta JSON has changed, or a signal is needed that was not given.
    """
    check_output(output)
    purpose = shards.purpose
    annotations = unchanged_annotations(shards)
    missing = [name for name in purpose["--signal"] if name not in own]
    if missing:
        raise InputError(f"{shards.directory} was made with --signal {missing[0]}: give it here, too")
    signals = find_signals(purpose["--signals"], purpose["--signal"])
    report = ScoreReport()
    with atomic_file(output.with_suffix(SIGNALS_SUFFIX)) as file:
        file.write_text(json.dumps(purpose["signals"], indent=1) + "\n")
    write_meta(output, _united(annotations, shards, signals, report, output.with_suffix(".failed.jsonl")))
    shards.remove()
    return report


def _united(
    annotations: Sequence[Annotation], shards: Shards, signals: Sequence[Signal], report: ScoreReport, failed: Path
) -> Iterator[dict[str, Any]]:
    """Yield the entries that could be scored with their columns, and list the others in a file."""
    finals = {s.name: iter(s.finish(_said(shards, s.name))) for s in signals if isinstance(s, SetSignal)}
    for entry, said in entries_with_results(annotations, shards, report.failed, failed):
        for signal in signals:
            final = finals.get(signal.name)
            columns = said[signal.name] if final is None else _checked(signal, plain(next(final, None)))
            entry.update((name, value) for name, value in columns.items() if value is not None)
        report.scored += 1
        yield entry


def _said(shards: Shards, name: str) -> Iterator[Any]:
    """Yield what a signal said of the clips that could be scored."""
    return (said[name] for said, fault, _ in itertools.chain.from_iterable(shards) if fault is None)
