"""Weights written as one file, and directories of them copied."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashi2v_model.weights.settings import HEADER

TORCH_SUFFIXES = (".pt", ".pth")


def write_file(state_dict: Mapping[str, Tensor], path: Path, settings: Mapping[str, Any]) -> None:
    """Write a `.safetensors` file, or a `torch.save` file (`.pt`) that holds the state dict and nothing else.

    Args:
        state_dict: on the CPU; memory-mapped tensors are written without another copy.
        path: its suffix says which.
        settings: constructor arguments of the transformer, kept in the header of a `.safetensors` file. A `.pt` has
            no place for them.

    Raises:
        OSError: the file could not be written whole.
    """
    tensors = independent(state_dict)
    if path.suffix in TORCH_SUFFIXES:
        try:
            torch.save(tensors, path)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error
    else:
        save_file(tensors, path, metadata={"format": "pt", HEADER: json.dumps(dict(settings))})


def independent(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, copying those that are strided or share memory, which files cannot tell apart."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in state_dict.items():
        memory = tensor.untyped_storage()
        is_own = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        tensors[name] = tensor if is_own else tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory's files. The first one that cannot be written ends it by the system's own error.

    shutil.copytree would go on, and raise one error without a number that holds all.
    """
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
