"""Writing a store: batch by batch into a part, which becomes the store when it is whole."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.values import Compression

SCHEMA = 1
HEADER = b"header"
# Before all digits, as records are appended behind the last key.
_STATE = b"!state"
_FIRST_MAP_SIZE = 64 << 20
# What one transaction writes: enough to make its fixed cost small, little to lose by a kill.
_BATCH = 2048


# The key of a record: of fixed width, as LMDB orders keys by their bytes.
key_of: Callable[[int], bytes] = b"%012d".__mod__


class StoreWriter:
    """Writes values into a part; a part that was left behind by a killed process can be taken up again.

    Args:
        part: a directory that is made for it.
        purpose: what the values are made of and by; an unfinished part is continued only for the same.
        resume: continue the part that is there.

    Attributes:
        state: what `append` was given last before something reached the disk.
        count: records handed in.

    Raises:
        InputError: there is a part and `resume` is not set, or none for the same purpose; or another process writes it.
    """

    def __init__(self, part: Path, purpose: Mapping[str, Any] | None = None, *, resume: bool = False) -> None:
        self._part = part
        self._purpose = dict(purpose or {})
        self._waiting: list[bytes | memoryview] = []
        self.state: Any = None
        self.count = 0
        if part.exists() and not resume:
            raise InputError(f"{part} is what an unfinished run left: continue it by --resume, or remove it")
        part.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = _lock(part)
        # Without sync after every batch: nothing may be read before the rename, and a last sync precedes it. Never
        # with a writable map, through which a full disk would kill the process.
        self._environment = lmdb.open(str(part), map_size=_FIRST_MAP_SIZE, sync=False, lock=False)
        try:
            self._continue()
        except BaseException:
            self.close()
            raise

    def _continue(self) -> None:
        with self._environment.begin() as transaction:
            value = transaction.get(_STATE)
        if value is None:
            self.commit()  # so that even an empty part says what it is for
            return
        saved = msgspec.msgpack.decode(value)
        if saved["purpose"] != self._purpose:
            changed = [key for key, value in self._purpose.items() if saved["purpose"].get(key) != value]
            raise InputError(
                f"{self._part} was begun with another {' and '.join(changed)}: use the same, or remove it to begin anew"
            )
        self.state, self.count = saved["state"], saved["count"]

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, values: Sequence[bytes | memoryview], state: Callable[[], Any] = lambda: None) -> None:
        """Add values; `state` gives what to go on from if these are the last that reach the disk.

        Raises:
            StorageError: the disk is full.
        """
        self._waiting += values
        self.count += len(values)
        if len(self._waiting) >= _BATCH:
            self.state = state()
            self.commit()

    def commit(self) -> None:
        """Write what waits, and the state.

        Raises:
            StorageError: the disk is full.
        """
        keys = map(key_of, range(self.count - len(self._waiting), self.count))
        state = {"purpose": self._purpose, "state": self.state, "count": self.count}
        self._put([*zip(keys, self._waiting)], (_STATE, msgspec.msgpack.encode(state)))
        self._waiting.clear()

    def finish(self, final: Path, compression: Compression | None, config: Mapping[str, Any], **more: Any) -> None:
        """Write the header and give the store its name.

        Raises:
            InputError: something of that name is there already.
            StorageError: the disk is full.
        """
        if final.exists():
            raise InputError(f"{final} exists: remove it, or choose another place")
        self.commit()
        header = {"schema": SCHEMA, "count": self.count, "compression": compression, "config": dict(config), **more}
        self._put([(HEADER, msgspec.msgpack.encode(header))])
        with _storage(self._part):
            with self._environment.begin(write=True) as transaction:
                transaction.delete(_STATE)
            self._environment.sync(True)
            self.close()
            os.rename(self._part, final)

    def close(self) -> None:
        """Let go of the part, which stays; harmless when repeated."""
        self._environment.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the part."""
        self.close()
        shutil.rmtree(self._part)

    def _put(self, items: list[tuple[bytes, bytes | memoryview]], state: tuple[bytes, bytes] | None = None) -> None:
        while True:
            try:
                with _storage(self._part), self._environment.begin(write=True) as transaction:
                    if state is not None:
                        transaction.put(*state)
                    with transaction.cursor() as cursor:
                        cursor.putmulti(items, append=True)
                return
            except lmdb.MapFullError:
                # The failed transaction left nothing behind.
                self._environment.set_mapsize(2 * self._environment.info()["map_size"])


def _lock(part: Path) -> int:
    """Hold the part for this process; the system lets go when the process ends, however it ends."""
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{part} is being written by another process: wait for it, or end it") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # some network disks have no locks
            raise
    return descriptor


@contextmanager
def _storage(part: Path) -> Iterator[None]:
    """Turn what a disk refuses into one line."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except (lmdb.Error, OSError) as error:
        raise StorageError(f"{part}: cannot be written: {error}; free some space and continue by --resume") from None
