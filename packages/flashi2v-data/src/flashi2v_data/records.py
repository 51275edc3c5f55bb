"""The record of one clip, and the annotation file that says where the meta JSON lies."""

import os
import re
from typing import Annotated, Any, NamedTuple, TypedDict, cast

import msgspec

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


# No honest number is larger, and products and quotients of these are finite; see `limits.is_number`.
Index = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
Positive = Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)]


class Size(msgspec.Struct):
    """`resolution` of a clip, in pixels."""

    height: Positive
    width: Positive

    def __str__(self) -> str:
        """Return it as 720x1280."""
        return f"{self.height:g}x{self.width:g}"


class Clip(msgspec.Struct):
    """What training needs of a record: the schema of every record that is read, whoever wrote it."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    cap: str | Annotated[list[str], msgspec.Meta(min_length=1)]
    fps: Positive
    num_frames: Index
    start_frame_idx: Index
    resolution: Size | None = None  # stores of the public code may not say it
    crop: Annotated[list[int | None], msgspec.Meta(min_length=4, max_length=4)] | None = None


def check_record(value: Any) -> Record:
    """Return a record as the schema has it: whole numbers that were written as 12.0 become 12.

    Raises:
        ValueError: it is no clip; the message goes on behind "record 7".
    """
    try:
        msgspec.convert(value, Clip)
    except msgspec.ValidationError as error:
        whole = _whole_numbers(value) if isinstance(value, dict) else {}
        if not whole:
            raise ValueError(f"is no clip that can be trained on: {error}") from None
        return check_record({**value, **whole})
    return cast(Record, value)


def _whole_numbers(record: dict[Any, Any]) -> dict[str, Any]:
    """Return what is to be changed."""
    changed: dict[str, Any] = {}
    for key in ("num_frames", "start_frame_idx", "crop"):
        given = record.get(key)
        numbers = given if isinstance(given, list) else [given]
        if any(isinstance(number, float) and number.is_integer() for number in numbers):
            whole = [int(number) if isinstance(number, float) and number.is_integer() else number for number in numbers]
            changed[key] = whole if isinstance(given, list) else whole[0]
    return changed


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
