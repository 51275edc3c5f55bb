"""Locks on what only one process may write: the directory of a run, an unfinished store.

The lock is the system's own (POSIX record locks), on a small file that says who holds it. The system releases it the
moment that the process ends, however it ends; children do not inherit it; network disks that have locks share it.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashi2v_data.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A process may lock its own file twice, so what this one holds is kept here; a child does not hold its parent's.
_held: set[tuple[int, str]] = set()
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def hold(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold the lock file `path` for this process while the block runs.

    Where the disk has no locks, a file that another process left is taken for a lock.

    Args:
        path: of the lock file, which is made, and removed at the end; its directory exists.
        what: that is locked, for the message: "runs/first", say.

    Raises:
        InputError: another process holds it; the message names host, process and age.
        OSError: the file cannot be written.
    """
    name = (os.getpid(), os.path.realpath(path))
    if name in _held:
        raise InputError(f"{what} is in use by this process already")
    descriptor = _acquire(Path(path), what)
    _held.add(name)
    try:
        yield
    finally:
        # In a forked child neither the lock nor the file is its own.
        if os.getpid() == name[0]:
            _held.discard(name)
            Path(path).unlink(missing_ok=True)
            os.close(descriptor)


def holder(path: str | os.PathLike[str]) -> str | None:
    """Return who holds the lock file `path`, in words that may be empty; None where nobody does."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        # Where the disk has no locks, the file is one as long as it is there.
        return None if _lock(descriptor) else _described(os.pread(descriptor, 4096, 0))
    finally:
        os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_ours = _lock(descriptor)
            holder = os.pread(descriptor, 4096, 0)
            if is_ours is False:
                raise InputError(f"{what} is in use by another process{_described(holder)}: wait for it, or end it")
            if is_ours is None and holder:
                raise InputError(
                    f"{what} seems in use{_described(holder)}, and this disk has no locks: "
                    f"if that process has ended, remove {path}"
                )
            if _is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                own = {"host": socket.gethostname(), "process": os.getpid(), "since": int(time.time())}
                os.pwrite(descriptor, json.dumps(own).encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed the file while it was being opened here


def _lock(descriptor: int) -> bool | None:
    """Return whether the file could be locked; None where the disk has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _described(holder: bytes) -> str:
    """Say who wrote a lock file; nothing where it does not tell, as it may just be being written."""
    try:
        own: dict[str, Any] = json.loads(holder)
        minutes = max(0, int(time.time()) - int(own["since"])) // 60
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(own["since"]))
        age = f"{minutes // 60} h {minutes % 60} min"
        return f" (process {int(own['process'])} on {own['host']}, since {since}, {age} ago)"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return ""
