"""Files and directories that appear under their name only when whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix, that replaces `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A temporary directory gives the file the user's usual permissions, which mkstemp would narrow.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
        temporary = Path(directory) / path.name
        yield temporary
        os.replace(temporary, path)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that becomes `path` when the block succeeds.

    `path` must not exist or be an empty directory; otherwise the block fails at its end with OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = holder / path.name
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)
