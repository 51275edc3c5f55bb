"""Features encoded ahead of training: latents of clips, states of captions.

A store is an LMDB. Its `header` is msgpack: schema version, `checksum` ("xxh3_64") and `made_by`, a dict of everything
that the features depend on (VAE, text encoder, sample size, token count, ...). Behind every value stand 8 bytes of
checksum. Its other values are safetensors (raw numbers behind a
JSON head; nothing is ever executed), its keys hashes of what was encoded: a clip is its file and the very frames, as
another crop in time has other latents; a caption is its text as the tokenizer got it, "" included.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from flashi2v_data.atomic import atomic_directory
from flashi2v_data.errors import InputError, StorageError
from flashi2v_data.store.environments import (
    CHECKSUM,
    DAMAGED,
    FIRST_MAP_SIZE,
    check_file,
    open_shared,
    seal,
    storage,
    unseal,
    unseal_header,
    warn_unsealed,
    write,
)

SCHEMA = 1
_HEADER = b"header"
_ADVICE = "free some space and run again: what is written stays"


def video_key(path: str, frames: Sequence[int], *, flip: bool = False, crop: Sequence[int] | None = None) -> bytes:
    """Return the key of a clip's features: its file, the places of its frames, and how pictures were changed."""
    return _key("video", path, [int(frame) for frame in frames], flip, None if crop is None else list(crop))


def text_key(caption: str) -> bytes:
    """Return the key of a caption's features; the caption is as tokenised."""
    return _key("text", caption)


def _key(*parts: Any) -> bytes:
    # A path may hold bytes that are no Unicode; repr escapes them.
    return hashlib.blake2b(repr(parts).encode("ascii", "backslashreplace"), digest_size=16).digest()


def feature_stores(path: Path) -> list[Path]:
    """Return the stores that are meant by a path: itself, or those in its folder that hold anything."""
    return [path] if (path / "data.mdb").is_file() else sorted(filter(_is_begun, path.glob("*.lmdb")))


