"""Weights as they lie on disk: files, directories and checkpoints, memory-mapped where the format allows it.

Nothing is unpickled but tensors.
"""

import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flashi2v_model.checkpoint import checkpoint_directory, is_checkpoint, load_stored, stored_weights, weight_name
from flashi2v_model.errors import UNREADABLE, InputError, reason_of

_STANDARD = "diffusion_pytorch_model"
_SAFETENSORS = ".safetensors"
_SUFFIXES = (_SAFETENSORS, ".pt", ".pth", ".bin")
# What a safetensors header calls a dtype. Others are no weights; a byte stands for them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


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
        tensors = _read_header(file) if device == "meta" and file.suffix == _SAFETENSORS else _read_file(file)
        if twice := tensors.keys() & state_dict.keys():
            raise InputError(f"{path} is damaged: {file.name} and another file both hold {sorted(twice)[0]}")
        state_dict.update(tensors)
    if device == "meta":
        state_dict = {key: tensor.to("meta") for key, tensor in state_dict.items()}
    return _without_prefix(state_dict)


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


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == _SAFETENSORS:
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how torch reads quantised tensors, which are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except (SafetensorError, *UNREADABLE) as error:
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
    return dict(tensors)


def _read_header(path: Path) -> dict[str, Tensor]:
    """Read names, shapes and dtypes of a safetensors file, whatever its size."""
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


def _can_be_mapped(path: Path) -> bool:
    """Tell whether the tensors of a `torch.save` file lie in it as they are: not before torch 1.6, nor compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except zipfile.BadZipFile:
        return False


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefix that wrappers put before every name ("module.", "model.diffusion_model.")."""
    root = "patch_embedding.weight"  # in every layout
    prefix = next((key.removesuffix(root) for key in state_dict if key.endswith(root)), "")
    if not all(key.startswith(prefix) for key in state_dict):
        return dict(state_dict)
    return {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file holds none.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} cannot be read: it must hold a JSON object")
    return values
