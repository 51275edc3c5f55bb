"""From meta JSON to the clips that are fit for training: the whole way of an entry.

    meta.read_pieces          cuts a meta JSON into pieces of whole entries
    meta.parse_plain, ...     makes entries of a piece, in a worker
    judge.read_entry          holds an entry against the schema, `records.Entry`
    judge.Judge               holds it against the limits of the settings, `rules`
    probing.Prober            asks the video what the entry leaves out; then it is judged
    judge.record_of, pack     make the record that is stored, by `store.writer`
    report.FilterReport       counts all of them

Outcomes come in the order of the entries, however many processes work, so the same files give the same store.
"""

import contextlib
import gc
import itertools
import numbers
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.judge import Judge, read_entry, record_of
from flashi2v_data.curation.meta import (
    BrokenMetaError,
    MetaParser,
    Piece,
    count_lines,
    parse_plain,
    parse_whole,
    read_pieces,
)
from flashi2v_data.curation.probing import Prober, Probing
from flashi2v_data.curation.report import FilterReport
from flashi2v_data.curation.rules import Rejection
from flashi2v_data.errors import DecodeError, StorageError
from flashi2v_data.records import Annotation, Entry, Record
from flashi2v_data.start_methods import quick_start
from flashi2v_data.store.codec import ValueCodec
from flashi2v_data.workers import Task, WorkerLost, WorkerPool

# Entries that `filter_records` takes in at once.
_BATCH = 64
# Batches or pieces that wait for their videos: one slow video must not make the others wait.
_AHEAD = 8

# What is passed on of a record that is kept, or None where it cannot be stored.
Pack = Callable[[Any], Any]


@dataclass
class Outcome:
    """What became of consecutive entries.

    Attributes:
        kept: what is passed on of the clips that fit, in order; None holds the position of an incomplete one.
        incomplete: clips whose entries leave out what must be read from their videos: the position in `kept`, the clip,
            and its entry, if that has further keys.
        report: counts all but the incomplete ones.
        num_parsed: entries, or lines of JSON Lines, that were read.
        num_pieces: pieces done with this one, counted over all files.
        num_bytes: how far the files have been read.
    """

    kept: list[Any] = field(default_factory=list)
    incomplete: list[tuple[int, Entry, dict[str, Any] | None]] = field(default_factory=list)
    report: FilterReport = field(default_factory=FilterReport)
    num_parsed: int = 0
    num_pieces: int = 0
    num_bytes: int = 0


def filter_records(
    entries: Iterable[Any], config: FilterConfig, report: FilterReport | None = None, *, jobs: int = 1
) -> Iterator[Record]:
    """Yield the clips that fit, in order, complete with what their entries left out.

    Args:
        entries: of meta JSON, as `meta.read_entries` yields them, or rows of a table: NumPy's numbers, arrays and texts
            become Python's, tuples lists, and paths text.
        config: the limits.
        report: counts every entry as it passes.
        jobs: processes that read what entries leave out from the videos.
    """
    report = FilterReport() if report is None else report
    judge, codec, prober = Judge(config), ValueCodec(), Prober(jobs)

    def storable(record: Record) -> Record | None:
        return None if codec.pack(record) is None else record

    entries = map(_plain_entry, entries)
    batches = iter(lambda: list(itertools.islice(entries, _BATCH)), [])
    try:
        for outcome in _complete(
            (_judge_entries(batch, judge, storable) for batch in batches), judge, storable, prober
        ):
            report.add(outcome.report, config)
            yield from outcome.kept
    finally:
        prober.close()


def _plain_entry(entry: Any) -> Any:
    try:
        return plain(entry)
    except RecursionError:  # left as it is, it cannot be stored, and is counted
        return entry


def plain(value: Any) -> Any:
    """Return a value as JSON has it, or as it is where JSON has nothing like it."""
    if type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(plain, value)]
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    as_list = getattr(value, "tolist", None)  # NumPy's arrays and truth values
    return as_list() if callable(as_list) else value


class FileFilter:
    """Filters meta JSON files in parallel into values for a store.

    Args:
        annotations: the files.
        config: the limits.
        prober: reads videos.
        jobs: processes that parse and judge. They start at once, and quickest while this process has one thread.
    """

    def __init__(self, annotations: Sequence[Annotation], config: FilterConfig, prober: Prober, jobs: int) -> None:
        self._annotations = annotations
        self._judge = Judge(config)
        self._pack = ValueCodec(config.compression).pack
        self._prober = prober
        self._pool: WorkerPool[Piece, Outcome | None] = WorkerPool(
            JudgePiece(self._judge, self._pack), jobs, start=quick_start(), depth=2
        )
        self._pool.start()
        self._jobs = jobs

    def outcomes(self, num_done: int = 0) -> Iterator[Outcome]:
        """Yield what becomes of the entries, in order, behind the `num_pieces` of an earlier run's outcome.

        Raises:
            InputError: a meta JSON is broken.
        """
        return outcomes_in_order(
            self._annotations, self._taken, self._judge, self._pack, self._prober, num_done=num_done
        )

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _taken(self, annotation: Annotation, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Outcome | None]]:
        for piece, task in self._submitted(pieces):
            yield piece, self._result(task, annotation)

    def _result(self, task: Task[Piece, Outcome | None], annotation: Annotation) -> Outcome | None:
        try:
            return self._pool.result(task)
        except WorkerLost as lost:
            raise StorageError(f"{annotation.meta}: a piece of it {lost}; is there enough memory?") from None
        except RecursionError:  # an entry that could be parsed, but not sent
            raise BrokenMetaError(f"{annotation.meta}: holds an entry that is nested too deeply") from None

    def _submitted(self, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, Task[Piece, Outcome | None]]]:
        pending: deque[tuple[Piece, Task[Piece, Outcome | None]]] = deque()
        for piece in pieces:
            pending.append((piece, self._pool.submit(piece)))
            if len(pending) > 4 * self._jobs:
                yield pending.popleft()
        yield from pending


