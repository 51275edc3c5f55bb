"""What videos said about themselves, kept on disk, so that no video is opened for it twice."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.lmdb_files import FIRST_MAP_SIZE, storage, write
from flashi2v_data.probe import VideoInfo, probe

_ADVICE = "free some space and continue by --resume"


class Probed(NamedTuple):
    """What is known of a file of this size and time of change: `info`, or why it has none."""

    size: int
    mtime_ns: int
    info: VideoInfo | None
    fault: str


class ProbeCache:
    """An LMDB of probed files. Several processes may read it while one writes."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self._readonly = readonly
        if not readonly:
            check_directory(path, "probe_cache_path")
            path.mkdir(parents=True, exist_ok=True)
        try:
            self._environment = lmdb.open(str(path), map_size=FIRST_MAP_SIZE, readonly=readonly, sync=False)
            self._environment.reader_check()  # forget readers that were killed
        except lmdb.Error as error:
            raise InputError(f"{path}: is no probe cache, remove it: {error}") from None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Probed).decode

    def get(self, path: str, status: os.stat_result) -> Probed | None:
        """Return what is known of a file, unless it has changed."""
        try:
            with self._environment.begin() as transaction:
                value = transaction.get(_key(path))
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)  # the writer's size
            return self.get(path, status)
        if value is None:
            return None
        known = self._decode(value)
        return known if (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns) else None

    def put(self, path: str, probed: Probed) -> None:
        """Keep what was learned; it outlives a killed process from now on.

        Raises:
            StorageError: the disk is full.
        """
        value = self._encode(probed)
        write(self._environment, lambda transaction: transaction.put(_key(path), value), _ADVICE)

    def close(self) -> None:
        """Bring everything to the disk."""
        with storage(self._environment.path(), _ADVICE):
            if not self._readonly:
                self._environment.sync(True)
            self._environment.close()


def _key(path: str) -> bytes:
    # LMDB's keys end at 511 bytes, paths do not. What earlier versions learned of sizes and rates counts no more.
    return hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16, person=b"upright").digest()


class ProbeFile:
    """Probes files, those in a cache without opening them; sent to worker processes, which do all that may hang.

    Args:
        cache: where the cache lies, or None.
    """

    def __init__(self, cache: Path | None) -> None:
        self._path = cache
        self._cache: ProbeCache | None = None

    def __call__(self, path: str) -> tuple[Probed, bool]:
        """Return what is known of a file, and whether that is news to the cache.

        Raises:
            DecodeError: there is no such file.
        """
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error
        if self._cache is None and self._path is not None:
            self._cache = ProbeCache(self._path, readonly=True)
        known = self._cache.get(path, status) if self._cache is not None else None
        if known is not None:
            return known, False
        try:
            info, fault = probe(path), ""
        except DecodeError as error:
            info, fault = None, error.reason
        return Probed(status.st_size, status.st_mtime_ns, info, fault), True
