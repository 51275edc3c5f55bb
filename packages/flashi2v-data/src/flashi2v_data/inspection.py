"""What a store holds, in words and pictures."""

import collections
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.probe import probe
from flashi2v_data.records import Record
from flashi2v_data.store import LmdbStore

NUM_SHOWN = 3


@dataclass
class Inspection:
    """Counts of the values that occur, and the videos that are missing or cannot be opened."""

    num_seen: int = 0
    examples: list[Record] = field(default_factory=list)
    resolutions: collections.Counter[str] = field(default_factory=collections.Counter)
    fps: collections.Counter[float] = field(default_factory=collections.Counter)
    num_frames: collections.Counter[int] = field(default_factory=collections.Counter)
    caption_words: collections.Counter[int] = field(default_factory=collections.Counter)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def inspect_store(store: LmdbStore, *, limit: int | None = None, open_videos: bool = False) -> Inspection:
    """Look at the first `limit` records (default: all); `open_videos` reads every video's header too."""
    found = Inspection()
    num_records = len(store) if limit is None else min(limit, len(store))
    for index in tqdm(range(num_records), desc="inspect", unit="clip", disable=None):
        record = store[index]
        found.num_seen += 1
        if index < NUM_SHOWN:
            found.examples.append(record)
        found.resolutions["{height}x{width}".format(**record["resolution"])] += 1
        found.fps[float(record["fps"])] += 1
        found.num_frames[record["num_frames"]] += 1
        captions = record["cap"] if isinstance(record["cap"], list) else [record["cap"]]
        found.caption_words.update(len(caption.split()) for caption in captions)
        if not os.path.isfile(record["path"]):
            found.missing.append(record["path"])
        elif open_videos:
            try:
                probe(record["path"])
            except DecodeError as error:
                found.unreadable.append(str(error))
    return found


def describe_store(store: LmdbStore, found: Inspection) -> str:
    """Lay out an inspection as text."""
    return "\n".join(_lines(store, found))


def _lines(store: LmdbStore, found: Inspection) -> Iterator[str]:
    for path in store.paths:
        yield f"store      {path}"
    yield f"records    {len(store):,}" + (
        f", looked at the first {found.num_seen:,}" if found.num_seen < len(store) else ""
    )
    for key, value in store.config.items():
        yield f"setting    {key}: {value}"
    for name, counter in (("resolution", found.resolutions), ("fps", found.fps)):
        common = ", ".join(f"{value} ({count:,})" for value, count in counter.most_common(5))
        more = len(counter) - 5
        yield f"{name:10} {common}" + (f" and {more} more" if more > 0 else "")
    for name, numbers in (("frames", found.num_frames), ("words", found.caption_words)):
        if numbers:
            yield f"{name:10} {min(numbers)} to {max(numbers)}"
    for record in found.examples:
        yield f"example    {record['path']}: {record['cap']}"
    for name, videos in (("missing", found.missing), ("unreadable", found.unreadable)):
        if videos or name == "missing":
            yield f"{name:10} {len(videos):,} videos"
        yield from (f"{'':10} {video}" for video in videos[:NUM_SHOWN])


def plot_store(found: Inspection, directory: str | os.PathLike[str]) -> list[Path]:
    """Write bar charts of fps, frames, resolutions and caption lengths as PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'flashi2v-data[plots]'") from None
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
