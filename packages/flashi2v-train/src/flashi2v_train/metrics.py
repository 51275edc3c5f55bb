"""What a run says about itself: metrics.jsonl, TensorBoard, a progress line."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file

Metrics = dict[str, float | int]


class MetricsLog:
    """Writes one JSON object per logged step, the same numbers for TensorBoard, and a progress line.

    Args:
        directory: the run's directory.
        first_step: steps done before; later lines of an interrupted run are removed, as their steps are done again.
        last_step: the run's length.
    """

    def __init__(self, directory: Path, first_step: int, last_step: int) -> None:
        path = directory / "metrics.jsonl"
        _keep_until(path, first_step)
        self._file = path.open("a")
        self._board = SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
        self._progress = tqdm(total=last_step, initial=first_step, desc="training", unit="step", disable=None)

    def write(self, metrics: Metrics) -> None:
        """Write a step's numbers; `step` counts from 1."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, metrics["step"])

    def advance(self, metrics: Metrics) -> None:
        """Move the progress line on by a step."""
        self._progress.set_postfix(loss=f"{metrics['loss']:.4f}", grad=f"{metrics['grad_norm']:.2f}", refresh=False)
        self._progress.update()

    def close(self) -> None:
        """Write out what is buffered."""
        self._progress.close()
        self._board.close()
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run may be cut off
        return float("inf")
