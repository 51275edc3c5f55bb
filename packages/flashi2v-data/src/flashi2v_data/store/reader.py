"""Records in LMDB: read from disk one by one, so that neither a large set nor many workers fill the memory.

A store of this package holds under the key `header` a msgpack map: `schema` (1), `count`, `compression` (null or
"zstd"), `config` (what it was made with), `checksum` ("xxh3_64") and, where a filter wrote it, `report`. Records have
keys of 12 digits, from 000000000000 on; each is a msgpack map, compressed by itself. `!state` says how the writing
went. Behind every value stand 8 bytes of checksum. Stores of the public code have such keys too, pickled values and no
header.
"""

import functools
import itertools
import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import lmdb
import msgspec
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from flashi2v_data.errors import InputError, RecordError
from flashi2v_data.records import Index, PlainRecord, Record, check_record
from flashi2v_data.store import environments
from flashi2v_data.store.codec import MAX_VALUE_BYTES, ValueCodec
from flashi2v_data.store.environments import (
    CHECKSUM_BYTES,
    DAMAGED,
    open_shared,
    unseal,
    unseal_header,
    warn_unsealed,
)
from flashi2v_data.store.legacy import load_value
from flashi2v_data.store.writer import HEADER, SCHEMA, StoreWriter, key_of


