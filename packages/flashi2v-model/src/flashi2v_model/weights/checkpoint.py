"""Reading the weights out of a training run's checkpoint (a DCP directory) without its optimizer."""

import io
import logging
import pickle
import warnings
from collections.abc import Mapping
from enum import EnumMeta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from flashi2v_model.errors import UNREADABLE, DamagedError, InputError, reason_of
from flashi2v_model.weights.checksums import VerifiedFiles, read_sums, warn_unverified

logger = logging.getLogger(__name__)

_METADATA = ".metadata"
_RAW, _EMA = "model.", "ema."
LATEST = "latest_checkpointed_iteration.txt"
ADAPTERS = "_lora"  # in the config.json of a checkpoint that holds adapters: what it says of them


def newest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that a run's pointer names; without a pointer the newest whole one, None where none is.

    Raises:
        InputError: the pointer names a checkpoint that is not there, or none of a run without a pointer is whole.
    """
    pointer = run / LATEST
    if not pointer.is_file():
        return _newest_whole(run)
    with pointer.open("rb") as file:
        words = file.read(100).decode(errors="replace").strip()
    directory = run / f"iter_{int(words):07d}" if words.isdecimal() else run / words
    if not words or directory.parent != run or not is_checkpoint(directory):
        raise InputError(f"{pointer} names {words!r}, which is no checkpoint here: write the number of one into it")
    return directory


def checkpoints_of(run: Path) -> list[Path]:
    """Return a run's checkpoints, whole or not, the newest first."""
    found = [path for path in run.glob("iter_*") if path.name.removeprefix("iter_").isdecimal() and is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")), reverse=True)


def _newest_whole(run: Path) -> Path | None:
    faults = []
    for directory in checkpoints_of(run):
        fault = missing_part(directory)
        if not fault:
            _warn_once(f"{run / LATEST} is not there: {directory} is the newest whole checkpoint, and is taken")
            return directory
        faults.append(fault)
    if faults:
        raise InputError(
            f"{run} holds checkpoints, but none is whole ({faults[0]}), and {LATEST} is not there: copy them again, or "
            "take another directory"
        )
    return None


def missing_part(directory: Path) -> str:
    """Return which file of a checkpoint is not there in its full size; "" where all are. Contents are not read."""
    try:
        sizes = {name: sums["bytes"] for name, sums in read_sums(directory).items()}
        if not sizes:  # an older one
            for place in SafeReader(directory).read_metadata().storage_data.values():
                end = place.offset + place.length
                sizes[place.relative_path] = max(end, sizes.get(place.relative_path, 0))
        for name, size in sizes.items():
            found = (directory / name).stat().st_size
            if found < size:
                return f"{directory / name} has {found} bytes of {size}"
    except UNREADABLE as error:
        return reason_of(error)
    return ""


@cache
def _warn_once(words: str) -> None:
    logger.warning("%s", words)


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
            warn_unverified(path)
            load(dict(into), storage_reader=SafeReader(path), no_dist=True)
    except (CheckpointException, *UNREADABLE) as error:
        cause = cause_of(error)
        if isinstance(cause, DamagedError):
            raise DamagedError(f"{cause}: take another checkpoint of the run") from error
        reason = reason_of(cause)
        raise InputError(f"{path} is damaged or holds more than tensors, and is not loaded: {reason}") from error


def cause_of(error: BaseException) -> BaseException:
    """Return what made DCP fail, in whichever process: damage, if that is among several causes.

    Raises:
        KeyboardInterrupt: that was it; DCP takes it for a failure like others.
    """
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _ in error.failures.values()]
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt):
            raise cause from error
    return next((cause for cause in causes if isinstance(cause, DamagedError)), causes[0])


class SafeReader(FileSystemReader):
    """DCP's reader, which verifies what it reads, and reads the table of contents, a pickle, without running anything.

    Args:
        path: the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs: VerifiedFiles = VerifiedFiles(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the table of contents.

        Raises:
            DamagedError: it is damaged, or holds more than tensors.
        """
        if self._metadata is None:
            self._metadata = self._read_metadata()
        return self._metadata

    def _read_metadata(self) -> Metadata:
        path = Path(self.path) / _METADATA
        try:
            metadata = _MetadataUnpickler(self.fs.read(path)).load()
        except UNREADABLE as error:
            if isinstance(error, DamagedError):
                raise
            raise DamagedError(
                f"{path} is damaged or holds more than a table of tensors: {reason_of(error)}"
            ) from error
        contents = getattr(metadata, "state_dict_metadata", None)
        if (
            not isinstance(metadata, Metadata)
            or not isinstance(contents, dict)
            or not all(isinstance(key, str) for key in contents)
        ):
            raise DamagedError(f"{path} is damaged: it is no table of tensors")
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle._Unpickler):  # the one in Python
    """Admits DCP's own records, dtypes and plain containers, and no more memory than the file's own size calls for.

    The one in C makes room for 2^32 objects at the word of five bytes.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        # Room that is claimed, and calls that pickle's protocols since 2 have other codes for.
        if code not in {code[0] for code in (pickle.BYTEARRAY8, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX)}
    }

    stack: list[Any]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._left = len(content)  # what calls are given was spelled out before, in a byte each at least

    def _call(self, load: Any) -> None:
        for part in self.stack[-1]:
            if isinstance(part, (tuple, list, dict, set)):
                self._left -= len(part)
        if self._left < 0:
            raise pickle.UnpicklingError("it says more than its size allows")
        load(self)

    def load_reduce(self) -> None:
        self._call(pickle._Unpickler.load_reduce)  # type: ignore[attr-defined]

    def load_newobj(self) -> None:
        self._call(pickle._Unpickler.load_newobj)  # type: ignore[attr-defined]

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type):
            raise pickle.UnpicklingError("it changes a class")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build}

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
        if (module, name) == ("builtins", "getattr"):
            return _member
        if is_record or is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _member(kind: object, name: str) -> Any:
    """Return a member of an enumeration: early Python 3.11 (Debian's 3.11.2) pickles it as its class's attribute."""
    member = kind.__members__.get(name) if isinstance(kind, EnumMeta) else None
    if member is None:
        raise pickle.UnpicklingError("builtins.getattr has no place in it but for members of enumerations")
    return member
