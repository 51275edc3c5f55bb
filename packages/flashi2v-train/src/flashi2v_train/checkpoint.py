"""Checkpoints of a run: DCP directories whose keys are global parameter names, visible only when whole."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_train.ema import EMA
from flashi2v_train.parallel import World

LATEST = "latest_checkpointed_iteration.txt"


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None where there is none.

    Raises:
        InputError: the run names a checkpoint that is not there.
    """
    pointer = run / LATEST
    if not pointer.is_file():
        return None
    directory = run / f"iter_{int(pointer.read_text()):07d}"
    if not directory.is_dir():
        raise InputError(f"{pointer} names {directory.name}, which is not there: correct the number or remove the file")
    return directory


def _tensors(
    transformer: FlashI2VTransformer3DModel, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict[str, Any]:
    """Everything with a shape, as views of the live state: saving reads them, loading writes into them."""
    state: dict[str, Any] = {
        "model": {name: p.detach() for name, p in transformer.named_parameters()},
        "optimizer": {name: dict(optimizer.state[p]) for name, p in _trained(transformer)},
    }
    if ema is not None:
        state["ema"] = ema.shadows
    return state


def _trained(transformer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in transformer.named_parameters() if p.requires_grad)


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
        InputError: the checkpoint is of another model or another kind of run.
    """
    for _, parameter in _trained(transformer):
        # AdamW makes its state at the first step; loading needs a place to write to.
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if optimizer.defaults["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    try:
        load_tensors(_tensors(transformer, optimizer, ema), checkpoint_id=directory)
    except (CheckpointException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory} does not fit this run's model, optimizer or --use-ema: {reason[:300]}"
        ) from error
    return dict(json.loads((directory / "progress.json").read_text()))
