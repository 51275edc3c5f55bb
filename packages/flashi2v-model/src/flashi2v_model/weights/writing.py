"""Weights written as one file, and directories of them copied."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flashi2v_model.errors import StorageError
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


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Yield a place to write a file or directory, which gets its name when the block succeeds.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
            temporary = Path(directory) / path.name
            yield temporary
            # safetensors makes files that only their owner can read; these get the permissions of any new file.
            (usual := Path(directory) / "usual").touch()
            for file in (temporary, *temporary.rglob("*.safetensors")):
                if file.is_file():
                    file.chmod(usual.stat().st_mode)
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StorageError(f"cannot write ({reason}): {path}") from error
