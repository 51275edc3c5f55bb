"""What `score` and `split` share: a pass over all entries of meta JSON, spread by an engine, and its results in order.

meta.read_pieces, MetaParser    entries, of which some make a numbered piece
engines.run_pieces              the pieces that the ledger does not hold yet, on this machine or a cluster
entries_with_results            entries and what the ledger has of them, in order; those that failed are listed
"""

import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file, check_directory
from flashi2v_data.curation.meta import MetaParser, read_entries, read_pieces, state_of
from flashi2v_data.engines import EachEntry, Engine, Ledger, Shard, Shards, Throughput, run_pieces
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import Annotation, Index, read_annotations, with_whole_numbers

logger = logging.getLogger(__name__)


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


def annotations_of(meta: Path, root: str | None) -> list[Annotation]:
    """Return the meta JSON that a command is given, .json, or by an annotation file, .txt.

    Raises:
        InputError: there is none, or a root that the annotation file names itself.
    """
    if meta.suffix == ".txt":
        if root is not None:
            raise InputError(f"--root: {meta} names the roots of its meta JSON itself: leave it out")
        return read_annotations(meta)
    if not meta.is_file():
        raise InputError(f"{meta}: no such meta JSON")
    return [Annotation(str(meta.parent) if root is None else root, str(meta))]


class _Seen(msgspec.Struct):
    """What is looked at of an entry to find its clip."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    num_frames: Annotated[int, msgspec.Meta(ge=1)] | msgspec.UnsetType = msgspec.UNSET
    cut: Annotated[list[Index], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    crop: Annotated[list[Index], msgspec.Meta(min_length=4, max_length=4)] | msgspec.UnsetType = msgspec.UNSET


def checked_entry(entry: Any) -> dict[str, Any]:
    """Return an entry of which a clip can be opened.

    Raises:
        DecodeError: it is none.
    """
    entry = with_whole_numbers(entry)
    try:
        msgspec.convert(entry, _Seen)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise DecodeError(str(entry)[:100], f"is no entry of a clip: {error}", is_of_record=True) from None
    return entry


def run_over_entries(
    engine: Engine,
    stage: EachEntry[Any],
    annotations: Sequence[Annotation],
    piece_entries: int,
    ledger: Path,
    purpose: Mapping[str, Any],
    shard: Shard | None,
) -> None:
    """Call a function with every entry of a shard that the ledger does not hold yet, and show progress.

    Args:
        engine: spreads them.
        stage: the function, and its limits.
        annotations: the meta JSON.
        piece_entries: so many entries are sent at once, and may be lost by a kill for each process.
        ledger: a directory.
        purpose: what the results are made of and by; `command` names the work.
        shard: of the pieces; None for all.

    Raises:
        InputError: a meta JSON is broken, another run writes this ledger, or nothing goes well.
        StorageError, EngineError: the disk or the engine fails.
    """
    num_bytes = sum(os.path.getsize(annotation.meta) for annotation in annotations)
    with (
        Ledger(ledger, purpose, shard or Shard(0, 1)) as results,
        tqdm(total=num_bytes, desc=purpose["command"], disable=None, bar_format=_BAR) as bar,
    ):
        pieces = _pieces(annotations, piece_entries, bar)
        progress = _Progress(bar)
        run_pieces(engine, stage, pieces, results, fault_of=_fault_of, on_done=progress)
    if progress.throughput.num_clips:
        logger.info("%s: %s", purpose["command"], progress.throughput.describe(engine.num_processes))


def _pieces(annotations: Sequence[Annotation], num_entries: int, bar: tqdm) -> Iterator[list[Any]]:
    """Cut all entries into pieces, and show how far the files have been read."""
    bytes_before = 0
    for annotation in annotations:
        parser, waiting = MetaParser(annotation), []
        for text in read_pieces(annotation):
            waiting += parser.parse(text)
            while len(waiting) >= num_entries:
                yield waiting[:num_entries]
                del waiting[:num_entries]
            bar.update(bytes_before + text.end - bar.n)
        if waiting:
            yield waiting
        bytes_before += os.path.getsize(annotation.meta)


class _Progress:
    """Shows how quickly clips are looked at, and what failed; the time that went into those is not known."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self._failed = Counter[str]()
        self.throughput = Throughput()

    def __call__(self, number: int, result: list[Any]) -> None:
        self._failed.update(fault[0] for _, fault, _ in result if fault is not None)
        computing, in_all = map(sum, zip(*(seconds for _, _, seconds in result)))
        self.throughput.add(len(result), computing, max(0.0, in_all - computing))
        if not self._bar.disable:
            faults = "".join(f", {count:,} {kind}" for kind, count in sorted(self._failed.items()))
            rate = f"{self.throughput.rate:,.1f} clips/s"
            self._bar.set_postfix_str(f"{self.throughput.num_clips:,} clips, {rate}{faults}")


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


def _fault_of(result: list[Any]) -> str | None:
    faults = [fault for _, fault, _ in result]
    return None if None in faults or not faults else str(faults[-1][1])


def unchanged_annotations(shards: Shards) -> list[Annotation]:
    """Return the meta JSON that a ledger was made from.

    Raises:
        InputError: one has changed.
    """
    annotations = [Annotation(*file[:2]) for file in shards.purpose["meta JSON"]]
    if state_of(annotations) != shards.purpose["meta JSON"]:
        command = shards.purpose["command"]
        raise InputError(f"{shards.directory}: its meta JSON has changed since: remove the ledger, and {command} again")
    return annotations


def entries_with_results(
    annotations: Sequence[Annotation], shards: Shards, num_failed: Counter[str], failed: Path
) -> Iterator[tuple[Any, Any]]:
    """Yield every entry that went well with its result, and list the others in a file, if there are any.

    Args:
        annotations: the meta JSON.
        shards: of the ledger.
        num_failed: counts the others, by the kind of their fault.
        failed: the file, of JSON lines.
    """
    entries = itertools.chain.from_iterable(map(read_entries, annotations))
    with atomic_file(failed) as temporary, temporary.open("w") as file:
        for entry, (result, fault, _) in zip(entries, itertools.chain.from_iterable(shards), strict=True):
            if fault is None:
                yield entry, result
            else:
                num_failed[fault[0]] += 1
                file.write(json.dumps({"kind": fault[0], "reason": fault[1], "entry": entry}) + "\n")
    if not num_failed:
        failed.unlink()
