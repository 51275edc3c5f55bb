"""What a store holds, in words and pictures."""

import collections
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import DecodeError
from flashi2v_data.frames import FPS_TOLERANCE
from flashi2v_data.prober import Prober, Probing
from flashi2v_data.records import Record, printable
from flashi2v_data.store import LmdbStore

NUM_SHOWN = 3
# Bars of a histogram in the text.
_NUM_BARS = 8
_BAR_WIDTH = 40
# Videos that are being opened at a time.
_AHEAD = 256


@dataclass
class Faults:
    """How many videos have a fault, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one."""
        self.count += 1
        if len(self.examples) < NUM_SHOWN:
            self.examples.append(example)


@dataclass
class Inspection:
    """Counts of the values that occur, and the videos that are missing or cannot be opened."""

    num_seen: int = 0
    examples: list[Record] = field(default_factory=list)
    resolutions: collections.Counter[str] = field(default_factory=collections.Counter)
    fps: collections.Counter[float] = field(default_factory=collections.Counter)
    num_frames: collections.Counter[int] = field(default_factory=collections.Counter)
    caption_words: collections.Counter[int] = field(default_factory=collections.Counter)
    missing: Faults = field(default_factory=Faults)
    unreadable: Faults = field(default_factory=Faults)
    contradicting: Faults = field(default_factory=Faults)


def inspect_store(store: LmdbStore, *, limit: int | None = None, prober: Prober | None = None) -> Inspection:
    """Look at the first `limit` records (default: all); a prober opens every video and compares it with its record."""
    found = Inspection()
    opening: collections.deque[tuple[Record, Probing]] = collections.deque()
    num_records = len(store) if limit is None else min(limit, len(store))
    for index in tqdm(range(num_records), desc="inspect", unit="clip", disable=None):
        record = store[index]
        found.num_seen += 1
        if index < NUM_SHOWN:
            found.examples.append(record)
        resolution = record.get("resolution")
        found.resolutions["{height}x{width}".format(**resolution) if resolution else "not said"] += 1
        found.fps[float(record["fps"])] += 1
        found.num_frames[record["num_frames"]] += 1
        captions = record["cap"] if isinstance(record["cap"], list) else [record["cap"]]
        found.caption_words.update(len(caption.split()) for caption in captions)
        if not os.path.isfile(record["path"]):
            found.missing.add(printable(record["path"]))
        elif prober is not None:
            opening.append((record, prober.submit(record["path"])))
            if len(opening) > _AHEAD:
                _compare(*opening.popleft(), prober, found)
    while opening:
        assert prober is not None
        _compare(*opening.popleft(), prober, found)
    return found


def _compare(record: Record, probing: Probing, prober: Prober, found: Inspection) -> None:
    try:
        info = prober.result(probing)
    except DecodeError as error:
        found.unreadable.add(f"{printable(error.path)}: {error.reason}")
        return
    end = record["start_frame_idx"] + record["num_frames"]
    size = {"height": info.height, "width": info.width}
    if record.get("resolution", size) != size or abs(record["fps"] - info.fps) > FPS_TOLERANCE or end > info.num_frames:
        found.contradicting.add(f"{printable(record['path'])}: the video is {info}; the record says otherwise")


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
    for record in found.examples:
        yield f"example    {printable(record['path'])}: {record['cap']}"
    faults = (("missing", found.missing), ("unreadable", found.unreadable), ("wrong", found.contradicting))
    for name, videos in faults:
        if videos.count or name == "missing":
            yield f"{name:10} {videos.count:,} videos"
        yield from (f"{'':10} {video}" for video in videos.examples)


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
        else:
            axes.hist(values, weights=weights, bins=40)
            axes.set(xlabel=name, ylabel="captions" if name == "caption_words" else "clips")
        path = Path(directory) / f"{name}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120)
        written.append(path)
    return written
