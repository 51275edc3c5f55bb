"""The videos that a run is to learn from, before anything is written."""

import itertools
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashi2v_data.curation.folder import read_folder
from flashi2v_data.curation.judge import read_entry
from flashi2v_data.curation.meta import read_entries
from flashi2v_data.curation.probing import Prober
from flashi2v_data.curation.tables import is_table
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import Annotation, Entry, read_annotations
from flashi2v_data.video.images import is_image
from flashi2v_data.video.probe import VideoInfo

# So many are opened, spread over the set: what they are like decides size and length.
_MAX_OPENED = 2000
_MAX_ENTRIES = 10_000_000


@dataclass(frozen=True)
class Clip:
    """A clip, and what its video says."""

    entry: Entry
    info: VideoInfo

    @property
    def num_frames(self) -> int:
        """Frames of the clip, as the filter will count them."""
        start, *end = self.entry.cut if isinstance(self.entry.cut, list) else [0]
        given = self.entry.num_frames
        return given if isinstance(given, int) else min([*end[:1], self.info.num_frames]) - start


@dataclass
class Videos:
    """What is known of the videos.

    Attributes:
        annotations: of meta JSON that exists already; empty where `entries` are to be written.
        entries: of a folder.
        total: clips with a caption.
        without_caption: paths.
        num_images: clips of one frame, which are not opened.
        clips: that were opened.
        unreadable: paths, and why.
        captions: of all clips, each once.
    """

    annotations: list[Annotation]
    entries: list[dict[str, Any]]
    total: int
    without_caption: list[str]
    num_images: int
    clips: list[Clip]
    unreadable: list[tuple[str, str]]
    captions: list[str]


def look(source: Path) -> Videos:
    """Read captions and open videos.

    Args:
        source: a folder, a meta JSON, a table, or an annotation file.

    Raises:
        InputError: there is no such thing, it holds no clips, or none can be read.
    """
    annotations: list[Annotation] = []
    entries: list[Any]
    without_caption: list[str] = []
    if source.is_dir():
        folder = read_folder(source)
        entries, without_caption = folder.entries, folder.without_caption
        if not entries:
            raise InputError(
                f"{source}: none of {len(without_caption)} videos has a caption: write one beside each, a.txt for a.mp4"
            )
    else:
        annotations = _annotations(source)
        entries = list(itertools.islice(itertools.chain(*map(read_entries, annotations)), _MAX_ENTRIES))
    read = [entry for entry in map(read_entry, entries) if isinstance(entry, Entry)]
    if not read:
        raise InputError(f"{source}: holds no clip with a path and a caption")
    captions = dict.fromkeys(c for entry in read for c in (entry.cap if isinstance(entry.cap, list) else [entry.cap]))
    moving = [entry for entry in read if not is_image(entry.path)]
    if not moving:
        raise InputError(f"{source}: holds images alone; a model of motion learns from videos")
    clips, unreadable = _open(moving[:: -(-len(moving) // _MAX_OPENED)])
    if not clips:
        path, reason = unreadable[0]
        raise InputError(f"{source}: none of {len(unreadable)} videos can be read; the first is {path}: {reason}")
    own = entries if not annotations else []
    num_images = len(read) - len(moving)
    return Videos(annotations, own, len(read), without_caption, num_images, clips, unreadable, [*captions])


def _annotations(source: Path) -> list[Annotation]:
    if source.suffix == ".txt":
        return read_annotations(source)
    if not source.is_file():
        raise InputError(f"--videos: no such folder or file: {source}")
    if not is_table(source) and source.suffix not in (".json", ".jsonl", ".gz", ".zst"):
        raise InputError(f"--videos {source}: expected a folder, a meta JSON, a table, or an annotation file (.txt)")
    # Paths go by the working directory, or else by the file's own.
    first = next(read_entries(Annotation("", str(source))), None)
    path = first.get("path") if isinstance(first, dict) else None
    if isinstance(path, str) and not os.path.exists(path) and os.path.exists(source.parent / path):
        return [Annotation(str(source.parent), str(source))]
    return [Annotation("", str(source))]


def _open(entries: list[Entry]) -> tuple[list[Clip], list[tuple[str, str]]]:
    clips, unreadable = [], []
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with closing(Prober(jobs)) as prober:
        probings = [prober.submit(entry.path) for entry in entries]
        for entry, probing in tqdm(zip(entries, probings), "open", len(entries), unit="video", disable=None):
            try:
                clips.append(Clip(entry, prober.result(probing)))
            except DecodeError as error:
                unreadable.append((entry.path, error.reason))
    return clips, unreadable
