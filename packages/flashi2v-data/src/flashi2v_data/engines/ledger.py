"""The ledger: what became of every piece, on the disk before it counts as done.

A ledger is a directory beside the output, with an LMDB for each shard of which one process is the only writer. Its
header says what the results are made of and by; results of anything else are not added to it.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_data.locking import hold
from flashi2v_data.store.environments import (
    FIRST_MAP_SIZE,
    check_file,
    check_purpose,
    open_shared,
    remove_unbegun,
    seal,
    seal_all,
    storage,
    unseal,
    unseal_header,
    write,
)
from flashi2v_data.store.writer import HEADER, key_of

SCHEMA = 1
_ADVICE = "free some space and run the same command again: what is done stays"
# A commit waits for the disk: pieces that come within so short a time share one.
_SECONDS = 0.1


@dataclass(frozen=True)
class Shard:
    """Which share of the pieces a process runs: those whose number, divided by `count`, leaves `index`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read 3/40: number 3 of 40, counted from 0.

        Raises:
            InputError: it is none.
        """
        first, slash, second = text.partition("/")
        if not (slash and first.isdecimal() and second.isdecimal() and len(text) < 20):
            raise InputError(f"--shard: expected INDEX/COUNT such as 3/40, got {text!r:.60}")
        shard = cls(int(first), int(second))
        if shard.index >= shard.count:
            raise InputError(f"--shard {text}: shards are counted from 0, the last is {shard.count - 1}/{shard.count}")
        return shard

    @property
    def file(self) -> str:
        """The name of its part of a ledger."""
        return f"shard_{self.index:05d}_of_{self.count:05d}.lmdb"


WHOLE = Shard(0, 1)


class Ledger:
    """The results of one shard; use it as a context manager.

    Args:
        directory: of the ledger, which is made, on a disk that all machines of the shards share.
        purpose: what the results are made of and by: input, settings, versions.
        shard: whose results they are.

    Raises:
        InputError: it was begun for another purpose, or with another number of shards, or another process writes it.
        StorageError: the disk refuses.
    """

    def __init__(self, directory: Path, purpose: Mapping[str, Any], shard: Shard = WHOLE) -> None:
        self.directory, self._shard = directory, shard
        self.path = directory / shard.file
        self._purpose = msgspec.msgpack.decode(msgspec.msgpack.encode(dict(purpose)))
        self._waiting: dict[int, bytes] = {}
        self._pack = msgspec.msgpack.Encoder().encode
        self._committed_at = time.monotonic()
        with storage(directory, _ADVICE):
            directory.mkdir(parents=True, exist_ok=True)
        _check_count(directory, shard)
        self._check_siblings(directory / "purpose.msgpack")
        with ExitStack() as stack:
            stack.enter_context(hold(directory / f".{shard.file}.lock", str(self.path)))
            with storage(self.path, _ADVICE):
                self.path.mkdir(exist_ok=True)
                remove_unbegun(self.path)
                check_file(self.path)
                self._environment = lmdb.open(str(self.path), map_size=FIRST_MAP_SIZE, lock=False)
            stack.callback(self._environment.close)
            self._begin()
            self._held = stack.pop_all()

    def _check_siblings(self, path: Path) -> None:
        """Hold the purpose against that of the shards that other processes write."""
        if not path.exists():
            with storage(path, _ADVICE), atomic_file(path) as file:
                file.write_bytes(msgspec.msgpack.encode(self._purpose))
        try:
            found = msgspec.msgpack.decode(path.read_bytes(), type=dict[str, Any])
        except msgspec.DecodeError:
            raise InputError(f"{path}: is no ledger's: remove {self.directory}") from None
        check_purpose(self.directory, found, self._purpose)

    def _begin(self) -> None:
        with self._environment.begin() as transaction:
            stored = transaction.get(HEADER)
        if stored is None:
            if self._environment.stat()["entries"]:
                raise InputError(f"{self.path}: is no ledger: remove it")
            self._commit(self._header(None))
            return
        check_purpose(self.path, _read_header(self.path, stored)["purpose"], self._purpose)

    def _header(self, num_pieces: int | None) -> bytes:
        header = {
            "schema": SCHEMA,
            "purpose": self._purpose,
            "shard": [self._shard.index, self._shard.count],
            "num_pieces": num_pieces,
        }
        return msgspec.msgpack.encode(header)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def lacks(self, number: int) -> bool:
        """Tell whether a piece is of this shard, and not done yet."""
        if number % self._shard.count != self._shard.index or number in self._waiting:
            return False
        with self._environment.begin(buffers=True) as transaction:
            return transaction.get(key_of(number)) is None

    @property
    def is_empty(self) -> bool:
        """Whether it holds no result."""
        return not self._waiting and self._environment.stat()["entries"] == 1  # the header

    def put_all(self, results: Iterable[tuple[int, Any]]) -> None:
        """Keep results of pieces; they are on the disk with the next ones, or when the ledger is finished or closed.

        Raises:
            StorageError: the disk is full.
        """
        self._waiting.update((number, self._pack(result)) for number, result in results)
        if time.monotonic() - self._committed_at > _SECONDS:
            self._commit()

    def finish(self, num_pieces: int) -> None:
        """Note that all is done, and how many pieces there are in all shards.

        Raises:
            StorageError: the disk is full.
        """
        self._commit(self._header(num_pieces))

    def _commit(self, header: bytes | None = None) -> None:
        keys = [*map(key_of, self._waiting)]
        values = [*seal_all(keys, [*self._waiting.values()])]

        def put(transaction: lmdb.Transaction) -> None:
            for key, value in zip(keys, values):
                transaction.put(key, value)
            if header is not None:
                transaction.put(HEADER, seal(HEADER, header))

        write(self._environment, put, _ADVICE)
        self._waiting.clear()
        self._committed_at = time.monotonic()

    def close(self) -> None:
        """Keep what waits, and release the ledger; harmless when repeated."""
        try:
            if self._waiting:
                self._commit()
        finally:
            self._waiting.clear()
            self._held.close()


class Shards:
    """The results of all shards of a ledger, in the order of their pieces.

    Raises:
        InputError: there is no ledger, or a shard of it is missing, unfinished, or made of or by something else.
    """

    def __init__(self, directory: Path) -> None:
        found = sorted(directory.glob("shard_*.lmdb"))
        if not found:
            raise InputError(f"{directory}: no such ledger")
        headers = [self._checked_header(path) for path in found]
        count = headers[0]["shard"][1]
        by_index = {header["shard"][0]: path for header, path in zip(headers, found) if header["shard"][1] == count}
        for index in range(count):
            if index not in by_index:
                raise InputError(f"{directory}: shard {index}/{count} is missing: run it")
        for header, path in zip(headers, found):
            if header["num_pieces"] is None:
                index, count = header["shard"]
                raise InputError(f"{path}: is not done: run {f'shard {index}/{count}' if count > 1 else 'it'} again")
            check_purpose(path, header["purpose"], headers[0]["purpose"])
        self.directory = directory
        self.purpose: dict[str, Any] = headers[0]["purpose"]
        self.num_pieces: int = headers[0]["num_pieces"]
        self._paths = [by_index[index] for index in range(count)]

    @staticmethod
    def _checked_header(path: Path) -> dict[str, Any]:
        with open_shared(path).begin() as transaction:
            return _read_header(path, transaction.get(HEADER))

    def __iter__(self) -> Iterator[Any]:
        """Yield the result of every piece.

        Raises:
            InputError: one is damaged.
        """
        decode = msgspec.msgpack.Decoder().decode
        with ExitStack() as stack:
            gets = [stack.enter_context(open_shared(path).begin()).get for path in self._paths]
            for number in range(self.num_pieces):
                key, which = key_of(number), number % len(gets)
                stored = gets[which](key)
                try:
                    yield decode(unseal(key, stored or b""))
                except ValueError as error:
                    raise InputError(f"{self._paths[which]}: piece {number} {error}") from None

    def remove(self) -> None:
        """Remove the ledger."""
        shutil.rmtree(self.directory)


def _check_count(directory: Path, shard: Shard) -> None:
    for path in directory.glob("shard_*_of_*.lmdb"):
        count = path.stem.rpartition("_")[2]
        if count.isdecimal() and int(count) != shard.count:
            raise InputError(
                f"{directory}: was begun with {int(count)} shards, not {shard.count}: go on so, or remove it"
            )


def _read_header(path: Path, stored: bytes | None) -> dict[str, Any]:
    header = {} if stored is None else unseal_header(path, HEADER, stored)[0]
    if header.get("schema") != SCHEMA or not {"purpose", "shard", "num_pieces"} <= header.keys():
        raise InputError(f"{path}: is no ledger, or one of another version: remove it")
    return header
