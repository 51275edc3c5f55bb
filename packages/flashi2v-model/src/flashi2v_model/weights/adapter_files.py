"""Files and directories that adapters are read from, of this disk and of the hub."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.weights.adapter_spellings import CONFIG, Header
from flashi2v_model.weights.reading import read_json, read_tensors
from flashi2v_model.weights.trained_adapters import find_trained, trained_adapter

# The names that diffusers and peft write; peft's has its configuration beside it.
NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w.-]+?)(/(?P<file>.+\.safetensors))?")
_FILES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Fetching:
    """How a file of the hub is fetched; as of huggingface_hub's `snapshot_download`."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool | None = False


def open_adapter(
    source: Any, weight_name: str | None = None, subfolder: str | None = None, **fetching: Any
) -> tuple[Mapping[str, Tensor], Header]:
    """Return an adapter's tensors as they are spelled, and the header of their file.

    Args:
        source: a file, a directory, a run of flashi2v-train, a hub id (owner/name, or owner/name/file.safetensors), or
            the tensors by name.
        weight_name: of the file in a directory or repository.
        subfolder: of these, in which it lies.
        fetching: as of `Fetching`.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    how = Fetching(**fetching)
    if isinstance(source, Mapping):
        return source, {}
    path = Path(source)
    hub_id = _HUB_ID.fullmatch(str(source))
    if path.exists() or hub_id is None or (path.suffix in _FILES and not hub_id["file"]):
        return read_adapter_file(adapter_file(path / (subfolder or ""), weight_name))
    return read_adapter_file(_from_hub(hub_id["repository"], hub_id["file"] or weight_name, subfolder, how))


def adapter_file(path: Path, weight_name: str | None = None) -> Path:
    """Return the file of an adapter: the path itself, or the one file of a directory; of a run, its checkpoint.

    Args:
        path: a file, a directory, or a run of flashi2v-train that trained adapters.
        weight_name: the name of the file in the directory.

    Raises:
        InputError: it is not there, or the directory holds several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(
            f"no LoRA adapter at {path}: give a .safetensors file, a directory that holds one, or a hub id"
        )
    if weight_name is not None:
        return path / weight_name
    if (checkpoint := find_trained(path)) is not None:
        return checkpoint
    files = sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors")
    found = [name for name in NAMES if name in files] or files
    if len(found) != 1:
        what = f"several: name one of {', '.join(found)}" if found else "no .safetensors file"
        raise InputError(f"{path} is to hold a LoRA adapter, and holds {what}")
    return path / found[0]


def read_adapter_file(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an adapter's tensors as they are spelled, and the header of its file.

    A configuration of peft that lies beside it is put where diffusers has it in its header.

    Args:
        path: from `adapter_file`.
        ema: of a checkpoint, the moving average where it has one, instead of the raw weights.

    Raises:
        InputError: it is not there, damaged, or holds more than tensors.
    """
    if path.is_dir():
        return trained_adapter(path, ema=ema), {}
    state_dict, header = read_tensors(path), {}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            header = dict(file.metadata() or {})
    beside = path.parent / PEFT_CONFIG
    if CONFIG not in header and path.name == NAMES[1] and beside.is_file():
        header[CONFIG] = json.dumps(read_json(beside))
    return state_dict, header


def _from_hub(repository: str, weight_name: str | None, subfolder: str | None, how: Fetching) -> Path:
    """Fetch an adapter of the hub; return its file on this disk."""
    folder = f"{subfolder}/" if subfolder else ""
    try:
        if weight_name is None and not how.local_files_only:
            names = HfApi(token=how.token).list_repo_files(repository, revision=how.revision)
            files = [name.removeprefix(folder) for name in names if name.startswith(folder)]
            files = [name for name in files if name.endswith(".safetensors") and "/" not in name]
            found = [name for name in NAMES if name in files] or files
            if len(found) != 1:
                raise InputError(f"{repository}: name the file, as weight_name, of {', '.join(found) or 'none there'}")
            weight_name = found[0]
        wanted = [f"{folder}{weight_name or '*.safetensors'}", f"{folder}{PEFT_CONFIG}"]
        root = Path(
            snapshot_download(
                repository,
                allow_patterns=wanted,
                revision=how.revision,
                token=how.token,
                cache_dir=how.cache_dir,
                force_download=how.force_download,
                local_files_only=bool(how.local_files_only),
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no LoRA adapter {repository!r}, neither here nor on the hub: {reason}") from error
    return adapter_file(root / (subfolder or ""), weight_name)
