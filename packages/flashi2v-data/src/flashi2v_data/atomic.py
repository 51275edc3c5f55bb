"""Files and directories that appear under their name only when whole.

What a killed process was writing stays behind, hidden beside the name. The next one that writes into the same directory
removes it: a temporary directory is locked as long as its process lives, so one that can be locked is nobody's.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashi2v_data.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing can be proved dead, and what is left behind stays
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that replaces `path` when the block succeeds."""
    path = Path(path)
    # A file within a temporary directory has the user's usual permissions, which mkstemp would narrow.
    with _directory_beside(path) as directory:
        temporary = directory / path.name
        yield temporary
        os.replace(temporary, path)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` when the block succeeds.

    `path` must not exist or be an empty directory; otherwise the end of the block raises OSError.
    """
    path = Path(path)
    with _directory_beside(path) as directory:
        temporary = directory / path.name
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)


@contextmanager
def _directory_beside(path: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `path`, locked and then removed by this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    while True:
        directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_SUFFIX, dir=path.parent))
        try:
            lock = _lock(directory)
        except OSError:
            directory.rmdir()
            raise
        if lock is not None:
            break
        # Between those two calls another process took it for a leftover: it removes it.
    try:
        yield directory
    finally:
        try:
            directory.rmdir()  # empty, where the block succeeded
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Remove the temporary directories in `parent` that no living process has locked, whatever was written in them."""
    if fcntl is None:
        return
    for name in os.listdir(parent):
        directory = parent / name
        if name.startswith(".") and name.endswith(_SUFFIX) and directory.is_dir() and not directory.is_symlink():
            lock = _lock(directory)
            if lock is not None and lock >= 0:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(lock)


def _lock(directory: Path) -> int | None:
    """Return a descriptor that holds a directory, None where another process does, -1 where the disk has no locks."""
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None if isinstance(error, BlockingIOError) else -1
    with contextlib.suppress(OSError):
        if os.stat(directory).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    os.close(descriptor)  # it was removed in the meantime
    return None


def check_directory(directory: Path, option: str) -> None:
    """Refuse a directory that could not be made or written to.

    Raises:
        InputError: naming `option`.
    """
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option}: cannot write below {existing}")
