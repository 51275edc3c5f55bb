"""What a step that was not finite was computed from, kept to be computed again."""

import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_train.step import Inputs

logger = logging.getLogger(__name__)

# Of one process: what belongs to weights that no checkpoint is near of is of no use.
_KEPT = 4


class Origin(TypedDict):
    """Where the inputs of a step come from.

    `keys` are (epoch, index) of the samples, `paths` their videos, `captions` as they were encoded.
    """

    step: int
    rank: int
    keys: list[tuple[int, int]]
    paths: list[str]
    captions: list[str]


def save_autopsy(
    directory: Path,
    step: int,
    batch: tuple[Inputs, Tensor],
    keys: Sequence[tuple[int, int]],
    paths: Sequence[str],
    captions: Sequence[str],
    rank: int,
) -> Path | None:
    """Write the inputs of a step; of one process the newest few are kept.

    Args:
        directory: in the run's directory.
        step: number of the step, from 1.
        batch: inputs, and the velocity to learn, of all its samples at this data parallel place.
        keys: (epoch, index) of the samples.
        paths: their videos.
        captions: as they were encoded.
        rank: of this process.

    Returns:
        the file; None where it could not be written, which is logged and no reason to end the run.
    """
    path = directory / f"step_{step:07d}_rank_{rank}.safetensors"
    origin = Origin(step=step, rank=rank, keys=[*keys], paths=[*paths], captions=[*captions])
    inputs, velocity = batch
    tensors = {field.name: getattr(inputs, field.name) for field in fields(Inputs)} | {"velocity": velocity}
    # Clones, as tensors that share memory cannot be written.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"origin": json.dumps(origin)})
        for old in sorted(directory.glob(f"step_*_rank_{rank}.safetensors"))[:-_KEPT]:
            old.unlink()
    except (OSError, SafetensorError) as error:
        logger.warning("step %d: its batch could not be written to %s: %s", step, path, error)
        return None
    return path


def load_autopsy(path: Path) -> tuple[Inputs, Tensor, Origin]:
    """Read what `save_autopsy` wrote, onto the CPU: inputs, the velocity to learn, and where they come from.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            origin: Origin = json.loads(file.metadata()["origin"])
            inputs = Inputs(**{field.name: file.get_tensor(field.name) for field in fields(Inputs)})
            velocity = file.get_tensor("velocity")
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold the batch of a step: {error}") from None
    origin["keys"] = [(epoch, index) for epoch, index in origin["keys"]]
    return inputs, velocity, origin
