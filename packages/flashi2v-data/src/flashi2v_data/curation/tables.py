"""Meta data as tables: CSV, TSV and Parquet, a row for each clip, in constant memory.

A row becomes an entry as a meta JSON has it. Columns may have the names that other projects give them, height and width
columns of their own, and an empty cell is left out.
"""

import contextlib
import csv
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgspec

from flashi2v_data.errors import InputError
from flashi2v_data.store.table import import_pyarrow

SUFFIXES = (".csv", ".tsv", ".parquet")
# What a column may be called beside the key's own name; the first that is there counts.
NAMES = {
    "path": ("path", "file_name", "video", "video_path", "file"),
    "cap": ("cap", "caption", "text", "prompt"),
}
# Keys whose cells in CSV are JSON: 24, [0, 49]. All other cells are text, but for numbers.
_NOT_TEXT = ("resolution", "fps", "num_frames", "motion", "cut", "crop")
_ROWS = 1024  # of a piece
_MAX_CELL = 1 << 20


class NoClipsError(InputError):
    """A table whose rows name no files."""


def is_table(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it is a table."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def read_rows(name: str, file: BinaryIO) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield some entries at a time, and how many bytes of the file have been read.

    Args:
        name: of the file, for messages; its suffix says what it is.
        file: open, at its beginning.

    Raises:
        InputError: the file is not such a table, or Parquet is not installed.
    """
    rows = _parquet_rows(name, file) if name.lower().endswith(".parquet") else _csv_rows(name, file)
    for batch, position in rows:
        yield [entry_of(row) for row in batch], position


def entry_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as an entry of a meta JSON: its keys under their own names, without what is empty."""
    entry = {key: value for key, value in row.items() if not _is_empty(value)}
    for key, names in NAMES.items():
        found = next((name for name in names if name in entry), None)
        if found is not None:
            entry[key] = entry.pop(found)
    if "resolution" not in entry and {"height", "width"} <= entry.keys():
        entry["resolution"] = {"height": entry.pop("height"), "width": entry.pop("width")}
    return entry


def _is_empty(value: Any) -> bool:
    # A column of whole numbers with a gap is one of floats with a NaN where pandas wrote it.
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _csv_rows(name: str, file: BinaryIO) -> Iterator[tuple[list[dict[str, Any]], int]]:
    lines = _lines(name, file)
    header = next(lines, "")
    # Spreadsheets write semicolons where the comma is part of numbers.
    semicolons = ";" in header and "," not in header
    delimiter = "\t" if name.lower().endswith(".tsv") else ";" if semicolons else ","
    csv.field_size_limit(_MAX_CELL)
    try:
        columns = next(csv.reader([header], delimiter=delimiter, strict=True), [])
        _check_columns(name, columns)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        batch: list[dict[str, Any]] = []
        for number, cells in enumerate(rows, 1):
            if cells and len(cells) != len(columns):
                raise InputError(f"{name}, row {number}: has {len(cells)} cells, the header has {len(columns)}")
            if cells:
                batch.append({column: _value(column, cell) for column, cell in zip(columns, cells)})
            if len(batch) == _ROWS:
                yield batch, file.tell()
                batch = []
    except csv.Error as error:
        raise InputError(f"{name}: is not valid CSV: {error}") from None
    if batch:
        yield batch, file.tell()


def _lines(name: str, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_MAX_CELL), b""), 1):
        if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise InputError(f"{name}: is UTF-16; save it as UTF-8")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{name}, line {number}: is not UTF-8; save it as UTF-8") from None


def _check_columns(name: str, columns: list[str]) -> None:
    names = NAMES["path"]
    if not set(names) & set(columns):
        raise NoClipsError(f"{name}: no column is called {', '.join(names[:-1])} or {names[-1]}")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise InputError(f"{name}: {len(twice)} columns are there twice: {', '.join(twice)}")


def _value(column: str, cell: str) -> Any:
    if column in NAMES["path"] or column in NAMES["cap"]:
        return cell
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        value = msgspec.json.decode(cell)
        if column in _NOT_TEXT or type(value) in (int, float):
            return value
    return cell


def _parquet_rows(name: str, file: BinaryIO) -> Iterator[tuple[list[dict[str, Any]], int]]:
    pyarrow = import_pyarrow()
    size = os.fstat(file.fileno()).st_size
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)
        _check_columns(name, table.schema_arrow.names)
        num_rows, num_read = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=_ROWS):
            num_read += batch.num_rows
            yield batch.to_pylist(), size * num_read // num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}: cannot be read as Parquet: {reason}") from None
