"""Weights as they lie on disk: files, directories and checkpoints, memory-mapped where the format allows it.

Nothing is unpickled but tensors. What a file claims is held against its size before memory is taken for it.
"""

import json
import logging
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flashi2v_model.errors import UNREADABLE, InputError, reason_of
from flashi2v_model.weights.checkpoint import (
    checkpoint_directory,
    is_checkpoint,
    load_stored,
    stored_weights,
    weight_name,
)
from flashi2v_model.weights.checksums import VerifiedFiles

logger = logging.getLogger(__name__)

_STANDARD = "diffusion_pytorch_model"
_SAFETENSORS = ".safetensors"
_SUFFIXES = (_SAFETENSORS, ".pt", ".pth", ".bin")
# What a safetensors header calls a dtype. Others are no weights; a byte stands for them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

# Bytes. The configuration of a large model takes some kB, the list of its tensors some hundred.
_LARGEST_JSON, LARGEST_HEADER, _LARGEST_PICKLE = 2**23, 2**24, 2**26
_LARGEST_VOCABULARY, _MOST_LAYERS = 2**27, 1000
# Compressed archives: weights hardly shrink, and small ones may be all zeros.
_MOST_SHRUNK, _ALWAYS_UNPACKED = 4, 2**28


def read_state_dict(
    path: str | Path, *, ema: bool = True, device: str = "cpu", variant: str | None = None
) -> dict[str, Tensor]:
    """Read weights, from files without touching their numbers until they are used (legacy `.pt` files excepted).

    A name under which all weights are nested ("model", "state_dict") and a prefix that all of them carry ("module.")
    are taken off.

    Args:
        path: a `.safetensors` or `torch.save` file, a diffusers directory (sharded too), a checkpoint of
            `flashi2v-train`, or a run (its newest checkpoint).
        ema: of a checkpoint, the moving average where it has one, instead of the raw weights.
        device: "cpu", or "meta" for names, shapes and dtypes alone.
        variant: of a diffusers directory that holds several, such as "fp16".

    Raises:
        InputError: weights are missing, unreadable, or hold anything but named tensors.
    """
    path = checkpoint_directory(Path(path))
    if is_checkpoint(path):
        stored = stored_weights(path, ema=ema)
        if device != "meta":
            stored = {key: torch.empty_like(tensor, device=device) for key, tensor in stored.items()}
            load_stored(path, stored)
        return {weight_name(key): tensor for key, tensor in stored.items()}
    state_dict: dict[str, Tensor] = {}
    for file in weight_files(path, variant):
        tensors = read_tensors(file, device)
        if twice := tensors.keys() & state_dict.keys():
            raise InputError(f"{path} is damaged: {file.name} and another file both hold {sorted(twice)[0]}")
        state_dict.update(tensors)
    return without_prefix(path, state_dict)


def weight_files(path: Path, variant: str | None = None) -> list[Path]:
    """Return the files that hold a model's weights, in order.

    Args:
        path: what `read_state_dict` takes.
        variant: likewise.

    Raises:
        InputError: there are none, or a shard is missing.
    """
    path = checkpoint_directory(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"no weights at {path}: give a .safetensors or .pt file, or a diffusers directory")
    if is_checkpoint(path):
        return sorted(path.glob("*.distcp"))
    path = path / "transformer" if (path / "transformer").is_dir() else path
    infix = f".{variant}" if variant else ""
    standard = f"{_STANDARD}{infix}{_SAFETENSORS}"
    index = path / f"{_STANDARD}{_SAFETENSORS}.index{infix}.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(Path(str(name)).name == name for name in shards.values()):
            raise InputError(f"{index} is damaged: its weight_map must name files beside it")
        names = sorted(set(shards.values()))
    else:
        names = [standard]
        others = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        if standard not in others and len(others) == 1:
            names = others
        elif standard not in others and others:
            raise InputError(f"{path} holds several files of weights: name one of {', '.join(others)}")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise InputError(f"{path} holds no whole model: {', '.join(missing)} is not there")
    return [path / name for name in names]


