"""By what weights are known again, wherever they lie."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from flashi2v_model.speed.calibration import FILE as CALIBRATION
from flashi2v_model.weights.reading import LARGEST_HEADER

_FIRST_BYTES, _BLOCK = 4096, 2**24


def fingerprint(path: str | Path, *, whole: bool = False) -> str:
    """Return a hash by which the files of a model are known again wherever they lie; of a hub id, the id.

    Nobody should wait while 28 GB are read for it, and yet training a few layers makes another model: every tensor
    counts, by its first bytes or its checksum. Hidden files, such as a download's own notes, do not, nor does a
    calibration, which is made from the weights.

    Args:
        path: a file of weights, a directory, or a hub id.
        whole: read every byte, where what was computed with the weights is kept for long.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        return str(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.relative_to(root).as_posix() if file != root else ""
        if file.name != CALIBRATION and not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            for piece in _blocks(file) if whole else _pieces(file):
                digest.update(piece)
    return f"blake2b:{digest.hexdigest()}"


def _pieces(file: Path) -> Iterator[bytes]:
    # What torch.save wrote; the files of a distributed checkpoint, several such in a row, are read as a whole.
    if file.suffix in (".pt", ".pth", ".bin", ".ckpt") and zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as archive:
                yield from (f"{entry.filename}\0{entry.CRC}\0".encode() for entry in archive.infolist())
        except zipfile.BadZipFile:
            pass  # damaged; loading it says so
        return
    if file.suffix != ".safetensors":
        yield from _blocks(file)
        return
    with file.open("rb") as stream:
        # Eight bytes with the length of the header, which says where each tensor starts; then the tensors.
        start = stream.read(8)
        header = stream.read(min(int.from_bytes(start, "little"), LARGEST_HEADER))
        yield start + header
        try:
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    first, last = entry["data_offsets"]
                    stream.seek(8 + len(header) + first)
                    yield stream.read(max(0, min(_FIRST_BYTES, last - first)))
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError, OverflowError):
            return  # damaged; loading it says so


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            yield block
