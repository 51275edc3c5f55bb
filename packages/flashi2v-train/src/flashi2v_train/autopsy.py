"""What a step that was not finite was computed from, kept to be computed again."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError
from flashi2v_data.loading.sampler import SampleKey
from flashi2v_train.batch import Batch, Series
from flashi2v_train.features import Origin
from flashi2v_train.processes import RunError

logger = logging.getLogger(__name__)

# Of one process: what belongs to weights that no checkpoint is near of is of no use.
_KEPT = 4


def save_autopsy(
    directory: Path, step: int, batches: Sequence[Batch], origins: Sequence[Origin], rank: int
) -> Path | None:
    """Write what a step was computed from; of one process the newest few are kept.

    Args:
        directory: in the run's directory.
        step: number of the step, from 1.
        batches: micro batches of this data parallel rank, with what was drawn for them.
        origins: of the samples.
        rank: of this process.

    Returns:
        the file; None where it could not be written, which is logged and no reason to end the run.
    """
    path = directory / f"step_{step:07d}_rank_{rank}.safetensors"
    # Clones, as tensors that share memory cannot be written.
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().clone().contiguous()
        for number, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    origin = json.dumps({"step": step, "rank": rank, "samples": [*origins]})
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, {"origin": origin})
        for old in sorted(directory.glob(f"step_*_rank_{rank}.safetensors"))[:-_KEPT]:
            old.unlink()
    except (OSError, SafetensorError) as error:
        logger.warning("step %d: its batch could not be written to %s: %s", step, path, error)
        return None
    return path


def load_autopsy(path: Path) -> tuple[list[Batch], list[Origin]]:
    """Read what `save_autopsy` wrote, onto the CPU: micro batches for the recipe's `inputs` and `target`.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            origins = [
                Origin(SampleKey(*key), path, caption)
                for key, path, caption in json.loads(file.metadata()["origin"])["samples"]
            ]
            batches: dict[int, Batch] = {}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                number, name = key.split(".", 1)
                batches.setdefault(int(number), {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError) as error:
        raise InputError(f"{path} does not hold the batch of a step: {error}") from None
    return [batches[number] for number in sorted(batches)], origins


class Skips:
    """Counts steps that were left out, keeps their batches, and ends a run of which too many were.

    Args:
        run: its directory.
        limit: steps in a row that end it.
        rank: of this process.
        keeps: this process keeps its batches.

    Attributes:
        in_a_row: steps left out since the last that was taken.
        total: of the whole run.
    """

    def __init__(self, run: Path, limit: int, rank: int, *, keeps: bool) -> None:
        self._run, self._limit, self._rank, self._keeps = run, limit, rank, keeps
        self.in_a_row = self.total = 0

    def add(self, step: int, loss: float, norm: float, series: Series | None, origins: Sequence[Origin]) -> None:
        """Leave out a step whose loss or gradient is not finite.

        Raises:
            RunError: the run has diverged.
        """
        self.in_a_row += 1
        self.total += 1
        path = None
        if self._keeps and series is not None:
            path = save_autopsy(self._run / "autopsy", step, series.batches, origins, self._rank)
        if path is not None or self._rank == 0:
            logger.warning(
                "step %d is not finite and is skipped: loss %s, gradient norm %s%s",
                *(step, loss, norm, "" if path is None else f"; its batch is in {path}"),
            )
        if self.in_a_row >= self._limit:
            raise RunError(
                f"{self._limit} steps in a row were not finite: lower --lr, or look at the batches in "
                f"{self._run / 'autopsy'}; the last checkpoint in {self._run} is whole"
            )
