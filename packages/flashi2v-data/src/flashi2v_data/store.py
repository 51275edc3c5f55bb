"""Records in LMDB: read from disk one by one, so that neither a large set nor many workers fill the memory."""

import bisect
import itertools
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from flashi2v_data.errors import InputError
from flashi2v_data.records import Record

SCHEMA = 1
_HEADER = b"header"
_FIRST_MAP_SIZE = 64 << 20
_BATCH = 1000


def write_store(path: str | os.PathLike[str], records: Iterable[Record], config: Mapping[str, Any]) -> Path:
    """Write records to an LMDB directory that appears under its name only when whole.

    Args:
        path: must not exist; "{count}" in it stands for the number of records, known only at the end.
        records: any iterable, read once.
        config: what the records were made with; kept in the header.

    Returns:
        The path written.

    Raises:
        InputError: something of that name is there already.
    """
    path = Path(path)
    if path.exists():
        raise InputError(f"{path} exists: remove it, or choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".store.", dir=path.parent) as holder:
        temporary = Path(holder) / "store.lmdb"
        count = _write(temporary, records, config)
        final = path.with_name(path.name.replace("{count}", str(count)))
        if final.exists():
            raise InputError(f"{final} exists: remove it, or choose another place")
        os.rename(temporary, final)
        return final


def is_storable(record: Mapping[str, Any]) -> bool:
    """Tell whether a record's values can be written."""
    try:
        msgpack.packb(record)
    except (OverflowError, TypeError, ValueError):
        return False
    return True


def _write(path: Path, records: Iterable[Record], config: Mapping[str, Any]) -> int:
    count = 0
    items = iter(records)
    # Without sync after every batch: nothing may be read before the rename, and a last sync precedes it.
    with lmdb.open(str(path), map_size=_FIRST_MAP_SIZE, sync=False) as environment:
        while batch := [msgpack.packb(record) for record in itertools.islice(items, _BATCH)]:
            _put(environment, [(_key(count + offset), value) for offset, value in enumerate(batch)])
            count += len(batch)
        header = {"schema": SCHEMA, "count": count, "config": dict(config)}
        _put(environment, [(_HEADER, msgpack.packb(header))])
        environment.sync(True)
    return count


def _key(index: int) -> bytes:
    return b"%012d" % index  # fixed width: LMDB orders keys as bytes


def _put(environment: lmdb.Environment, items: list[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            # The failed transaction left nothing behind.
            environment.set_mapsize(2 * environment.info()["map_size"])


# LMDB forbids opening a file twice in a process, and a forked child counts as having opened what its parent had.
_environments: "weakref.WeakValueDictionary[str, lmdb.Environment]" = weakref.WeakValueDictionary()
_owner = 0


def _environment(path: str) -> lmdb.Environment:
    global _owner
    if _owner != os.getpid():
        for inherited in list(_environments.values()):
            inherited.close()
        _environments.clear()
        _owner = os.getpid()
    path = os.path.realpath(path)
    environment = _environments.get(path)
    if environment is None:
        # Without locks read-only media work, and no reader slots are left behind by workers that die. Read-ahead
        # would only evict other pages: samples are read in random order.
        try:
            environment = lmdb.open(path, subdir=os.path.isdir(path), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise InputError(f"{path}: cannot be opened as LMDB: {str(error).removeprefix(f'{path}: ')}") from None
        _environments[path] = environment
    return environment


class LmdbStore:
    """The records of one LMDB, or of all in a folder in the order of their names, as one sequence.

    It opens files lazily in whichever process reads from it, so it may be sent or forked to workers.

    Attributes:
        paths: the LMDBs.
        config: what the first was made with (for a filtered store the filter's settings).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.paths = _parts(Path(path))
        self._open: tuple[int, list[lmdb.Environment]] | None = None
        headers = [_read_header(path, environment) for path, environment in zip(self.paths, self._environments())]
        self.config: dict[str, Any] = headers[0]["config"]
        for path, header in zip(self.paths, headers):
            # Where they lie may differ; the clips in them must be alike.
            if _limits(header) != _limits(headers[0]):
                raise InputError(f"{path} was filtered with other settings than {self.paths[0]}: filter them alike")
        self._ends = list(itertools.accumulate(header["count"] for header in headers))

    def __len__(self) -> int:
        """Return the number of records."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Return record number `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, index)
        begin = self._ends[part - 1] if part else 0
        with self._environments()[part].begin(buffers=True) as transaction:
            record: Record = msgpack.unpackb(transaction.get(_key(index - begin)))
        return record

    def __iter__(self) -> Iterator[Record]:
        """Yield all records in order."""
        for index in range(len(self)):
            yield self[index]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: they belong to this process."""
        return {**self.__dict__, "_open": None}

    def _environments(self) -> list[lmdb.Environment]:
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), [_environment(str(path)) for path in self.paths]
        return self._open[1]


def open_store(path: str | os.PathLike[str]) -> LmdbStore:
    """Open an LMDB of `flashi2v-data filter`, or a folder of them.

    Raises:
        InputError: there is none, or it is of another kind.
    """
    return LmdbStore(path)


def _parts(path: Path) -> list[Path]:
    if path.is_file() or (path / "data.mdb").is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: no such LMDB; write one with `flashi2v-data filter`")
    parts = sorted(path.glob("*.lmdb"))
    if not parts:
        raise InputError(f"{path}: neither an LMDB nor a folder that holds some (*.lmdb)")
    return parts


def _read_header(path: Path, environment: lmdb.Environment) -> dict[str, Any]:
    with environment.begin() as transaction:
        value = transaction.get(_HEADER)
    if value is None:
        raise InputError(f"{path}: an LMDB without the header of flashi2v-data; write it with `flashi2v-data filter`")
    header: dict[str, Any] = msgpack.unpackb(value)
    if header["schema"] != SCHEMA:
        raise InputError(f"{path}: has schema {header['schema']}, this version reads {SCHEMA}: update flashi2v-data")
    return header


def _limits(header: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header["config"].items() if not key.endswith("_path")}
