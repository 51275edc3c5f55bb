"""Annotation files, meta JSON, and the record of one clip."""

import json
import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

import ijson

from flashi2v_data.errors import InputError


class Resolution(TypedDict):
    """Size in pixels."""

    height: int
    width: int


class Record(TypedDict):
    """One clip, complete; further keys of its meta JSON entry are kept beside these."""

    path: str
    cap: str | list[str]
    resolution: Resolution
    fps: float
    num_frames: int
    start_frame_idx: int


class Annotation(NamedTuple):
    """One line of an annotation file: the root that the videos' paths are relative to, and a meta JSON."""

    root: str
    meta: str


def read_annotations(path: str | os.PathLike[str]) -> list[Annotation]:
    """Read lines of `root,meta.json`; blank lines and `#` comments are skipped.

    Raises:
        InputError: the file, or a meta JSON that it names, is missing; a line is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: annotation file cannot be read: {error}") from None
    annotations = []
    for number, line in enumerate(lines, start=1):
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        parts = [part.strip() for part in text.split(",")]
        if len(parts) != 2 or not parts[1]:
            raise InputError(f"{path}, line {number}: expected `root of videos,meta JSON`, got {text!r}")
        annotation = Annotation(*parts)
        if not os.path.isfile(annotation.meta):
            raise InputError(f"{path}, line {number}: no such meta JSON: {annotation.meta}")
        annotations.append(annotation)
    if not annotations:
        raise InputError(f"{path}: names no meta JSON; add a line `root of videos,meta JSON`")
    return annotations


def read_entries(annotation: Annotation) -> Iterator[Any]:
    """Yield the entries of a meta JSON, their paths joined to the root; memory use does not grow with the file.

    The file is one JSON array, or JSON lines. Entries are whatever the file holds: checking them is the filter's job.

    Raises:
        InputError: the file is not valid JSON.
    """
    with open(annotation.meta, "rb") as file:
        entries = _array(file, annotation.meta) if _starts_array(file) else _lines(file, annotation.meta)
        for entry in entries:
            if isinstance(entry, dict) and isinstance(entry.get("path"), str):
                entry["path"] = os.path.join(annotation.root, entry["path"])
            yield entry


def _starts_array(file: BinaryIO) -> bool:
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    begin = file.tell()
    for line in file:
        if line.strip():
            file.seek(begin)
            return line.lstrip().startswith(b"[")
    raise InputError(f"{file.name}: is empty; write a JSON array of entries")


def _array(file: BinaryIO, path: str) -> Iterator[Any]:
    number = 0
    try:
        for entry in ijson.items(file, "item"):
            number += 1
            yield _plain(entry)
    except (ijson.JSONError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not valid JSON after entry {number} (comments are not allowed): {reason}") from None


def _lines(file: BinaryIO, path: str) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"{path}, line {number}: not valid JSON: {error}") from None


def _plain(value: Any) -> Any:
    """Turn ijson's decimals into floats. (Its own `use_float` refuses integers beyond 64 bits.)"""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