# Given the pieces of a meta JSON, yields each with its outcome where it was cut well, else with None.
Take = Callable[[Annotation, Iterator[Piece]], Iterator[tuple[Piece, Outcome | None]]]


def outcomes_in_order(
    annotations: Sequence[Annotation], take: Take, judge: Judge, pack: Pack, prober: Prober, *, num_done: int = 0
) -> Iterator[Outcome]:
    """Yield what becomes of all entries, in order; what `take` could not read, or left incomplete, is judged here.

    Raises:
        InputError: a meta JSON is broken.
    """
    return _complete(_judged(annotations, take, judge, pack, num_done), judge, pack, prober)


def _judged(
    annotations: Sequence[Annotation], take: Take, judge: Judge, pack: Pack, num_done: int
) -> Iterator[Outcome]:
    num_pieces, bytes_before = 0, 0
    for annotation in annotations:
        parser, pieces = MetaParser(annotation), read_pieces(annotation)
        for piece in itertools.islice(pieces, max(0, num_done - num_pieces)):
            parser.parse(piece)
            num_pieces += 1
        for piece, outcome in take(annotation, pieces):
            num_pieces += 1
            if outcome is not None and parser.is_between_entries:
                parser.passed(outcome.num_parsed)
            else:
                outcome = _judge_entries(parser.parse(piece), judge, pack)
            outcome.num_pieces = num_pieces
            outcome.num_bytes = bytes_before + piece.end
            yield outcome
        bytes_before += piece.end


class JudgePiece:
    """What worker processes do; None stands for a piece that was not cut well."""

    def __init__(self, judge: Judge, pack: Pack) -> None:
        self._judge, self._pack = judge, pack

    def __call__(self, piece: Piece) -> Outcome | None:
        gc.disable()  # entries hold no cycles; looking for some takes a third of the time
        plain = parse_plain(piece)
        if plain is not None:
            prefix = os.path.join(piece.annotation.root, "")
            outcome = _judge_all(plain, itertools.repeat(None), self._judge, self._pack, prefix)
        else:
            entries = parse_whole(piece)
            if entries is None:
                return None
            outcome = _judge_entries(entries, self._judge, self._pack)
        outcome.num_parsed = count_lines(piece) if piece.is_lines else outcome.report.total + len(outcome.incomplete)
        return outcome


def _judge_entries(entries: list[Any], judge: Judge, pack: Pack) -> Outcome:
    read = [*map(read_entry, entries)]
    clips = [clip for clip in read if isinstance(clip, Entry)]
    outcome = _judge_all(clips, [entry for entry, clip in zip(entries, read) if isinstance(clip, Entry)], judge, pack)
    outcome.report.count(0, [fault for fault in read if isinstance(fault, Rejection)])
    return outcome


def _judge_all(clips: Sequence[Entry], entries: Iterable[Any], judge: Judge, pack: Pack, prefix: str = "") -> Outcome:
    """Judge clips, with what `record_of` makes records of; `prefix` is joined to relative paths."""
    outcome = Outcome(report=FilterReport(captions=judge.audit.new_count()))
    kept: list[Entry] = []
    rejections: list[Rejection] = []
    for clip, entry, verdict in zip(clips, entries, judge.verdicts(clips)):
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
            continue
        if not clip.path.startswith("/"):  # here, as most clips are rejected
            clip.path = prefix + clip.path
        if verdict == "incomplete":
            outcome.incomplete.append((len(outcome.kept), clip, entry))
            outcome.kept.append(None)
        elif (value := pack(record_of(clip, entry))) is None:
            rejections.append(_UNSTORABLE)
        else:
            outcome.kept.append(value)
            kept.append(clip)
    outcome.report.count(len(kept), rejections)
    judge.audit.count(outcome.report.captions, kept)
    return outcome


_UNSTORABLE = Rejection("invalid_entry")


def _complete(outcomes: Iterable[Outcome], judge: Judge, pack: Pack, prober: Prober) -> Iterator[Outcome]:
    """Judge the incomplete clips too, in the order of all, while the videos of later ones are being read."""
    pending: deque[tuple[Outcome, list[Probing]]] = deque()
    for outcome in outcomes:
        pending.append((outcome, [prober.submit(clip.path) for _, clip, _ in outcome.incomplete]))
        while pending and (len(pending) > _AHEAD or not pending[0][1]):
            yield settled(*pending.popleft(), judge, pack, prober)
    while pending:
        yield settled(*pending.popleft(), judge, pack, prober)


def settled(outcome: Outcome, probings: list[Probing], judge: Judge, pack: Pack, prober: Prober) -> Outcome:
    """Return an outcome with its incomplete clips judged, by what was probed of their videos."""
    kept: list[Entry] = []
    rejections: list[Rejection] = []
    for (position, clip, entry), probing in zip(outcome.incomplete, probings):
        try:
            info = prober.result(probing)
        except DecodeError:
            rejections.append(Rejection("unreadable"))
            continue
        verdict = judge(clip, info)
        if isinstance(verdict, Rejection):
            rejections.append(verdict)
        elif (value := pack(record_of(clip, entry))) is None:
            rejections.append(_UNSTORABLE)
        else:
            outcome.kept[position] = value
            outcome.report.irregular += info.is_irregular
            kept.append(clip)
    outcome.report.count(len(kept), rejections)
    judge.audit.count(outcome.report.captions, kept)
    if probings:
        outcome.kept = [value for value in outcome.kept if value is not None]
        outcome.incomplete = []
    return outcome
