"""What a store holds, in words and pictures."""

import collections
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.curation.probing import Prober, Probing
from flashi2v_data.errors import DecodeError, RecordError
from flashi2v_data.records import Clip, Size, printable
from flashi2v_data.store.reader import LmdbStore
from flashi2v_data.video.frames import FPS_TOLERANCE
from flashi2v_data.video.geometry import Way

# Examples, and faults where not all are asked for.
NUM_SHOWN = 3
# Bars of a histogram in the text.
_NUM_BARS = 8
_BAR_WIDTH = 40
# Videos that are being opened at a time.
_AHEAD = 256
# Bins of a plotted histogram, at most.
_NUM_BINS = 40


@dataclass
class Faults:
    """How many clips have a fault, and their videos, each once.

    Attributes:
        num_listed: only so many videos are kept; None keeps all.
    """

    num_listed: int | None
    count: int = 0
    videos: dict[str, None] = field(default_factory=dict)

    def add(self, video: str) -> None:
        """Count one clip."""
        self.count += 1
        if self.num_listed is None or len(self.videos) < self.num_listed:
            self.videos[video] = None


@dataclass
class Inspection:
    """Counts of the values that occur, the records at fault, and the videos that are missing or cannot be opened."""

    faulty: Faults
    missing: Faults
    unreadable: Faults
    contradicting: Faults
    num_seen: int = 0
    examples: list[Clip] = field(default_factory=list)
    resolutions: collections.Counter[str] = field(default_factory=collections.Counter)
    fps: collections.Counter[float] = field(default_factory=collections.Counter)
    num_frames: collections.Counter[int] = field(default_factory=collections.Counter)
    caption_words: collections.Counter[int] = field(default_factory=collections.Counter)


def inspect_store(store: LmdbStore, *, limit: int | None = None, prober: Prober | None = None) -> Inspection:
    """Look at the first `limit` records (default: all).

    Args:
        store: from `open_store`.
        limit: of records.
        prober: opens every video, which is compared with its record. All faults are listed then, else only the first.
    """
    num_listed = NUM_SHOWN if prober is None else None
    found = Inspection(Faults(num_listed), Faults(num_listed), Faults(num_listed), Faults(num_listed))
    opening: collections.deque[tuple[Clip, Probing]] = collections.deque()
    way = store.config.get("geometry", "reference")  # as filters did before they knew of it
    num_records = len(store) if limit is None else min(limit, len(store))
    for index in tqdm(range(num_records), desc="inspect", unit="clip", disable=None):
        found.num_seen += 1
        try:
            clip = msgspec.convert(store[index], Clip)
        except RecordError as error:
            found.faulty.add(str(error))
            continue
        if len(found.examples) < NUM_SHOWN:
            found.examples.append(clip)
        found.resolutions["not said" if clip.resolution is None else str(clip.resolution)] += 1
        found.fps[float(clip.fps)] += 1
        found.num_frames[int(clip.num_frames)] += 1
        captions = clip.cap if isinstance(clip.cap, list) else [clip.cap]
        found.caption_words.update(len(caption.split()) for caption in captions)
        if not os.path.isfile(clip.path):
            found.missing.add(printable(clip.path))
        elif prober is not None:
            opening.append((clip, prober.submit(clip.path)))
            if len(opening) > _AHEAD:
                _compare(*opening.popleft(), prober, found, way)
    while opening:
        assert prober is not None
        _compare(*opening.popleft(), prober, found, way)
    return found


def _compare(clip: Clip, probing: Probing, prober: Prober, found: Inspection, way: Way) -> None:
    try:
        info = prober.result(probing)
    except DecodeError as error:
        found.unreadable.add(f"{printable(error.path)}: {error.reason}")
        return
    is_size = clip.resolution in (None, Size(*info.size(way)))
    end = clip.start_frame_idx + clip.num_frames
    if not is_size or abs(clip.fps - info.fps) > FPS_TOLERANCE or end > info.num_frames:
        found.contradicting.add(f"{printable(clip.path)}: the video is {info}; the record says otherwise")


