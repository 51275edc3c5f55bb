"""What a video's record says: all that made it, so that it can be made again, or recognised as finished."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flashi2v_infer.settings import Request

_PACKAGES = ("flashi2v-infer", "flashi2v-model", "flashi2v-npu-ops", "torch", "diffusers", "transformers")

# Names, by which the same things may go elsewhere: their contents count.
_NAMES = ("image", "model")

_BLOCK = 4096


def versions() -> dict[str, str]:
    """Return the versions of what a video depends on."""
    return {name: version(name) for name in _PACKAGES}


@dataclass(frozen=True)
class Source:
    """The model that videos come from.

    Attributes:
        name: of the model, as it was given.
        settings: of its parts.
        weights: fingerprints of its parts.
    """

    name: str
    settings: Mapping[str, Any]
    weights: Mapping[str, str]


def origin(request: Request, image_contents: str, source: Source) -> dict[str, Any]:
    """Return the part of a record that is known before sampling, as JSON gives it back.

    Args:
        request: what is to be sampled.
        image_contents: hash of the image's file.
        source: the model.
    """
    facts = {
        **asdict(request),
        "image_contents": image_contents,
        "model": source.name,
        "model_settings": source.settings,
        "weights": source.weights,
    }
    return dict(json.loads(json.dumps(facts)))


def differences(record: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
    """Say in which facts a record differs from an `origin`; versions and devices are no such facts."""
    then, now = dict(_flatten(record)), dict(_flatten(origin))
    return [
        f"{key} was {_short(then.get(key))}, is {_short(value)}"
        for key, value in now.items()
        if key not in _NAMES and (key not in then or then[key] != value)
    ]


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def fingerprint(path: str | Path) -> str:
    """Return a hash by which the files of a model are known again wherever they lie; of a hub id, the id.

    Nobody should wait while 28 GB are read for it, and yet training a few layers makes another model: every tensor
    counts, by its first bytes or its checksum. Hidden files, such as a download's own notes, do not.

    Args:
        path: a file of weights, a directory, or a hub id.
    """
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        return str(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.relative_to(root).as_posix() if file != root else ""
        if not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            for piece in _pieces(file):
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
    with file.open("rb") as stream:
        if file.suffix != ".safetensors":
            while block := stream.read(_BLOCK):
                yield block
            return
        # Eight bytes with the length of the header, which says where each tensor starts; then the tensors.
        start = stream.read(8)
        header = stream.read(min(int.from_bytes(start, "little"), file.stat().st_size))
        yield start + header
        try:
            tensors = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError):
            return  # damaged; loading it says so
        for first, last in tensors:
            stream.seek(8 + len(header) + first)
            yield stream.read(min(_BLOCK, last - first))
