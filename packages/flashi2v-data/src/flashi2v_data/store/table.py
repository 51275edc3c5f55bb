"""A store as a table, for pandas, DuckDB and whatever else reads Parquet; the filter reads it again as meta data."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_data.records import Record
from flashi2v_data.store.reader import LmdbStore

_ROWS = 8192  # of a row group


def export_parquet(store: LmdbStore, path: str | os.PathLike[str]) -> None:
    """Write all records to a Parquet file, a column for each key; the file appears only when whole.

    A key whose values are of several types becomes a column of JSON texts, and captions one of lists where any clip has
    several. The store is read twice: columns have one type from the first row on.

    Raises:
        InputError: the name does not end in .parquet, a path is not UTF-8, or pyarrow is not installed.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise InputError(f"{path}: a Parquet file ends in .parquet")
    pyarrow = import_pyarrow()
    schema = pyarrow.schema(_columns(pyarrow, store).items())
    with atomic_file(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for records in _batches(store, "write"):
            columns = [_column(pyarrow, records, field.name, field.type) for field in schema]
            writer.write_table(pyarrow.table(columns, schema=schema))


def import_pyarrow() -> Any:
    """Import what reads and writes Parquet.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install 'flashi2v-data[parquet]'") from None
    return pyarrow


def _batches(store: LmdbStore, name: str) -> Iterator[list[Record]]:
    records = iter(tqdm(store, name, len(store), unit="clip", disable=None))
    while batch := list(itertools.islice(records, _ROWS)):
        for record in batch:
            if not record["path"].isascii() and not _is_utf8(record["path"]):
                raise InputError(f"{record['path']!r:.200} is not UTF-8, which a table cannot hold: rename the file")
        yield batch


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _columns(pyarrow: Any, store: LmdbStore) -> dict[str, Any]:
    """Return the type of every key, or that of texts where values have no type in common."""
    types: dict[str, Any] = {}
    several = False
    for records in _batches(store, "read"):
        several |= any(isinstance(record["cap"], list) for record in records)
        for key in dict.fromkeys(key for record in records for key in record if key != "cap"):
            found = _type(pyarrow, [record.get(key) for record in records])
            types[key] = _common(pyarrow, types[key], found) if key in types else found
    return types | {"cap": pyarrow.list_(pyarrow.string()) if several else pyarrow.string()}


def _type(pyarrow: Any, values: list[Any]) -> Any:
    try:
        kind = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.string()
    return pyarrow.string() if kind == pyarrow.struct([]) else kind  # which Parquet does not have


def _common(pyarrow: Any, one: Any, other: Any) -> Any:
    try:
        schemas = [pyarrow.schema([("", kind)]) for kind in (one, other)]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pyarrow.ArrowException:
        return pyarrow.string()


def _column(pyarrow: Any, records: list[Record], key: str, kind: Any) -> Any:
    values: list[Any] = [record.get(key) for record in records]
    if key == "cap" and pyarrow.types.is_list(kind):
        values = [value if isinstance(value, list) else [value] for value in values]
    elif pyarrow.types.is_string(kind):
        values = [_text(value) for value in values]
    return pyarrow.array(values, kind)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()
