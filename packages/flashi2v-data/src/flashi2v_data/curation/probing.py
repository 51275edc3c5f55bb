"""Asking many videos what they say about themselves: in parallel, within a time, each once, and never again.

What was learned is kept in an LMDB, the probe cache, so that no later filter opens a video that has not changed.
"""

import errno
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from flashi2v_data.atomic import check_directory
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.store.environments import (
    FIRST_MAP_SIZE,
    check_file,
    is_begun,
    remove_unbegun,
    seal,
    storage,
    unseal,
    write,
)
from flashi2v_data.video.probe import VideoInfo, probe
from flashi2v_data.workers import Limits, Task, WorkerLost, WorkerPool

PROBE_TIMEOUT_SECONDS = 60.0
# Many clips of one long video usually stand together: so many videos are remembered without a look into the cache.
_REMEMBERED = 10_000
# What a disk or a network says of itself, not of a file: it is not kept, and the next filter tries again.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ENOENT)
_ADVICE = "free some space and continue with --resume"


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
            remove_unbegun(path)
        try:
            check_file(path)
        except InputError as error:
            raise InputError(f"{path}: is not a probe cache, or damaged: remove it: {error}") from None
        with storage(path, _ADVICE):
            self._environment = lmdb.open(str(path), map_size=FIRST_MAP_SIZE, readonly=readonly, sync=False)
            self._environment.reader_check()  # forget readers that were killed
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Probed).decode

    def get(self, path: str, status: os.stat_result) -> Probed | None:
        """Return what is known of a file, unless it has changed, or what is known is damaged."""
        try:
            with self._environment.begin() as transaction:
                value = transaction.get(_key(path))
        except lmdb.MapResizedError:
            self._environment.set_mapsize(0)  # the writer's size
            return self.get(path, status)
        if value is None:
            return None
        try:
            known = self._decode(unseal(_key(path), value))
        except ValueError:  # or written by an earlier version, which looked at videos in another way
            return None
        return known if (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns) else None

    def put(self, path: str, probed: Probed) -> None:
        """Keep what was learned; it outlives a killed process from now on.

        Raises:
            StorageError: the disk is full.
        """
        key = _key(path)
        value = seal(key, self._encode(probed))
        write(self._environment, lambda transaction: transaction.put(key, value), _ADVICE)

    def look_through(self) -> None:
        """Read all there is. Where pages are damaged this may end the process, which had better be another one.

        Raises:
            lmdb.Error: pages are damaged.
        """
        with self._environment.begin(buffers=True) as transaction:
            for _ in transaction.cursor():
                pass

    def close(self) -> None:
        """Bring everything to the disk."""
        with storage(self._environment.path(), _ADVICE):
            if not self._readonly:
                self._environment.sync(True)
            self._environment.close()


def damaged(path: Path | None, why: object) -> str:
    """Return what is said of a cache that cannot be read."""
    return f"{path}: is damaged: remove it, and videos are opened again ({why})"


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

    def __call__(self, path: str | None) -> tuple[Probed, bool] | None:
        """Return what is known of a file, and whether that is news to the cache; without a path look through the cache.

        Raises:
            DecodeError: there is no such file, or this machine fails rather than the file.
            InputError: the cache is damaged.
            OSError: this machine cannot open any file.
        """
        if self._cache is None and self._path is not None:
            self._cache = ProbeCache(self._path, readonly=True)
        if path is None:
            assert self._cache is not None
            try:
                self._cache.look_through()
            except lmdb.Error as error:
                raise InputError(damaged(self._path, error)) from None
            return None
        try:
            status = os.stat(path)
        except (OSError, ValueError) as error:
            raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error
        known = self._cache.get(path, status) if self._cache is not None else None
        if known is not None:
            return known, False
        try:
            info, fault = probe(path), ""
        except DecodeError as error:
            number = getattr(error.__cause__, "errno", None)
            if number in (errno.EMFILE, errno.ENFILE):
                raise OSError(number, os.strerror(number), path) from None
            if number in _PASSING:
                raise
            info, fault = None, error.reason
        return Probed(status.st_size, status.st_mtime_ns, info, fault), True


Probing = Task[str | None, tuple[Probed, bool] | None]


class Prober:
    """Reads what entries leave out from their videos.

    Args:
        jobs: worker processes, which start with the first video.
        timeout: seconds for one file; a file that takes longer, or crashes the decoder, cannot be read.
        cache: directory that keeps what was learned; a file is opened again only if its size or time of change differs.
        readonly: look into the cache, if there is one, without writing to it.
    """

    def __init__(
        self, jobs: int, timeout: float = PROBE_TIMEOUT_SECONDS, cache: Path | None = None, *, readonly: bool = False
    ) -> None:
        self._is_filled = cache is not None and is_begun(cache)
        if readonly and not self._is_filled:
            cache = None
        self._path = cache
        self._readonly = readonly
        self._is_open = False
        self._cache: ProbeCache | None = None
        self._pool = WorkerPool(ProbeFile(cache), jobs, Limits(timeout), on_result=self._keep)
        self._recent: OrderedDict[str, Probing] = OrderedDict()

    def submit(self, path: str) -> Probing:
        """Start to probe a video, or join a probing that was started lately.

        Raises:
            InputError: the cache is none, or damaged.
        """
        if not self._is_open:
            self._open()
        probing = self._recent.get(path)
        if probing is None:
            probing = self._recent[path] = self._pool.submit(path)
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        return probing

    def _open(self) -> None:
        """Open the cache, after a worker has looked through it: damaged pages may end whoever reads them."""
        self._is_open = True
        if self._path is None:
            return
        if self._is_filled:
            try:
                self._pool.result(self._pool.submit(None))
            except WorkerLost as lost:
                if not lost.is_late:
                    raise InputError(damaged(self._path, lost)) from None
        if not self._readonly:
            self._cache = ProbeCache(self._path)

    def result(self, probing: Probing) -> VideoInfo:
        """Wait for a video.

        Raises:
            DecodeError: it cannot be read.
        """
        path = probing.argument
        assert path is not None
        try:
            found = self._pool.result(probing)
        except WorkerLost as error:
            # Not kept: a disk that hung may answer next time.
            raise DecodeError(path, str(error)) from None
        assert found is not None
        probed, _ = found
        if probed.info is None:
            raise DecodeError(path, probed.fault)
        return probed.info

    def _keep(self, probing: Probing) -> None:
        if probing.argument is not None and probing.result is not None and self._cache is not None:
            probed, is_new = probing.result
            if is_new:
                self._cache.put(probing.argument, probed)

    def close(self) -> None:
        """End the workers and keep what they learned."""
        self._pool.close()
        if self._cache is not None:
            self._cache.close()