def read_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read the tensors of one file, under its own names.

    Args:
        path: a `.safetensors` or `torch.save` file.
        device: "cpu", or "meta" for names, shapes and dtypes alone.

    Raises:
        InputError: it is not there, unreadable, or holds anything but named tensors.
    """
    if device == "meta" and path.suffix == _SAFETENSORS:
        return _read_header(path)
    return {key: tensor.to(device) for key, tensor in _read_file(path).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        if path.suffix == _SAFETENSORS:
            check_header(path)
            return load_file(path)
        can_be_mapped = _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how torch reads quantised tensors, which are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except InputError:
        raise
    except (SafetensorError, zipfile.BadZipFile, zlib.error, *UNREADABLE) as error:
        if "Cannot allocate memory" in str(error):
            gigabytes = path.stat().st_size / 1e9
            raise InputError(f"{path} ({gigabytes:.1f} GB) is larger than this machine's memory can map") from error
        raise _unreadable(path, error) from error
    if _is_state_dict(loaded):
        return _plain(path, loaded)
    # {"model": weights, "iteration": 7} and the like
    nested = {key: value for key, value in loaded.items() if _is_state_dict(value)} if isinstance(loaded, dict) else {}
    if len(nested) > 1:
        raise InputError(f"{path} holds several state dicts ({', '.join(map(str, nested))}): save one of them alone")
    if not nested:
        raise InputError(f"{path} does not hold a state dict (names with tensors)")
    return _plain(path, next(iter(nested.values())))


def _plain(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Refuse tensors that torch can save, but that are not numbers side by side."""
    for name, tensor in tensors.items():
        is_dense = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not is_dense or tensor.is_quantized or tensor.is_meta:
            raise InputError(
                f"{path} is not loaded: {name} is sparse, quantised, without numbers (meta) or of a class of its own: "
                "save plain tensors"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # one number, said to stand for many
            raise InputError(f"{path} is not loaded: {name} claims {tensor.numel():,} numbers, which it does not hold")
    return dict(tensors)


def _read_header(path: Path) -> dict[str, Tensor]:
    """Read names, shapes and dtypes of a safetensors file, whatever its size."""
    check_file(path)
    check_header(path)
    try:
        with safe_open(path, framework="numpy") as file:  # which maps nothing, unlike "pt"
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or holds more than tensors, and is not loaded: {reason_of(error)}")


def check_file(path: Path, largest: int | None = None) -> None:
    """Refuse what is no regular file, as a pipe would be waited for and a device has no end; or one that is too large.

    Raises:
        InputError: it is one of these, or not there.
    """
    if not path.is_file():
        raise InputError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    if largest is not None and (size := path.stat().st_size) > largest:
        raise InputError(f"{path} is not read: it has {size:,} bytes, where such a file has at most {largest:,}")


def check_directory(directory: Path) -> None:
    """Refuse a model's directory in which a file claims more than such models have, before libraries load it.

    Raises:
        InputError: a file is no regular one, too large for what it is, damaged, or asks for code from elsewhere.
    """
    for file in sorted(directory.iterdir()):
        if file.suffix == ".json":
            check_file(file, _LARGEST_VOCABULARY)
        elif file.suffix in _SUFFIXES:
            check_file(file)
            check_header(file) if file.suffix == _SAFETENSORS else _check_archive(file)
    if (config := directory / "config.json").exists():
        for key, value in read_json(config).items():
            if isinstance(value, int) and ("num_" in key or "layers" in key) and value > _MOST_LAYERS:
                raise InputError(f"{config}: {key} is {value:,}: a model of that size is not built")
            if "attn_implementation" in key and "/" in str(value):  # a kernel of the hub: code
                raise InputError(f"{config}: {key} names code to download, which is never run: remove it")


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header would take more memory than a list of tensors can need.

    Raises:
        InputError: it does, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise _unreadable(path, error) from error
    if size > LARGEST_HEADER:
        raise InputError(f"{path} is damaged: its header claims {size:,} bytes")


def _check_archive(path: Path) -> bool:
    """Refuse a `torch.save` file that would unpack to far more than it is.

    Returns:
        whether its tensors lie in it as they are: not before torch 1.6, nor compressed.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
            allowed = max(_ALWAYS_UNPACKED, _MOST_SHRUNK * path.stat().st_size)
            if unpacked > allowed or sum(entry.file_size for entry in pickles) > _LARGEST_PICKLE:
                raise InputError(f"{path} is not loaded: it would unpack to far more than the weights of a model")
            starts = [_contents(path, archive, entry) for entry in pickles]
            is_mapped = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    else:
        with path.open("rb") as file:
            starts, is_mapped = [file.read(_LARGEST_PICKLE)], False
    if any(b"bytearray" in start for start in starts):  # of any size, by a few bytes of pickle
        raise InputError(f"{path} is not loaded: it holds more than tensors")
    return is_mapped


def _contents(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Return what an archive holds; zipfile would insist on check sums, which torch may leave out."""
    if entry.compress_type != zipfile.ZIP_STORED:
        return archive.read(entry)
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)  # of a local header of 30 bytes, the last four are lengths of what follows
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra, os.SEEK_CUR)
        return file.read(entry.file_size)


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def without_prefix(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix before the transformer's names ("module."), and leave the other parts of a whole checkpoint.

    Raises:
        InputError: several prefixes lead to a transformer.
    """
    root = "patch_embedding.weight"  # in every layout
    prefixes = [key.removesuffix(root) for key in state_dict if f".{key}".endswith(f".{root}")]
    if len(prefixes) > 1:
        found = ", ".join(repr(prefix) for prefix in prefixes)
        raise InputError(f"{path} holds several transformers, under the prefixes {found}: save one of them alone")
    prefix = prefixes[0] if prefixes else ""
    own = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    if others := sorted({key.partition(".")[0] for key in state_dict if not key.startswith(prefix)}):
        logger.warning(
            "%s is a whole checkpoint: the transformer under %s is read, %d tensors of other parts are not (%s)",
            *(path, prefix, len(state_dict) - len(own), ", ".join(others[:8])),
        )
    return own


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of the size of a configuration.

    Raises:
        InputError: the file holds none.
    """
    check_file(path, _LARGEST_JSON)
    try:
        values = json.loads(VerifiedFiles(path.parent).read(path))  # in a checkpoint it has a checksum
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} cannot be read: it must hold a JSON object")
    return values
