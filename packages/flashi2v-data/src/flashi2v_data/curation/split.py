"""The command `flashi2v-data split`: long videos in, clips of them out, as entries with `cut`; nothing is coded again.

Splitting     finds the scenes of a video, frame by frame, in a process that may die over it
clips_of      cuts a scene to the lengths that are wanted
engines       the ledger, and the entries in their order, as for `score`
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from flashi2v_data.engines import EachEntry, Engine, Shard, Shards
from flashi2v_data.errors import InputError
from flashi2v_data.records import SIGNAL_COLUMNS
from flashi2v_data.signals import Clip, find_signals
from flashi2v_data.signals.cuts import TINY, Detector, find_transitions
from flashi2v_data.signals.protocol import provenance
from flashi2v_data.workers import Limits

# A video takes minutes: a kill should not cost several.
PIECE_ENTRIES = 1
# What an entry says of the whole video is not said of a part of it.
_OF_THE_WHOLE = ("cut", "num_frames", "start_frame_idx", "motion", *SIGNAL_COLUMNS)


class Lengths(NamedTuple):
    """Of the clips that are wanted.

    Attributes:
        min_seconds: what is shorter is left out.
        max_seconds: what is longer is cut into equal parts.
        margin: frames that are left out beside each cut, where coding may show some of the other scene.
    """

    min_seconds: float
    max_seconds: float
    margin: int = 0

    def check(self) -> None:
        """Refuse lengths that contradict each other.

        Raises:
            InputError: naming the options.
        """
        if not 0 < self.min_seconds <= self.max_seconds < math.inf:
            given = f"--min-seconds {self.min_seconds:g} and --max-seconds {self.max_seconds:g}"
            raise InputError(f"{given}: give positive numbers, the first not above the second")


def clips_of(num_frames: int, fps: float, transitions: Sequence[tuple[int, int]], lengths: Lengths) -> list[list[int]]:
    """Return the clips of a video, [first frame, end] each, ascending, none with a cut within.

    A scene that is too long becomes equal parts; where these would be too short, as many of the greatest length as fit.

    Args:
        num_frames: of the video.
        fps: its frames per second.
        transitions: as `find_transitions` gives them.
        lengths: of the clips.
    """
    least = math.ceil(lengths.min_seconds * fps - 1e-6)
    most = math.floor(lengths.max_seconds * fps + 1e-6)
    clips = []
    ends = [*((end - lengths.margin) for end, _ in transitions), num_frames]
    begins = [0, *((begin + lengths.margin) for _, begin in transitions)]
    for begin, end in zip(begins, ends):
        length = end - begin
        if not 0 < least <= most or length < least:
            continue
        num_parts = math.ceil(length / most)
        if length // num_parts >= least:
            edges = [begin + length * part // num_parts for part in range(num_parts + 1)]
        else:
            edges = [begin + most * part for part in range(length // most + 1)]
        clips += [[first, last] for first, last in itertools.pairwise(edges) if least <= last - first <= most]
    return clips


class Splitting:
    """Finds the clips of a video; sent to the processes that look at videos."""

    def __init__(self, detector: Detector, lengths: Lengths) -> None:
        self._detector, self._lengths = detector, lengths

    def __call__(self, entry: Any) -> dict[str, Any]:
        """Return the clips of an entry's video, within its `cut`, and its length.

        Raises:
            DecodeError: the video cannot be read.
        """
        with Clip(checked_entry(entry)) as clip:
            transitions = find_transitions(clip.pictures(TINY), self._detector)
            clips = clips_of(clip.num_frames, clip.fps, transitions, self._lengths)
            return {
                "clips": [[clip.start + first, clip.start + end] for first, end in clips],
                "seconds": clip.num_frames / clip.fps,
                "kept": sum(end - first for first, end in clips) / clip.fps,
                "cuts": len(transitions),
            }


@dataclass
class SplitReport:
    """What became of all videos.

    Attributes:
        videos: that could be read.
        clips: of them.
        cuts: that were found.
        seconds: of all videos.
        kept: seconds, in clips.
        failed: videos that could not be read, by the kind of their fault; `<output>.failed.jsonl` names them.
    """

    videos: int = 0
    clips: int = 0
    cuts: int = 0
    seconds: float = 0.0
    kept: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """Lay out the counts as a table."""
        counts = [("videos", self.videos), ("cuts", self.cuts), ("clips", self.clips), *sorted(self.failed.items())]
        lines = [f"{name:16}{count:>12,}" for name, count in counts]
        share = 100 * self.kept / self.seconds if self.seconds else 0
        return "\n".join([*lines, f"{'hours':16}{self.seconds / 3600:>12,.2f}, {share:.1f} % of them in clips"])


def split(
    meta: Path,
    output: Path,
    engine: Engine,
    *,
    detector: Detector,
    lengths: Lengths,
    root: str | None = None,
    limits: Limits,
    shard: Shard | None = None,
) -> SplitReport | None:
    """Split all videos of a meta JSON, or a shard of them; a run that was ended goes on from its ledger.

    Args:
        meta: a meta JSON or a table, or an annotation file (.txt) that names several.
        output: the meta JSON to write, .json; its ledger lies beside it until it is written.
        engine: spreads the videos.
        detector: of cuts.
        lengths: of the clips.
        root: that the paths of a meta JSON are relative to; by default its own directory.
        limits: for one video in one process.
        shard: of the pieces; None for all, which are then united.

    Returns:
        The counts, or None where other shards are to come.

    Raises:
        InputError: something given is wrong, or another run writes this ledger.
        StorageError, EngineError: the disk or the engine fails.
    """
    lengths.check()
    check_output(output)
    annotations = annotations_of(meta, root)
    purpose = {
        "command": "split",
        "version of flashi2v-data": flashi2v_data.__version__,
        "meta JSON": state_of(annotations),
        "lengths": [*lengths],
        "signals": provenance(find_signals([detector])),
    }
    stage = EachEntry(Splitting(detector, lengths), limits)
    run_over_entries(engine, stage, annotations, PIECE_ENTRIES, ledger_of(output), purpose, shard)
    return None if shard is not None and shard.count > 1 else unite(Shards(ledger_of(output)), output)


def unite(shards: Shards, output: Path) -> SplitReport:
    """Write the output from a ledger, and remove the ledger.

    Raises:
        InputError: the meta JSON has changed.
    """
    check_output(output)
    report = SplitReport()
    with atomic_file(output.with_suffix(SIGNALS_SUFFIX)) as file:
        file.write_text(json.dumps(shards.purpose["signals"], indent=1) + "\n")
    write_meta(output, _clips(shards, report, output.with_suffix(".failed.jsonl")))
    shards.remove()
    return report


def _clips(shards: Shards, report: SplitReport, failed: Path) -> Iterator[dict[str, Any]]:
    """Yield an entry for every clip."""
    for entry, found in entries_with_results(unchanged_annotations(shards), shards, report.failed, failed):
        report.videos += 1
        report.clips += len(found["clips"])
        report.cuts += found["cuts"]
        report.seconds += found["seconds"]
        report.kept += found["kept"]
        rest = {key: value for key, value in entry.items() if key not in _OF_THE_WHOLE}
        for begin, end in found["clips"]:
            yield {**rest, "cut": [begin, end], "num_frames": end - begin}
