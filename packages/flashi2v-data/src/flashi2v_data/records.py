"""The record of one clip, and the annotation file that says where the meta JSON lies."""

import os
from pathlib import Path
from typing import NamedTuple, TypedDict

from flashi2v_data.errors import InputError


class Resolution(TypedDict):
    """Size in pixels."""

    height: int
    width: int


class Record(TypedDict):
    """One clip, complete; further keys of its meta JSON entry are kept beside these."""

    path: str  # as `os.fsdecode` gives it: a name that is not UTF-8 has lone surrogates for its odd bytes
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
        lines = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
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


def printable(path: str) -> str:
    """Return a path as any terminal or file can show it: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
