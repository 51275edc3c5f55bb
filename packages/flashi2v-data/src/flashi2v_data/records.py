"""The record of one clip, and the annotation file that says where the meta JSON lies."""

import os
import re
from typing import NamedTuple, TypedDict

from flashi2v_data.errors import InputError
from flashi2v_data.textfile import read_text


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


_MAX_BYTES = 16 << 20
_NAME = r'("(?:[^"]|"")*"|(?!")(?:(?!\s#)[^,])*)'
_LINE = re.compile(rf"{_NAME}\s*,\s*{_NAME}(?:\s+#.*)?")


def read_annotations(path: str | os.PathLike[str]) -> list[Annotation]:
    """Read lines of `root,meta.json`; blank lines and `#` comments are skipped.

    Names that hold a comma, ` #` or spaces at an end stand in double quotes, a quote within them twice, as in CSV.

    Raises:
        InputError: the file, or a meta JSON that it names, is missing; a line is malformed.
    """
    annotations = []
    text = read_text(path, _MAX_BYTES, errors="surrogateescape")
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or not match[2]:
            raise InputError(
                f"{path}, line {number}: expected `root of videos,meta JSON`, got {line[:200]!r}; a name that holds a "
                "comma or ` #` stands in double quotes"
            )
        annotation = Annotation(*(_unquoted(match[group]) for group in (1, 2)))
        if not os.path.isfile(annotation.meta):
            what = "is no regular file" if os.path.exists(annotation.meta) else "no such meta JSON"
            raise InputError(f"{path}, line {number}: {what}: {annotation.meta}")
        annotations.append(annotation)
    if not annotations:
        raise InputError(f"{path}: names no meta JSON; add a line `root of videos,meta JSON`")
    return annotations


def _unquoted(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') else name.strip()


def printable(path: str) -> str:
    """Return a path as any terminal or file can show it: control characters and what is not UTF-8 escaped."""
    return path if path.isprintable() else "".join(map(_shown, path))


def _shown(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode()
