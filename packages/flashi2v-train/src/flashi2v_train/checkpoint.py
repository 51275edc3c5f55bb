"""Checkpoints of a run: DCP directories whose keys are global parameter names, visible only when whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.checkpoint import LATEST, SafeReader
from flashi2v_train.ema import EMA
from flashi2v_train.parallel import World


def _tensors(
    transformer: FlashI2VTransformer3DModel, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, Tensor]:
    """Everything with a shape, by name, as views of the live state: saving reads them, loading writes into them."""
    state = {f"model.{name}": p.detach() for name, p in transformer.named_parameters()}
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    if ema is not None:
        state |= {f"ema.{name}": shadow for name, shadow in ema.shadows.items()}
    return state


def save(
    run: Path,
    iteration: int,
    transformer: FlashI2VTransformer3DModel,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
    progress: dict[str, Any],
    world: World,
) -> None:
    """Write `iter_0000100/` and point to it; called by all processes."""
    final = run / f"iter_{iteration:07d}"
    partial = run / f".{final.name}.incomplete"
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    world.barrier()
    save_tensors(_tensors(transformer, optimizer, ema), checkpoint_id=partial)
    if world.is_first:
        (partial / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")
        transformer.save_config(partial)
        shutil.rmtree(final, ignore_errors=True)  # from a run that was resumed before this step
        os.rename(partial, final)
        with atomic_file(run / LATEST) as pointer:
            pointer.write_text(f"{iteration}\n")
    world.barrier()


def load(
    directory: Path,
    transformer: FlashI2VTransformer3DModel,
    optimizer: torch.optim.Optimizer,
    ema: EMA | None,
) -> dict[str, Any]:
    """Load a checkpoint into a run, on any number of processes; return its progress.

    Raises:
        InputError: the checkpoint is damaged, or of another model or another kind of run.
    """
    reader = SafeReader(directory)
    state = _tensors(transformer, optimizer, ema)
    ours, theirs = set(state), set(reader.read_metadata().state_dict_metadata)
    if ours != theirs:
        only = [f"the run alone has {key}" for key in sorted(ours - theirs)]
        only += [f"the checkpoint alone has {key}" for key in sorted(theirs - ours)]
        raise InputError(f"{directory} is of another model or --use-ema: {'; '.join(only)[:300]}")
    try:
        saved_config = json.loads((directory / "config.json").read_text())
        progress = dict(json.loads((directory / "progress.json").read_text()))
        load_tensors(state, storage_reader=reader)
    except (CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory} is damaged or of another model: {reason[:300]}") from error
    for key, value in json.loads(transformer.to_json_string()).items():
        if not key.startswith("_") and saved_config.get(key) != value:
            raise InputError(f"{directory} was trained with {key} {saved_config.get(key)}, this run has {value}")
    return progress