def describe_store(store: LmdbStore, found: Inspection) -> str:
    """Lay out an inspection as text."""
    return "\n".join(_lines(store, found))


def _lines(store: LmdbStore, found: Inspection) -> Iterator[str]:
    for path in store.paths:
        yield f"store      {path}"
    yield f"records    {len(store):,}" + (
        f", looked at the first {found.num_seen:,}" if found.num_seen < len(store) else ""
    )
    for report in store.reports:
        yield f"filtered   {report['kept']:,} of {report['total']:,} clips were kept"
    for key, value in store.config.items():
        yield f"setting    {key}: {value}"
    if not store.config:
        yield "setting    none: written by the public code"
    yield from _histogram("resolution", found.resolutions.most_common(_NUM_BARS), found.resolutions.total())
    yield from _histogram("fps", found.fps.most_common(_NUM_BARS), found.fps.total())
    yield from _histogram("frames", _ranges(found.num_frames), found.num_frames.total())
    yield from _histogram("words", _ranges(found.caption_words), found.caption_words.total())
    for clip in found.examples:
        yield f"example    {printable(clip.path)}: {clip.cap}"
    kinds = (
        ("at fault", found.faulty),
        ("missing", found.missing),
        ("unreadable", found.unreadable),
        ("wrong", found.contradicting),
    )
    for name, faults in kinds:
        if faults.count or name == "missing":
            yield f"{name:10} {faults.count:,} clip{'s' * (faults.count != 1)}"
        yield from (f"{'':10} {video}" for video in faults.videos)
        if faults.num_listed is not None and faults.count > faults.num_listed:
            yield f"{'':10} ...; --open-videos lists all"


def _histogram(name: str, bars: list[tuple[Any, int]], total: int) -> Iterator[str]:
    for number, (value, count) in enumerate(bars):
        bar = "#" * round(_BAR_WIDTH * count / max(count for _, count in bars))
        yield f"{'' if number else name:10} {value!s:>12} {count:>10,}  {bar}"
    more = total - sum(count for _, count in bars)
    if more:
        yield f"{'':10} {'others':>12} {more:>10,}"


def _ranges(counts: collections.Counter[int]) -> list[tuple[str, int]]:
    """Sum counts of whole numbers over equal ranges."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = (high - low) // _NUM_BARS + 1
    sums: collections.Counter[int] = collections.Counter()
    for value, count in counts.items():
        sums[(value - low) // width] += count
    begins = [low + width * number for number in range((high - low) // width + 1)]
    ends = [min(begin + width - 1, high) for begin in begins]
    names = [f"{begin}" if begin == end else f"{begin}-{end}" for begin, end in zip(begins, ends)]
    return [(name, sums[number]) for number, name in enumerate(names)]


def plot_store(found: Inspection, directory: str | os.PathLike[str]) -> list[Path]:
    """Write bar charts of fps, frames, resolutions and caption lengths as PNG; see `report.check_plots`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    charts: dict[str, Mapping[Any, int]] = {
        "fps": found.fps,
        "num_frames": found.num_frames,
        "resolution": dict(found.resolutions.most_common(20)),
        "caption_words": found.caption_words,
    }
    written = []
    for name, counts in charts.items():
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        values, weights = list(counts), list(counts.values())
        if name == "resolution":
            axes.barh(values[::-1], weights[::-1])
            axes.set(xlabel="clips", ylabel=name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.hist(values, weights=weights, bins=_NUM_BINS if name == "fps" else _edges(values))
            axes.set(xlabel=name, ylabel="captions" if name == "caption_words" else "clips")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            if name != "fps":
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        path = Path(directory) / f"{name}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120)
        written.append(path)
    return written


def _edges(values: list[int]) -> list[float]:
    """Return bin edges between whole numbers, so that every bin spans equally many of them."""
    low, high = (min(values), max(values)) if values else (0, 0)
    width = (high - low) // _NUM_BINS + 1
    return [low - 0.5 + width * number for number in range((high - low) // width + 2)]
