"""Reading the weights out of a training run's checkpoint (a DCP directory) without its optimizer."""

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from flashi2v_model.errors import UNREADABLE, InputError, reason_of

_METADATA = ".metadata"
_RAW, _EMA = "model.", "ema."
LATEST = "latest_checkpointed_iteration.txt"


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None where it has none.

    Raises:
        InputError: the run names a checkpoint that is not there.
    """
    pointer = run / LATEST
    if not pointer.is_file():
        return None
    words = pointer.read_text().strip()
    directory = run / f"iter_{int(words):07d}" if words.isdecimal() else run / words
    if not words or not is_checkpoint(directory):
        raise InputError(f"{pointer} names {words!r}, which is no checkpoint here: write the number of one into it")
    return directory


def checkpoint_directory(path: Path) -> Path:
    """Return the newest checkpoint of a run's directory; any other path as it is."""
    return newest_checkpoint(path) or path


def is_checkpoint(path: Path) -> bool:
    """Tell whether a directory is a checkpoint."""
    return (path / _METADATA).is_file()


def stored_weights(path: Path, *, ema: bool) -> dict[str, Tensor]:
    """Return a checkpoint's weights as tensors on the meta device, under the checkpoint's own keys.

    Args:
        path: the checkpoint.
        ema: the moving average where there is one, instead of the raw weights.

    Raises:
        InputError: the table of contents is damaged, holds more than tensors, or names no transformer.
    """
    contents = SafeReader(path).read_metadata().state_dict_metadata
    entries = {key: entry for key, entry in contents.items() if isinstance(entry, TensorStorageMetadata)}
    try:
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for key, entry in entries.items()
        }
        # What no chunk covers would stay as the memory was.
        partial = [
            key
            for key, entry in entries.items()
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel()
        ]
    except UNREADABLE as error:
        raise InputError(f"{path / _METADATA} is damaged: {reason_of(error)}") from error
    if partial:
        raise InputError(f"{path} is damaged: it holds only a part of {partial[0]}")
    part = _EMA if ema and any(key.startswith(_EMA) for key in tensors) else _RAW
    chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(part)}
    if not chosen:
        raise InputError(f"{path} is a checkpoint, but not of flashi2v-train: it names no {part}* tensors")
    return chosen


def has_ema(path: Path) -> bool:
    """Tell whether a checkpoint holds a moving average of the weights.

    Raises:
        InputError: the table of contents is damaged or holds more than tensors.
    """
    return any(key.startswith(_EMA) for key in SafeReader(path).read_metadata().state_dict_metadata)


def weight_name(key: str) -> str:
    """Return the parameter's name of a checkpoint's key."""
    return key.removeprefix(_EMA).removeprefix(_RAW)


def load_stored(path: Path, into: Mapping[str, Tensor]) -> None:
    """Read tensors of a checkpoint, one after the other, into allocated ones of any device and float type.

    Args:
        path: the checkpoint.
        into: what to fill, by the checkpoint's keys.

    Raises:
        InputError: the checkpoint is damaged, or holds more than tensors.
    """
    try:
        with warnings.catch_warnings():
            # It warns that there is one process, which is what was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(into), storage_reader=SafeReader(path), no_dist=True)
    except (CheckpointException, *UNREADABLE) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = reason_of(cause)
        raise InputError(f"{path} is damaged or holds more than tensors, and is not loaded: {reason}") from error


class SafeReader(FileSystemReader):
    """DCP keeps its table of contents as a pickle; this reads it without running anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except UNREADABLE as error:
            raise InputError(f"{path} is damaged or holds more than a table of tensors: {reason_of(error)}") from error
        contents = getattr(metadata, "state_dict_metadata", None)
        if not isinstance(metadata, Metadata) or not isinstance(contents, dict) or not all(map(_is_name, contents)):
            raise InputError(f"{path} is damaged: it is no table of tensors")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _is_name(key: object) -> bool:
    return isinstance(key, str)


class _MetadataUnpickler(pickle.Unpickler):
    """Admits DCP's own records, dtypes and plain containers."""

    _RECORDS = frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
            "_StorageInfo",
        }
    )
    _HOMES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_record = module in self._HOMES and name in self._RECORDS
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_record or is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