class FeatureWriter:
    """Adds features to a store, which is made if need be; what was put before an interruption is kept.

    Each process of a parallel encoding writes a store of its own within one folder. Use it as a context manager.

    Args:
        path: of the store, `<name>.lmdb` where a folder holds several.
        provenance: everything that the features depend on; values are numbers, strings, lists, dicts.

    Raises:
        InputError: there is a store of that name with features of another kind.
        StorageError: the disk refuses.
    """

    def __init__(self, path: str | os.PathLike[str], provenance: Mapping[str, Any]) -> None:
        self.path = Path(path)
        check_file(self.path)
        if not _is_begun(self.path):
            with storage(self.path, _ADVICE):
                _begin(self.path, {"schema": SCHEMA, "made_by": dict(provenance), "checksum": CHECKSUM})
        try:
            self._environment = lmdb.open(str(self.path), map_size=FIRST_MAP_SIZE)
        except lmdb.DiskError as error:
            raise StorageError(f"{self.path}: cannot be written: {error}; {_ADVICE}") from None
        except lmdb.Error as error:
            raise InputError(f"{self.path}: cannot be opened as LMDB: {error}") from None
        with self._environment.begin() as transaction:
            old = transaction.get(_HEADER)
        if not _check_header(self.path, old, provenance, exact=True)[1]:
            raise InputError(
                f"{self.path}: has no checksums, so nothing is added to it: remove it, or encode elsewhere"
            )

    def __contains__(self, key: bytes) -> bool:
        """Tell whether features are there already, so that they need not be encoded again."""
        with self._environment.begin() as transaction:
            return transaction.get(key) is not None

    def put(self, features: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        """Store named tensors under each key, on disk when this returns.

        Raises:
            StorageError: the disk is full.
        """
        values = {key: seal(key, safetensors.torch.save(_plain(tensors))) for key, tensors in features.items()}

        def put(transaction: lmdb.Transaction) -> None:
            for key, value in values.items():
                transaction.put(key, value)

        write(self._environment, put, _ADVICE)

    def close(self) -> None:
        """Close the store."""
        self._environment.close()

    def __enter__(self) -> "FeatureWriter":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()


def _is_begun(path: Path) -> bool:
    """Tell whether there is a store with anything in it: one whose making was cut short is as none."""
    file = path / "data.mdb"
    if not file.is_file():
        return path.is_file()  # something else, which says so when it is opened
    return file.stat().st_size > 0 and open_shared(path).stat()["entries"] > 0


def remove_unbegun(folder: Path) -> None:
    """Remove the stores of a folder whose making was cut short, so that there is nothing in them."""
    for store in folder.glob("*.lmdb"):
        if store.is_dir() and not _is_begun(store):
            shutil.rmtree(store)


def _begin(path: Path, header: Mapping[str, Any]) -> None:
    """Make a store that holds its header, and is not to be seen without; an empty one in its place goes."""
    for name in ("data.mdb", "lock.mdb"):
        (path / name).unlink(missing_ok=True)
    with (
        atomic_directory(path) as made,
        lmdb.open(str(made), map_size=FIRST_MAP_SIZE) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(_HEADER, seal(_HEADER, msgspec.msgpack.encode(header)))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


class FeatureStore:
    """Reads a store, or a folder of them as one; it may be sent or forked to other processes.

    Args:
        path: of a store, or of a folder of `*.lmdb`.
        provenance: what the features must have been made from, as far as it matters to the reader; None accepts any.

    Raises:
        InputError: there is no store, or it holds features of another kind.
    """

    def __init__(self, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None) -> None:
        root = Path(path)
        self.paths = feature_stores(root)
        if not self.paths:
            raise InputError(f"{root}: no store of features; write one with flashi2v-encode")
        self._is_sealed = dict.fromkeys(self.paths, False)
        for store in self.paths:
            header = _get(store, _HEADER)
            found, self._is_sealed[store] = _check_header(store, header, provenance)
            provenance = found if provenance is None else provenance  # all stores of a folder are of one kind
        self.provenance = found
        warn_unsealed(
            [path for path, is_sealed in self._is_sealed.items() if not is_sealed], "encode again to have them"
        )

    def __contains__(self, key: bytes) -> bool:
        """Tell whether there are features of a key."""
        return any(_get(path, key) is not None for path in self.paths)

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None where there are none.

        Raises:
            InputError: they are damaged.
        """
        for path in self.paths:
            value = _get(path, key)
            if value is not None:
                try:
                    return safetensors.torch.load(unseal(key, value) if self._is_sealed[path] else value)
                except (ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
                    raise InputError(f"{path}: the features {key.hex()} are damaged ({error}): {DAMAGED}") from None
        return None


def _get(path: Path, key: bytes) -> bytes | None:
    try:
        with open_shared(path).begin() as transaction:
            value: bytes | None = transaction.get(key)
            return value
    except lmdb.Error as error:
        raise InputError(f"{path}: is damaged ({error}): {DAMAGED}") from None


def _check_header(
    path: Path, header: bytes | None, provenance: Mapping[str, Any] | None, *, exact: bool = False
) -> tuple[dict[str, Any], bool]:
    """Return what features were made by, and whether they have checksums."""
    if header is None:
        raise InputError(f"{path}: an LMDB without the header of a feature store; write one with flashi2v-encode")
    found, is_sealed = unseal_header(path, _HEADER, header)
    if found.get("schema") != SCHEMA or not isinstance(found.get("made_by"), dict):
        raise InputError(f"{path}: holds no features of schema {SCHEMA}: encode again, or update flashi2v-data")
    theirs: dict[str, Any] = found["made_by"]
    if provenance is not None:
        ours = msgspec.msgpack.decode(
            msgspec.msgpack.encode(dict(provenance))
        )  # tuples become lists, as they did in the file
        for key in sorted({*ours, *theirs} if exact else ours):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"{path}: its features were made with {key} {theirs.get(key)!r}, this run has {ours.get(key)!r}: "
                    "encode again, or set the same"
                )
    return theirs, is_sealed
