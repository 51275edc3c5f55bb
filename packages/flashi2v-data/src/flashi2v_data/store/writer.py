"""Writing a store: batch by batch into an unfinished one, which gets its name when it is whole."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from flashi2v_data.errors import InputError
from flashi2v_data.locking import hold
from flashi2v_data.store.codec import Compression
from flashi2v_data.store.environments import (
    CHECKSUM,
    FIRST_MAP_SIZE,
    check_file,
    check_purpose,
    remove_unbegun,
    seal,
    seal_all,
    storage,
    unseal_header,
    write,
)

SCHEMA = 1
HEADER = b"header"
# Before all digits, as records are appended behind the last key.
_STATE = b"!state"
# What one transaction writes: enough to make its fixed cost small, little to lose by a kill.
_BATCH = 2048
# Where little is kept, so many calls of `append` are worth one too: what they dropped need not be judged again.
_APPENDS = 64
_ADVICE = "free some space and continue with --resume"


# The key of a record: of fixed width, as LMDB orders keys by their bytes.
key_of: Callable[[int], bytes] = b"%012d".__mod__


class StoreWriter:
    """Writes values into an unfinished store; one that a killed process left behind can be continued.

    Args:
        unfinished: a directory that is made for it.
        purpose: what the values are made of and by; an unfinished store is continued only for the same.
        resume: continue the unfinished store that is there.

    Attributes:
        state: what `append` was given last of what has reached the disk.
        count: records handed in.

    Raises:
        InputError: there is one and `resume` is not set, or it is for another purpose; or another process writes it.
    """

    def __init__(self, unfinished: Path, purpose: Mapping[str, Any] | None = None, *, resume: bool = False) -> None:
        self._unfinished = unfinished
        self._purpose = dict(purpose or {})
        self._waiting: list[bytes] = []
        self._state_of: Callable[[], Any] = lambda: None
        self._num_appended = 0
        self.state: Any = None
        self.count = 0
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # an interrupt, too, must release the lock
            stack.enter_context(hold(unfinished.with_name(f".{unfinished.name}.lock"), str(unfinished)))
            if unfinished.exists() and not resume:
                raise InputError(f"{unfinished} was left by an unfinished run: continue it with --resume, or remove it")
            unfinished.mkdir(exist_ok=True)
            remove_unbegun(unfinished)
            check_file(unfinished)
            # Without sync after every batch: nothing may be read before the rename, and a last sync precedes it. Never
            # with a writable map, through which a full disk would kill the process.
            with storage(unfinished, _ADVICE):
                self._environment = lmdb.open(str(unfinished), map_size=FIRST_MAP_SIZE, sync=False, lock=False)
            stack.callback(self._environment.close)
            self._continue()
            self._held = stack.pop_all()

    def _continue(self) -> None:
        with self._environment.begin() as transaction:
            value = transaction.get(_STATE)
        if value is None:
            if self._environment.stat()["entries"]:
                raise InputError(f"{self._unfinished} is not what an unfinished run left: remove it")
            self._commit()  # so that even an empty store says what it is for
            return
        saved, is_sealed = unseal_header(self._unfinished, _STATE, value)
        if not is_sealed or not {"purpose", "state", "count"} <= saved.keys():
            raise InputError(f"{self._unfinished} was begun by another version: remove it")
        check_purpose(self._unfinished, saved["purpose"], self._purpose)
        self.state, self.count = saved["state"], saved["count"]
        self._state_of = lambda: saved["state"]

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, values: Sequence[bytes], state: Callable[[], Any] = lambda: None) -> None:
        """Add values; `state` gives what to go on from behind these. It is called when they are written.

        Raises:
            StorageError: the disk is full.
        """
        self._waiting += values
        self.count += len(values)
        self._state_of = state
        self._num_appended += 1
        if len(self._waiting) >= _BATCH or self._num_appended >= _APPENDS:
            self._commit()

    def finish(self, final: Path, compression: Compression | None, config: Mapping[str, Any], **more: Any) -> None:
        """Write what waits and the header, and give the store its name.

        A writer that is killed before the rename leaves a store that can be resumed, with nothing left to append.

        Raises:
            InputError: something of that name is there already.
            StorageError: the disk is full.
        """
        if final.exists():
            raise InputError(f"{final} exists: remove it, or choose another place")
        header = {"schema": SCHEMA, "count": self.count, "compression": compression, "config": dict(config), **more}
        header["checksum"] = CHECKSUM
        self._commit(msgspec.msgpack.encode(header))
        with storage(self._unfinished, _ADVICE):
            self._environment.sync(True)
            self._environment.close()
            # Before the rename, so that a kill leaves no lock beside a finished store. Whoever took it in between
            # would find it whole, and then the store there.
            self.close()
            os.rename(self._unfinished, final)

    def _commit(self, header: bytes | None = None) -> None:
        """Write what waits, from where to go on behind it, and the header, all or nothing."""
        self.state = self._state_of()
        first, num_values = self.count - len(self._waiting), len(self._waiting)
        state = msgspec.msgpack.encode({"purpose": self._purpose, "state": self.state, "count": self.count})

        def put(transaction: lmdb.Transaction) -> None:
            transaction.put(_STATE, seal(_STATE, state))
            with transaction.cursor() as cursor:
                keys = [*map(key_of, range(first, self.count))]
                written = cursor.putmulti(zip(keys, seal_all(keys, self._waiting)), append=True)
            assert written == (num_values, num_values), written
            if header is not None:
                transaction.put(HEADER, seal(HEADER, header))

        write(self._environment, put, _ADVICE)
        self._waiting.clear()
        self._num_appended = 0

    def close(self) -> None:
        """Release the unfinished store, which stays; harmless when repeated."""
        self._held.close()

    def discard(self) -> None:
        """Remove the unfinished store."""
        self._environment.close()
        shutil.rmtree(self._unfinished)
        self.close()
