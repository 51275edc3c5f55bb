"""The command `flashi2v-data score`: a meta JSON in, the same with columns that signals fill out.

meta.read_pieces, MetaParser    entries, of which some make a numbered piece
Scoring                         calls every signal with a clip, opened once, in a process that may die over it
engines.run_pieces              the pieces that the ledger does not hold yet, on this machine or a cluster
unite                           entries and the ledger's columns, in order; what concerns the whole set is decided
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tqdm import tqdm

import flashi2v_data
from flashi2v_data.atomic import atomic_file, check_directory
from flashi2v_data.curation.folder import write_meta
from flashi2v_data.curation.meta import SIGNALS_SUFFIX, MetaParser, read_entries, read_pieces, state_of
from flashi2v_data.curation.stream import plain
from flashi2v_data.engines import EachEntry, Engine, Ledger, Shard, Shards, run_pieces
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import Annotation, Index, read_annotations, with_whole_numbers
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


class _Seen(msgspec.Struct):
    """What is looked at of an entry to find its clip."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    num_frames: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType = msgspec.UNSET
    cut: Annotated[list[Index], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    crop: Annotated[list[Index], msgspec.Meta(min_length=4, max_length=4)] | msgspec.UnsetType = msgspec.UNSET


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
        entry = with_whole_numbers(entry)
        try:
            msgspec.convert(entry, _Seen)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            raise DecodeError(str(entry)[:100], f"is no entry of a clip: {error}", is_of_record=True) from None
        with Clip(entry, self._wanted) as clip:
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
    annotations = _annotations(meta, root)
    found = find_signals(signals, own)
    stage = EachEntry(Scoring(found), limits)
    with Ledger(ledger_of(output), _purpose(annotations, found, signals, own), shard or Shard(0, 1)) as ledger:
        num_bytes = sum(os.path.getsize(annotation.meta) for annotation in annotations)
        with tqdm(total=num_bytes, desc="score", disable=None, bar_format=_BAR) as bar:
            pieces = _pieces(annotations, bar)
            run_pieces(engine, stage, pieces, ledger, fault_of=_fault_of, on_done=_Progress(bar))
    return None if shard is not None and shard.count > 1 else unite(Shards(ledger_of(output)), output, own)


def check_output(output: Path) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Raises:
        InputError: naming it.
    """
    if output.suffix != ".json":
        raise InputError(f"--output {output}: a meta JSON ends in .json")
    if output.exists():
        raise InputError(f"--output {output} exists: remove it, or choose another name")
    check_directory(output.parent, "--output")


def ledger_of(output: Path) -> Path:
    """Return where the ledger of an output lies."""
    return output.with_name(f"{output.name}.ledger")


def _annotations(meta: Path, root: str | None) -> list[Annotation]:
    if meta.suffix == ".txt":
        if root is not None:
            raise InputError(f"--root: {meta} names the roots of its meta JSON itself: leave it out")
        return read_annotations(meta)
    if not meta.is_file():
        raise InputError(f"{meta}: no such meta JSON")
    return [Annotation(str(meta.parent) if root is None else root, str(meta))]


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


def _pieces(annotations: Sequence[Annotation], bar: tqdm) -> Iterator[list[Any]]:
    """Cut all entries into pieces, and show how far the files have been read."""
    bytes_before = 0
    for annotation in annotations:
        parser, waiting = MetaParser(annotation), []
        for text in read_pieces(annotation):
            waiting += parser.parse(text)
            while len(waiting) >= PIECE_ENTRIES:
                yield waiting[:PIECE_ENTRIES]
                del waiting[:PIECE_ENTRIES]
            bar.update(bytes_before + text.end - bar.n)
        if waiting:
            yield waiting
        bytes_before += os.path.getsize(annotation.meta)


class _Progress:
    """Shows how quickly clips are scored, and what failed."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._num_clips, self._failed = 0, Counter[str]()

    def __call__(self, number: int, result: list[Any]) -> None:
        self._num_clips += len(result)
        self._failed.update(fault[0] for _, fault in result if fault is not None)
        if not self._bar.disable:
            seconds = self._bar.format_dict["elapsed"] or 1
            faults = "".join(f", {count:,} {kind}" for kind, count in sorted(self._failed.items()))
            text = f"{self._num_clips:,} clips, {self._num_clips / seconds:,.1f} clips/s{faults}"
            self._bar.set_postfix_str(text)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


def _fault_of(result: list[Any]) -> str | None:
    faults = [fault for _, fault in result]
    return None if None in faults or not faults else str(faults[-1][1])


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
    annotations = [Annotation(*file[:2]) for file in purpose["meta JSON"]]
    if state_of(annotations) != purpose["meta JSON"]:
        raise InputError(f"{shards.directory}: its meta JSON has changed since: remove the ledger, and score again")
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
    entries = itertools.chain.from_iterable(map(read_entries, annotations))
    with atomic_file(failed) as temporary, temporary.open("w") as file:
        for entry, (said, fault) in zip(entries, itertools.chain.from_iterable(shards), strict=True):
            if fault is not None:
                report.failed[fault[0]] += 1
                file.write(json.dumps({"kind": fault[0], "reason": fault[1], "entry": entry}) + "\n")
                continue
            for signal in signals:
                final = finals.get(signal.name)
                columns = said[signal.name] if final is None else _checked(signal, plain(next(final, None)))
                entry.update((name, value) for name, value in columns.items() if value is not None)
            report.scored += 1
            yield entry
    if not report.failed:
        failed.unlink()


def _said(shards: Shards, name: str) -> Iterator[Any]:
    """Yield what a signal said of the clips that could be scored."""
    return (said[name] for said, fault in itertools.chain.from_iterable(shards) if fault is None)
