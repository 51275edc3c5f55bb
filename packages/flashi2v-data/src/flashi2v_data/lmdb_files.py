"""Opening and writing LMDB: one open file per process, maps that grow, and one line where a disk refuses."""

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from flashi2v_data.errors import InputError, StorageError

FIRST_MAP_SIZE = 64 << 20

# LMDB forbids opening a file twice in a process, and a forked child counts as having opened what its parent had.
_environments: "weakref.WeakValueDictionary[str, lmdb.Environment]" = weakref.WeakValueDictionary()

# Changes when this process is a fork: what its parent had open is then closed.
generation = 0


def _forget_inherited() -> None:
    global generation
    generation += 1
    for inherited in list(_environments.values()):
        inherited.close()
    _environments.clear()


os.register_at_fork(after_in_child=_forget_inherited)


def open_shared(path: str | os.PathLike[str]) -> lmdb.Environment:
    """Open an LMDB for reading, or return the one that this process has open.

    Raises:
        InputError: it is none, or was not copied to its end.
    """
    name = os.path.realpath(path)
    environment = _environments.get(name)
    if environment is None:
        # Without locks read-only media work, and no reader slots are left behind by workers that die. Read-ahead
        # would only evict other pages: samples are read in random order.
        try:
            environment = lmdb.open(name, subdir=os.path.isdir(name), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise InputError(f"{name}: cannot be opened as LMDB: {str(error).removeprefix(f'{name}: ')}") from None
        _check_size(name, environment)
        _environments[name] = environment
    return environment


def _check_size(path: str, environment: lmdb.Environment) -> None:
    """Refuse a file that was not copied to its end: reading beyond would kill the process."""
    file = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if os.path.getsize(file) < needed:
        environment.close()
        raise InputError(f"{file}: has {os.path.getsize(file)} bytes of {needed}: copy it again")


def write(environment: lmdb.Environment, put: Callable[[lmdb.Transaction], object], advice: str) -> None:
    """Run `put` in one transaction, again in a larger map where it did not fit: all of it is written, or nothing.

    Raises:
        StorageError: the disk refuses; its text ends in `advice`.
    """
    while True:
        try:
            with storage(environment.path(), advice), environment.begin(write=True) as transaction:
                put(transaction)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])


@contextmanager
def storage(path: str | Path, advice: str) -> Iterator[None]:
    """Turn what a disk refuses into one line.

    Raises:
        StorageError: the block raised an OSError, or an error of LMDB other than a full map.
    """
    try:
        yield
    except lmdb.MapFullError:
        raise
    except (lmdb.Error, OSError) as error:
        raise StorageError(f"{path}: cannot be written: {error}; {advice}") from None
