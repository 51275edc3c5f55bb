"""The record of one clip, and the annotation file that says where the meta JSON lies."""

import os
import re
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast

import msgspec
from msgspec import UNSET, UnsetType

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


# No honest number is larger, and products and quotients of these are finite.
_LARGEST = 10**12
Index = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
_Number = Annotated[int, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)] | Annotated[float, msgspec.Meta(ge=-1e12, le=1e12)]
_Positive = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)] | Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)]
_Path = Annotated[str, msgspec.Meta(min_length=1)]
_Captions = str | Annotated[list[str], msgspec.Meta(min_length=1)]


class Size(msgspec.Struct, gc=False):  # no cycle can come of these, and the collector need not look for one
    """`resolution` of a clip, in pixels."""

    height: _Positive
    width: _Positive

    def __str__(self) -> str:
        """Return it as 720x1280."""
        return f"{self.height:g}x{self.width:g}"


class Entry(msgspec.Struct, kw_only=True, gc=False):
    """What a meta JSON says of a clip. What it leaves out of size, rate and length is read from the video."""

    path: _Path
    cap: _Captions
    resolution: Size | UnsetType = UNSET
    fps: _Positive | UnsetType = UNSET
    num_frames: _Count | UnsetType = UNSET
    motion: _Number | UnsetType = UNSET
    cut: Annotated[list[Index], msgspec.Meta(min_length=1)] | UnsetType = UNSET
    crop: Annotated[list[Index], msgspec.Meta(min_length=4, max_length=4)] | UnsetType = UNSET
    # What signals fill in.
    object_motion: _Number | UnsetType = UNSET
    camera_motion: _Number | UnsetType = UNSET
    stillness: _Number | UnsetType = UNSET
    black_share: _Number | UnsetType = UNSET
    bar_share: _Number | UnsetType = UNSET
    num_loops: _Number | UnsetType = UNSET
    text_area: _Number | UnsetType = UNSET
    scene_cuts: list[Index] | UnsetType = UNSET
    is_duplicate: bool | UnsetType = UNSET
    duplicate_of: Index | UnsetType = UNSET


_OF_META = ("path", "cap", "resolution", "fps", "num_frames", "motion", "cut", "crop")
SIGNAL_COLUMNS = tuple(name for name in Entry.__struct_fields__ if name not in _OF_META)


class _PlainSize(Size, forbid_unknown_fields=True, gc=False):
    """A size, and nothing besides."""


class PlainEntry(Entry, kw_only=True, forbid_unknown_fields=True, gc=False):
    """An entry of these keys alone, which is stored as it is: it is read fastest."""

    resolution: _PlainSize | UnsetType = UNSET
    start_frame_idx: int = 0


class Clip(msgspec.Struct):
    """What training needs of a record: the schema of every record that is read, whoever wrote it."""

    path: _Path
    cap: _Captions
    fps: _Positive
    num_frames: Index
    start_frame_idx: Index
    resolution: Size | None = None  # stores of the public code may not say it
    crop: Annotated[list[int | None], msgspec.Meta(min_length=4, max_length=4)] | None = None


class _Needed(TypedDict):
    path: _Path
    cap: _Captions
    resolution: Annotated[dict[Literal["height", "width"], _Positive], msgspec.Meta(min_length=2, max_length=2)]
    fps: _Positive
    num_frames: Index
    start_frame_idx: Index


class PlainRecord(_Needed, total=False):
    """A clip of these keys alone, by the same schema: it is decoded and checked at once, which is quickest."""

    motion: _Number
    cut: list[Index]
    crop: Annotated[list[int | None], msgspec.Meta(min_length=4, max_length=4)] | None
    object_motion: _Number
    camera_motion: _Number
    stillness: _Number
    black_share: _Number
    bar_share: _Number
    num_loops: _Number
    text_area: _Number
    scene_cuts: list[Index]
    is_duplicate: bool
    duplicate_of: Index


def check_record(value: Any) -> Record:
    """Return a record as the schema has it: whole numbers that were written as 12.0 become 12.

    Raises:
        ValueError: it is not a clip; the message goes on behind "record 7".
    """
    try:
        msgspec.convert(value, Clip)
    except msgspec.ValidationError as error:
        fixed = with_whole_numbers(value)
        if fixed is value:
            raise ValueError(f"is not a clip that can be trained on: {error}") from None
        return check_record(fixed)
    return cast(Record, value)


def with_whole_numbers(record: Any) -> Any:
    """Return a record with 12.0 as 12 wherever whole numbers belong, or the same object where nothing changes."""
    changed: dict[str, Any] = {}
    for key in ("num_frames", "start_frame_idx", "cut", "crop", "scene_cuts", "duplicate_of"):
        given = record.get(key) if isinstance(record, dict) else None
        numbers = given if isinstance(given, list) else [given]
        if any(isinstance(number, float) and number.is_integer() for number in numbers):
            whole = [int(number) if isinstance(number, float) and number.is_integer() else number for number in numbers]
            changed[key] = whole if isinstance(given, list) else whole[0]
    return {**record, **changed} if changed else record


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
            what = "is not a regular file" if os.path.exists(annotation.meta) else "no such meta JSON"
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
