"""A folder of videos and images with their captions, as people keep it -> entries of a meta JSON.

The caption of `clip.mp4` stands in `clip.txt` or `clip.json` beside it, or in a table of the folder or of one above it:
`metadata.jsonl`, or any CSV, TSV or Parquet file. Names in a table go by its own folder.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashi2v_data.atomic import atomic_file
from flashi2v_data.curation.tables import NAMES, NoClipsError, entry_of, is_table, read_rows
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.records import printable
from flashi2v_data.textfile import open_regular, read_text
from flashi2v_data.video.images import FPS, IMAGES, is_image, size_of_image

logger = logging.getLogger(__name__)

VIDEOS = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".ogv", ".3gp", ".gif"),
)
_MAX_CAPTION_BYTES = 1 << 20
_MAX_TABLE_BYTES = 1 << 30


@dataclass
class Folder:
    """What a folder holds.

    Attributes:
        entries: of the clips that have a caption, in the order of their names.
        without_caption: paths of the others.
        unreadable: of images that have one, what is wrong with them. Videos are opened by the filter.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def read_folder(directory: str | os.PathLike[str]) -> Folder:
    """Look through a folder and those in it; names that begin with a dot are passed over.

    Paths of entries begin with the folder's, as it is given here. An image is a clip of one frame.

    Raises:
        InputError: it is no folder, or holds no video; a caption or a table cannot be read.
    """
    root = os.fspath(directory)
    if not os.path.isdir(root):
        raise InputError(f"{root}: {'is not a folder' if os.path.exists(root) else 'no such folder'}")
    media, tables = _walk(root)
    if not media:
        raise InputError(f"{root}: holds no video ({' '.join(VIDEOS)}) and no image")
    found = Folder()
    tabled = _read_tables(tables, media)
    num_twice = 0
    for path in media:
        entry = _beside(path)
        if path in tabled:
            num_twice += entry is not None and entry.get("cap") != tabled[path].get("cap")
            entry = {**tabled[path], **(entry or {})}
        if entry is None or not entry.get("cap"):
            found.without_caption.append(path)
            continue
        try:
            about = _about_image(path) if is_image(path) else {}
        except DecodeError as error:
            found.unreadable.append(str(error))
        else:
            found.entries.append({**entry, **about, "path": path})
    if num_twice:
        logger.warning("%d clips have one caption beside them, which counts, and another in a table", num_twice)
    return found


def _walk(root: str) -> tuple[list[str], list[str]]:
    media, tables = [], []
    for place, folders, names in os.walk(root, followlinks=True):
        # Links may lead round in a circle.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_back(place, name))
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            path = os.path.join(place, name)
            if name.startswith("."):
                continue
            if suffix in VIDEOS or suffix in IMAGES:
                media.append(path)
            elif is_table(name) or name == "metadata.jsonl":
                tables.append(path)
    return media, tables


def _leads_back(place: str, name: str) -> bool:
    path = os.path.join(place, name)
    return os.path.islink(path) and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(path))


def _about_image(path: str) -> dict[str, Any]:
    """Return what the filter reads of videos by itself, without decoding."""
    height, width = size_of_image(path)
    return {"resolution": {"height": height, "width": width}, "fps": FPS, "num_frames": 1}


def _beside(path: str) -> dict[str, Any] | None:
    """Return what stands in the files beside a clip: `clip.txt` and `clip.json`."""
    stem = os.path.splitext(path)[0]
    entry: dict[str, Any] | None = None
    if os.path.lexists(f"{stem}.json"):
        entry = _read_json(f"{stem}.json")
    if os.path.lexists(f"{stem}.txt"):
        text = " ".join(read_text(f"{stem}.txt", _MAX_CAPTION_BYTES).split())
        entry = {**(entry or {}), "cap": text}
    return entry


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path, _MAX_CAPTION_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if isinstance(values, str):
        return {"cap": values}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a caption or an object with the key cap, got {str(values)[:60]!r}")
    entry = entry_of(values)
    entry.pop("path", None)
    return entry


def _read_tables(tables: list[str], media: list[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of all tables by their clips' paths; a table in the clip's own folder counts before others."""
    places = {os.path.normpath(path): path for path in media}
    found: dict[str, dict[str, Any]] = {}
    for table in tables:  # those of inner folders come last
        missing: list[str] = []
        try:
            for entry in _rows(table):
                name = str(entry.pop("path", ""))
                path = places.get(os.path.normpath(os.path.join(os.path.dirname(table), name)))
                if path is None:
                    missing.append(name)
                else:
                    found[path] = entry
        except NoClipsError as error:
            if os.path.basename(table).startswith("metadata."):
                raise
            logger.warning("not read: %s", error)
        if missing:
            logger.warning(
                "%s: %d rows name no video or image of the folder, the first is %s",
                *(table, len(missing), printable(missing[0])),
            )
    return found


def _rows(table: str) -> Iterator[dict[str, Any]]:
    if is_table(table):
        with open(open_regular(table), "rb") as file:
            for rows, _ in read_rows(table, file):
                yield from rows
        return
    for number, line in enumerate(read_text(table, _MAX_TABLE_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{table}, line {number}: not valid JSON: {error}") from None
        if not isinstance(values, dict) or not set(NAMES["path"]) & values.keys():
            raise NoClipsError(f"{table}, line {number}: expected an object with the key file_name")
        yield entry_of(values)


def write_meta(path: str | os.PathLike[str], entries: Iterable[dict[str, Any]]) -> Path:
    """Write a meta JSON, an entry on a line, and beside it the annotation file that names it; return that.

    Raises:
        InputError: the name does not end in .json.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise InputError(f"{path}: a meta JSON ends in .json")
    annotation = path.with_suffix(".txt")
    with atomic_file(path) as temporary:
        with temporary.open("wb") as file:
            file.write(b"[")
            for number, entry in enumerate(entries):
                file.write((b",\n" if number else b"\n") + _line(entry))
            file.write(b"\n]\n")
        name = str(path).replace('"', '""')
        with atomic_file(annotation) as beside:
            beside.write_text(f'.,"{name}" # root of the videos, meta JSON\n', "utf-8", errors="surrogateescape")
    return annotation


def _line(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves of letters that no file can hold but as escapes
        return json.dumps(entry).encode("ascii")