def write_store(path: str | os.PathLike[str], records: Iterable[Record], config: Mapping[str, Any]) -> Path:
    """Write records to an LMDB directory that appears under its name only when whole.

    Args:
        path: must not exist; "{count}" in it stands for the number of records, known only at the end.
        records: any iterable, read once.
        config: what the records were made with; kept in the header.

    Returns:
        The path written.

    Raises:
        InputError: something of that name is there already, or a record cannot be stored.
        StorageError: the disk is full.
    """
    path, codec = Path(path), ValueCodec()
    if path.exists():
        raise InputError(f"{path} exists: remove it, or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".store.", dir=path.parent) as holder:
        with StoreWriter(Path(holder) / "store") as writer:
            for number, record in enumerate(records):
                value = codec.pack(record)
                if value is None:
                    raise InputError(f"record {number} holds a value that cannot be stored: {record!r:.200}")
                writer.append([value])
            final = path.with_name(path.name.replace("{count}", str(writer.count)))
            writer.finish(final, None, config)
        return final


class LmdbStore:
    """The records of one LMDB, or of all in a folder in the order of their names, as one sequence.

    It opens files lazily in whichever process reads from it, so it may be sent or forked to workers.

    Attributes:
        paths: the LMDBs.
        config: what the first was made with (for a filtered store the filter's settings); empty for one of the public
            code.
        reports: what the filter counted, for each LMDB that says so.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.paths = _find_lmdbs(Path(path))
        self._open = _OpenStores(self.paths)
        headers, sealed = zip(*map(_read_header, self.paths, self._open.transactions))
        warn_unsealed(
            [path for path, is_sealed in zip(self.paths, sealed) if not is_sealed], "filter again to have them"
        )
        self.config: dict[str, Any] = headers[0]["config"]
        self.reports: list[dict[str, Any]] = [header["report"] for header in headers if "report" in header]
        for path, header in zip(self.paths, headers):
            # Where they lie may differ; the clips in them must be alike.
            if _limits(header) != _limits(headers[0]):
                raise InputError(f"{path} was filtered with other settings than {self.paths[0]}: filter them alike")
        self._begins = [*itertools.accumulate((header["count"] for header in headers), initial=0)]
        self._ends = self._begins[1:]
        self._reads = [_Reader(header, is_sealed).read for header, is_sealed in zip(headers, sealed)]

    def __len__(self) -> int:
        """Return the number of records."""
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return record number `index`, or the records of a slice, counted from the end where numbers are negative.

        Raises:
            IndexError: there is no such record.
            RecordError: it is damaged, a pickle that might run code, or no clip.
            InputError: the store has been removed.
        """
        try:
            which = bisect_right(self._ends, index)
        except TypeError:
            if not isinstance(index, slice):
                raise
            return [self[number] for number in range(*index.indices(len(self)))]
        if index < 0 or which == len(self._ends):  # type: ignore[operator]  # a slice would have raised
            raise IndexError(f"record {index} of {len(self)}")
        number = index - self._begins[which]
        try:
            return self._reads[which](self._open.gets[which], key_of(number))
        except InputError:
            raise
        except (ValueError, lmdb.Error) as error:
            if self._open.generation != environments.generation:
                self._open = _OpenStores(self.paths)  # what was open in the process that this one was forked from
                return self[index]
            raise RecordError(str(self.paths[which]), f"record {number} {error}") from None

    def __iter__(self) -> Iterator[Record]:
        """Yield all records in order."""
        for index in range(len(self)):
            yield self[index]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: they belong to this process."""
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files anew when they are needed."""
        self.__dict__.update(state)
        self._open = _OpenStores(self.paths)


class _OpenStores(threading.local):
    """What one thread of one process has open; LMDB's transactions must not be shared."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    @functools.cached_property
    def transactions(self) -> list[lmdb.Transaction]:
        """One for each LMDB. They stay open: beginning one costs a tenth of a read, and stores never change."""
        self.generation = environments.generation
        return [open_shared(path).begin() for path in self._paths]

    @functools.cached_property
    def gets(self) -> list[Callable[..., Any]]:
        """Of the transactions, what returns the value of a key."""
        return [transaction.get for transaction in self.transactions]


def open_store(path: str | os.PathLike[str]) -> LmdbStore:
    """Open an LMDB of `flashi2v-data filter` or of the public code, or a folder of them.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    return LmdbStore(path)


def _find_lmdbs(path: Path) -> list[Path]:
    if path.is_file() or (path / "data.mdb").is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: no such LMDB; write one with `flashi2v-data filter`")
    found = sorted(path.glob("*.lmdb"))
    if not found:
        raise InputError(f"{path}: neither an LMDB nor a folder that holds some (*.lmdb)")
    return found


_decode_plain: Callable[[bytes], Any] = msgspec.msgpack.Decoder(PlainRecord).decode
# How a msgpack map of up to 15 pairs begins, less their number. With fewer keys than pairs, decoding left some out.
_EMPTY_MAP = 0x80
_VALUE = slice(-CHECKSUM_BYTES)


class _Reader:
    """Makes records of the values of one LMDB."""

    def __init__(self, header: dict[str, Any], is_sealed: bool) -> None:
        self._is_sealed = is_sealed
        self._unpack = _legacy_record if header["schema"] is None else ValueCodec(header["compression"]).unpack
        # Decoded and checked at once, as long as there was none with further keys, or of an older form.
        self._are_plain = header["schema"] is not None and not header["compression"]

    def read(self, get: Callable[..., Any], key: bytes) -> Record:
        """Return the record of a key.

        Raises:
            ValueError: it is missing, damaged, a pickle that might run code, or no clip.
        """
        value = get(key)
        if value is None:
            raise ValueError(f"is missing: {DAMAGED}")
        if self._is_sealed:
            stored, value = value, value[_VALUE]
            # As `unseal` does, but for a call that would cost a twentieth of a read.
            if not stored.endswith(xxh3_64_digest(value, xxh3_64_intdigest(key))):
                unseal(key, stored)
        if self._are_plain and len(value) <= MAX_VALUE_BYTES:
            try:
                record = _decode_plain(value)
                if value[0] == _EMPTY_MAP + len(record) and len(record["resolution"]) == 2:
                    return record
                self._are_plain = False
            except (ValueError, RecursionError):
                self._are_plain = False
        return check_record(self._unpack(value))


def _read_header(path: Path, transaction: lmdb.Transaction) -> tuple[dict[str, Any], bool]:
    """Return the header of a store, and whether its values have checksums."""
    try:
        value: Any = transaction.get(HEADER)
        if value is None:
            count = _count_records(path, transaction)
            return {"schema": None, "count": count, "compression": None, "config": {}}, False
    except lmdb.Error as error:
        raise InputError(f"{path}: is damaged ({error}): {DAMAGED}") from None
    header, is_sealed = unseal_header(path, HEADER, value)
    if header.get("schema") != SCHEMA:
        given = f"{header.get('schema')!r:.60}"
        raise InputError(f"{path}: has schema {given}, this version reads {SCHEMA}: update flashi2v-data")
    try:
        msgspec.convert(header, _Header)
    except msgspec.ValidationError:  # features, for example
        raise InputError(f"{path}: is not a store of clips; `flashi2v-data filter` writes them") from None
    return header, is_sealed


class _Report(msgspec.Struct):
    kept: int
    total: int


class _Header(msgspec.Struct):
    """What is used of a header."""

    count: Index
    compression: Literal["zstd"] | None
    config: dict[str, Any]
    report: _Report | msgspec.UnsetType = msgspec.UNSET


def _count_records(path: Path, transaction: lmdb.Transaction) -> int:
    """Count the records of a public store, beside which other keys (a length, say) may stand."""
    with transaction.cursor() as cursor:
        # The last key that begins with a digit.
        found = cursor.prev() if cursor.set_range(b":") else cursor.last()
        key = bytes(cursor.key()) if found else b""
    if len(key) != 12 or not key.isdigit() or transaction.get(key_of(0)) is None:
        raise InputError(f"{path}: an LMDB without records; write one with `flashi2v-data filter`")
    return int(key) + 1


def _legacy_record(value: bytes) -> Any:
    """Read a record of the public code, which leaves out what it takes for granted."""
    record = load_value(value)
    if not isinstance(record, dict) or not isinstance(record.get("path"), str) or "num_frames" not in record:
        raise ValueError("is not a clip with path, cap and num_frames")
    record.setdefault("fps", 24.0)  # as the public filter assumes
    record.setdefault("start_frame_idx", 0)
    return record


def _limits(header: dict[str, Any]) -> dict[str, Any]:
    others = ("compression",)
    return {key: value for key, value in header["config"].items() if not key.endswith("_path") and key not in others}
