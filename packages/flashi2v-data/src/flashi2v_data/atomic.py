"""Files and directories that appear under their name only when whole."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashi2v_data.errors import InputError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that replaces `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file within a temporary directory has the user's usual permissions, which mkstemp would narrow.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        temporary = Path(directory) / path.name
        yield temporary
        os.replace(temporary, path)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` when the block succeeds.

    `path` must not exist or be an empty directory; otherwise the end of the block raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        temporary = Path(directory) / path.name
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)


def check_directory(directory: Path, option: str) -> None:
    """Refuse a directory that could not be made or written to.

    Raises:
        InputError: naming `option`.
    """
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{option}: cannot write below {existing}")
