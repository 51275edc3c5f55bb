"""Checksums of a checkpoint's files: made while they are written, compared while they are read.

`checksums.json` names every file of the directory with its size and the xxh3_64 of its blocks of 4 MiB. What reads a
few tensors of a file therefore reads and verifies no more than the blocks that they touch.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, TypedDict

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

from flashi2v_model.errors import DamagedError

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22


class FileSums(TypedDict):
    """Of one file: its size, and the checksum of each block in turn, in hexadecimal."""

    bytes: int
    blocks: list[str]


def sums_of(content: bytes) -> FileSums:
    """Return the checksums of a file that holds these bytes."""
    blocks = [content[begin : begin + _BLOCK] for begin in range(0, len(content), _BLOCK)]
    return {"bytes": len(content), "blocks": [xxhash.xxh3_64_hexdigest(block) for block in blocks]}


def describe(sums: Mapping[str, FileSums]) -> str:
    """Return the contents of `checksums.json`, by file name."""
    return json.dumps({"hash": "xxh3_64", "block_bytes": _BLOCK, "files": sums}) + "\n"


class _HashingFile(io.BufferedWriter):
    """A file that is written from its beginning to its end, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._size, self._hash = 0, xxhash.xxh3_64()
        self._blocks: list[str] = []

    def write(self, data: Any) -> int:
        """Write bytes behind those before."""
        rest = memoryview(data).cast("B")
        while rest:
            part = rest[: _BLOCK - self._size % _BLOCK]
            self._hash.update(part)
            self._size += len(part)
            rest = rest[len(part) :]
            if self._size % _BLOCK == 0:
                self._blocks.append(self._hash.hexdigest())
                self._hash.reset()
        return super().write(data)

    def sums(self) -> FileSums:
        """Return the checksums of all that was written."""
        rest = [self._hash.hexdigest()] if self._size % _BLOCK else []
        return {"bytes": self._size, "blocks": self._blocks + rest}


class HashingFiles(FileSystem):
    """Files as DCP writes them.

    Attributes:
        sums: of those that are written, by name.
    """

    def __init__(self) -> None:
        self.sums: dict[str, FileSums] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file for writing."""
        assert mode == "wb", mode
        with _HashingFile(Path(path)) as file:
            yield file
        self.sums[Path(path).name] = file.sums()

    def rename(self, path: Any, new_path: Any) -> None:
        """Give a file its final name."""
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class VerifiedFiles(FileSystem):
    """Files of a checkpoint as DCP reads them; what does not have its checksum is not read.

    A checkpoint without checksums, of an earlier version, is read as it is.

    Args:
        directory: the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sums: dict[str, FileSums] | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file for reading.

        Raises:
            DamagedError: the file or `checksums.json` is damaged; so does reading.
        """
        assert mode == "rb", mode
        file = Path(path)
        if self._sums is None:
            self._sums = read_sums(self._directory)
        if not self._sums:
            with file.open("rb") as plain:
                yield plain
            return
        if file.name not in self._sums:
            raise DamagedError(f"{self._directory / CHECKSUMS} is damaged: it says nothing of {file.name}")
        with io.BufferedReader(_VerifiedFile(file, self._sums[file.name]), 1 << 20) as verified:
            yield verified

    def read(self, path: Path) -> bytes:
        """Return all bytes of a file.

        Raises:
            DamagedError: as `create_stream`.
        """
        with self.create_stream(path, "rb") as stream:
            content: bytes = stream.read()
        return content


class _VerifiedFile(io.RawIOBase):
    def __init__(self, path: Path, sums: FileSums) -> None:
        super().__init__()
        self._path, self._sums = path, sums
        self._file: IO[bytes] = path.open("rb", buffering=0)
        self._position, self._number, self._block = 0, -1, b""
        size = self._file.seek(0, io.SEEK_END)
        if size != sums["bytes"]:
            self._file.close()
            raise DamagedError(f"{path} is damaged: it has {size} bytes, {sums['bytes']} were written")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._sums["bytes"]}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, begin = divmod(self._position, _BLOCK)
        if number >= len(self._sums["blocks"]):
            return 0
        if number != self._number:
            self._load(number)
        part = self._block[begin : begin + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _load(self, number: int) -> None:
        self._file.seek(number * _BLOCK)
        block = self._file.read(_BLOCK)
        if xxhash.xxh3_64_hexdigest(block) != self._sums["blocks"][number]:
            raise DamagedError(
                f"{self._path} is damaged: its bytes from {number * _BLOCK} on do not have the checksum that they were "
                "written with"
            )
        self._number, self._block = number, block

    def close(self) -> None:
        self._file.close()
        super().close()


def read_sums(directory: Path) -> dict[str, FileSums]:
    """Return a checkpoint's checksums by file name; none where there is no `checksums.json`.

    Raises:
        DamagedError: that file is damaged, or of a later version.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        contents = json.loads(path.read_bytes())
        files: dict[str, FileSums] = contents["files"]
        fits = all(len(one["blocks"]) == -(-one["bytes"] // _BLOCK) for one in files.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: it is no table of checksums") from error
    if not fits or not files or (contents.get("hash"), contents.get("block_bytes")) != ("xxh3_64", _BLOCK):
        raise DamagedError(f"{path} is damaged, or of a later version")
    return files


@cache
def warn_unverified(directory: Path) -> None:
    """Say once of a checkpoint without checksums that it has none."""
    if not (directory / CHECKSUMS).is_file():
        logger.warning("%s has no checksums, as older checkpoints: damage would go unnoticed", directory)
