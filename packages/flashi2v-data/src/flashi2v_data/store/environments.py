"""Opening and writing LMDB: one open file per process, maps that grow, and one line where a disk refuses.

LMDB maps its file and believes it: reading beyond the end of one that was cut short kills the process. So a file is
looked at before it is mapped. LMDB has no checksums either; `seal` appends one to a value, which `unseal` verifies.
"""

import errno
import logging
import mmap
import operator
import os
import shutil
import struct
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import msgspec
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.textfile import open_regular

logger = logging.getLogger(__name__)

FIRST_MAP_SIZE = 64 << 20
CHECKSUM = "xxh3_64"
CHECKSUM_BYTES = 8

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
        InputError: it is not an LMDB, or was not copied to its end.
    """
    name = os.path.realpath(path)
    environment = _environments.get(name)
    if environment is None:
        check_file(name)
        # Without locks read-only media work, and no reader slots are left behind by workers that die. Read-ahead
        # would only evict other pages: samples are read in random order.
        try:
            environment = lmdb.open(name, subdir=os.path.isdir(name), readonly=True, lock=False, readahead=False)
        except lmdb.Error as error:
            raise InputError(f"{name}: cannot be opened as LMDB: {str(error).removeprefix(f'{name}: ')}") from None
        _environments[name] = environment
    return environment


# The first two pages of a file each begin with this: where they are (8 bytes), unused (2), flags, two bounds of free
# space; magic number, version, address, size of the map; for the free pages and for the values size of a page (of the
# first of these two) and flags, depth, three counts of pages, entries, root page; last page, number of the transaction.
_META = struct.Struct("=8x2xHHH IIQQ IHHQQQQQ IHHQQQQQ QQ")
_MAGIC, _IS_META, _NO_ROOT = 0xBEEFC0DE, 0x08, 2**64 - 1


_MAX_PAGE_SIZE = 1 << 15  # of LMDB, also where the system's pages are larger


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse an LMDB that must not be mapped, before it is; one that is not there, or still empty, passes.

    Raises:
        InputError: it is not a regular file, no LMDB, or shorter than it says of itself.
    """
    file = os.path.join(path, "data.mdb") if os.path.isdir(path) else os.fspath(path)
    if not os.path.lexists(file):
        return
    descriptor = open_regular(file)
    try:
        if os.fstat(descriptor).st_size:
            _check_pages(file, descriptor)
    finally:
        os.close(descriptor)


def is_begun(directory: Path) -> bool:
    """Return whether a directory holds an LMDB; one without its first two pages was cut short in the making."""
    file = directory / "data.mdb"
    return file.is_file() and file.stat().st_size >= 2 * min(mmap.PAGESIZE, _MAX_PAGE_SIZE)


def remove_unbegun(directory: Path) -> None:
    """Remove the file of an LMDB whose making was cut short."""
    file = directory / "data.mdb"
    if file.is_file() and not is_begun(directory):
        file.unlink()


def _check_pages(file: str, descriptor: int) -> None:
    first = _read_meta(file, descriptor, 0)
    page_size = first[7]
    if not 256 <= page_size <= 65536 or page_size & (page_size - 1):
        raise InputError(f"{file}: cannot be opened as LMDB: its first page is damaged")
    newest = max(first, _read_meta(file, descriptor, page_size), key=lambda meta: meta[-1])
    roots, last = (newest[14], newest[22]), newest[-2]
    needed = (last + 1) * page_size
    size = os.fstat(descriptor).st_size  # last, as another process may be adding to it
    if size < needed:
        raise InputError(f"{file}: has {size} bytes of {needed}: copy it again, or make it anew")
    if any(last < root < _NO_ROOT for root in roots):
        raise InputError(f"{file}: cannot be opened as LMDB: its first pages are damaged")


def _read_meta(file: str, descriptor: int, offset: int) -> tuple[int, ...]:
    page = os.pread(descriptor, _META.size, offset)
    if len(page) < _META.size:
        raise InputError(f"{file}: cannot be opened as LMDB: it is cut short: copy it again, or make it anew")
    meta = _META.unpack(page)
    if not meta[0] & _IS_META or meta[3] != _MAGIC:
        raise InputError(f"{file}: cannot be opened as LMDB: it is something else, or damaged")
    return meta


def seal(key: bytes, value: bytes) -> bytes:
    """Return what is stored of a value: with a checksum behind it, of the value and its key."""
    return next(seal_all([key], [value]))


def seal_all(keys: Sequence[bytes], values: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the same of many values, without a call for each."""
    return map(operator.add, values, map(xxh3_64_digest, values, map(xxh3_64_intdigest, keys)))


def unseal(key: bytes, stored: bytes) -> bytes:
    """Return the value that was sealed.

    Raises:
        ValueError: it is not as it was written.
    """
    value = stored[:-CHECKSUM_BYTES]
    if not stored.endswith(xxh3_64_digest(value, xxh3_64_intdigest(key))):
        raise ValueError(f"is damaged, its checksum differs: {DAMAGED}")
    return value


def unseal_header(path: str | os.PathLike[str], key: bytes, stored: bytes) -> tuple[dict[str, Any], bool]:
    """Return what the header of a store holds, and whether its values are sealed as it is.

    Raises:
        InputError: it is damaged.
    """
    try:
        value, is_sealed = unseal(key, stored), True
    except ValueError:
        value, is_sealed = stored, False
    try:
        header = msgspec.msgpack.decode(value, type=dict[str, Any])
    except (ValueError, RecursionError):
        header = {}
    if not is_sealed and ("schema" not in header or "checksum" in header):
        raise InputError(f"{path}: its header is damaged: {DAMAGED}")
    return header, is_sealed


def check_purpose(path: str | os.PathLike[str], found: Mapping[str, Any], purpose: Mapping[str, Any]) -> None:
    """Refuse to add to what was begun with something else.

    Raises:
        InputError: naming what differs.
    """
    changed = [key for key in {**found, **purpose} if found.get(key) != purpose.get(key)]
    if changed:
        raise InputError(f"{path} was begun with another {' and '.join(changed)}: use the same, or remove it")


DAMAGED = "copy the store again from where it is whole, or make it anew"
_warned_of: set[str] = set()


def warn_unsealed(paths: list[Path], advice: str) -> None:
    """Say, once in a process, which stores have no checksums."""
    if paths and (name := os.path.realpath(paths[0])) not in _warned_of:
        _warned_of.add(name)
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        logger.warning("%s%s: no checksums, so damage to a value may go unnoticed; %s", paths[0], more, advice)


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
        if getattr(error, "errno", None) == errno.ENOENT:
            raise StorageError(f"{path}: is gone, someone has removed it") from None
        raise StorageError(f"{path}: cannot be written: {_refusal(error, path)}; {advice}") from None


def _refusal(error: lmdb.Error | OSError, path: str | Path) -> str:
    """Say why a disk refuses. LMDB has the words of the system, or those for a failing disk where it is full."""
    from flashi2v_data.console import machine_fault  # what no process needs as long as all goes well

    if isinstance(error, OSError):
        return machine_fault(error)
    known = [code for code in errno.errorcode if os.strerror(code) in str(error)]
    if errno.EIO in known and _is_full(path):
        known = [errno.ENOSPC]
    return machine_fault(OSError(known[0], str(error))) if known else str(error)


def _is_full(path: str | Path) -> bool:
    try:
        return shutil.disk_usage(path).free < 1 << 20
    except OSError:
        return False
