"""What a run says about itself: a progress line, metrics.jsonl, TensorBoard, Weights & Biases, train_summary.json."""

import json
import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from flashi2v_data.atomic import atomic_file
from flashi2v_data.console import machine_fault
from flashi2v_data.errors import InputError, StorageError
from flashi2v_model.machines import peak_flops
from flashi2v_npu_ops.device import name as device_name
from flashi2v_npu_ops.device import peak_memory
from flashi2v_train.config import RunConfig
from flashi2v_train.cost import count_parameters
from flashi2v_train.history import (
    Curve,
    draw_loss,
    draw_progress,
    held_out_table,
    raw_lines,
    read_line,
    read_steps,
    read_validations,
    summarise,
)
from flashi2v_train.options import TrainOptions
from flashi2v_train.world import World

logger = logging.getLogger(__name__)

Metrics = dict[str, float | int]

# Without a terminal a line tells of a step at most every so many seconds.
_SECONDS_BETWEEN_LINES = 10.0


class Meter:
    """Measures steps, beside what they compute.

    Args:
        config: of the run.
        world: this process among all.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config, self._world = config, world

    def measure(self, seconds: float, waited: float, counts: Sequence[int]) -> Metrics:
        """Return what is measured of a step.

        Args:
            seconds: that it took.
            waited: of these, for data.
            counts: samples of the global batch, by bucket.
        """
        device = self._world.device
        tokens = sum(number * cost.tokens for number, cost in zip(counts, self._config.costs))
        flops = sum(number * cost.operations for number, cost in zip(counts, self._config.costs))
        metrics: Metrics = {
            "seconds": seconds,
            "samples_per_second": sum(counts) / seconds,
            "tokens_per_second": tokens / seconds,
            "data_wait_share": waited / seconds,
            "peak_memory_bytes": peak_memory(device),
        }
        # What makers promise is for bf16.
        peak = peak_flops(device_name(device.type)) if device.type != "cpu" and self._config.bf16 else None
        if peak is not None:
            metrics["model_flops_utilisation"] = flops / seconds / peak / self._world.size
        return metrics

    def facts(self) -> dict[str, Any]:
        """Return what the summary of the run says beside its numbers."""
        device = self._world.device.type
        return {
            "parameters": sum(count_parameters(self._config).values()),
            "parallel": self._world.dims.describe(),
            "processes": self._world.size,
            "device": f"{device}, {device_name(device)}",
            "versions": {name: version(name) for name in ("flashi2v-train", "flashi2v-model", "torch")},
        }


@contextmanager
def disk_failures_reported() -> Iterator[None]:
    """Let what else is written than checkpoints end a run in one line, too."""
    try:
        yield
    except ConnectionError:  # another process has ended, which says why
        raise
    except OSError as error:
        raise StorageError(f"{machine_fault(error)}: fix that, and start the same command again") from error


def open_log(config: RunConfig, first_step: int, started: float | None) -> "MetricsLog":
    """Write `config.json`, and return what writes the numbers of steps beside it."""
    values = config.as_dict()
    with atomic_file(config.options.save / "config.json") as path:
        path.write_text(json.dumps(values, indent=1) + "\n")
    return MetricsLog(config.options, first_step, values, started)


class MetricsLog:
    """Writes the numbers of steps to files, curves and a progress line; of all processes the first has one.

    Args:
        options: of the run.
        first_step: steps done before; later lines of an interrupted run are removed, as their steps are done again.
        config: everything resolved, for Weights & Biases.
        started: when this start of the run began, by `time.monotonic`; default: now.

    Raises:
        InputError: Weights & Biases refuses the run.
    """

    def __init__(
        self, options: TrainOptions, first_step: int, config: Mapping[str, Any], started: float | None = None
    ) -> None:
        self._options, self._run = options, options.save
        self._started = time.monotonic() if started is None else started
        self._step = self._first_step = first_step
        self._next_line = self._first_ended = 0.0
        (self._run / "train_summary.json").unlink(missing_ok=True)  # of an earlier end: the run goes on
        _keep_until(self._run / "metrics.jsonl", first_step)
        # A run that begins anew is also validated anew before its first step.
        _keep_until(self._run / "validation.jsonl", first_step or -1)
        self._curve = Curve()
        for line in read_steps(self._run):
            self._curve.add(line["step"], math.nan if line["loss"] is None else line["loss"])
        self._file = (self._run / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(self._run), purge_step=first_step + 1 if first_step else None)
        self._progress = tqdm(total=options.train_iters, initial=first_step, desc="training", unit="step", disable=None)
        self._wandb = _start_wandb(options, config) if options.wandb_project else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.close()
        self._board.close()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)

    def write(self, metrics: Metrics) -> None:
        """Note a step's numbers; `step` counts from 1."""
        step = self._step = int(metrics["step"])
        if step % self._options.log_interval == 0:
            self._file.write(_line(metrics))
            self._file.flush()
            self._send(metrics)
        self._curve.add(step, metrics["loss"])
        if step % self._options.tensorboard_log_interval == 0:
            self._draw(step, metrics)
        self._tell(metrics)
        self._progress.set_postfix_str(_progress_words(metrics), refresh=False)
        self._progress.update()

    def _tell(self, metrics: Metrics) -> None:
        """Log a line now and then where no terminal shows the progress, and when the first step was done."""
        now, step = time.monotonic(), int(metrics["step"])
        if step == self._first_step + 1:
            logger.info("first step after %s", tqdm.format_interval(now - self._started))
            self._first_ended = now
        if not self._progress.disable or step % self._options.log_interval or now < self._next_line:
            return
        self._next_line = now + _SECONDS_BETWEEN_LINES
        left = (self._options.train_iters - step) * self._pace(now, step, metrics["seconds"])
        logger.info(
            "step %d of %d: loss %.4f, gradient norm %.3g, rate %.3g, %.3g s a step, %s left",
            *(step, self._options.train_iters, metrics["loss"], metrics["grad_norm"], metrics["lr"]),
            *(metrics["seconds"], tqdm.format_interval(left)),
        )

    def _pace(self, now: float, step: int, seconds: float) -> float:
        """Return the seconds that a step takes with all around it; the first one also has to import and compile."""
        behind = step - self._first_step - 1
        return (now - self._first_ended) / behind if behind else seconds

    def write_validation(self, step: int, metrics: Metrics) -> None:
        """Note the numbers of a validation after a step."""
        with (self._run / "validation.jsonl").open("a") as file:
            file.write(_line({"step": step, **metrics}))
        self._draw(step, metrics)
        self._send({"step": step, **metrics})
        logger.info("step %d: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self.draw()

    def draw(self) -> None:
        """Draw train_loss.png and validation.png anew; a disk that is full does not end the run."""
        try:
            draw_loss(self._curve, read_validations(self._run), self._run / "train_loss.png")
            draw_progress(self._run, self._run / "validation.png")
        except OSError as error:
            logger.warning("cannot draw how the run goes: %s", error)

    def _draw(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, step)

    def _send(self, metrics: Metrics) -> None:
        if self._wandb is not None:
            self._wandb.log(metrics)

    def finish(self, ended: str, facts: Mapping[str, Any]) -> None:
        """Write train_summary.json over the whole run, earlier starts included, and say how fast it was.

        Args:
            ended: why.
            facts: about the run, to be written too.
        """
        lines, validations = read_steps(self._run), read_validations(self._run)
        summary = {
            "ended": ended,
            "steps": self._step,
            "seconds_since_start": time.monotonic() - self._started,
            **summarise(lines),
            "validation": {"first": validations[0], "last": validations[-1]} if validations else None,
            **facts,
        }
        with atomic_file(self._run / "train_summary.json") as path:
            path.write_text(json.dumps(summary, indent=1) + "\n")
        if self._wandb is not None:
            self._wandb.summary.update(summary)
        self.draw()
        for line in (held_out_table(validations) or "").splitlines():
            logger.info(line)
        if lines:
            logger.info(
                "steps %d to %d: elapsed time per iteration %.3f s, %.3f samples per second",
                *summary["timed_steps"],
                summary["seconds_per_step"],
                summary["samples_per_second"],
            )


def _line(metrics: Metrics) -> str:
    """Return a line of JSON, which has no word for what is not finite."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}) + "\n"


def _progress_words(metrics: Metrics) -> str:
    words = [
        f"loss {metrics['loss']:.4f}",
        f"grad {metrics['grad_norm']:.2f}",
        f"lr {metrics['lr']:.2g}",
        f"{metrics['samples_per_second']:.3g} samples/s",
        f"{metrics['tokens_per_second']:.3g} tokens/s",
    ]
    if "model_flops_utilisation" in metrics:
        words.append(f"MFU {metrics['model_flops_utilisation']:.1%}")
    words += [f"data wait {metrics['data_wait_share']:.0%}", f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB"]
    return ", ".join(words)


def _start_wandb(options: TrainOptions, config: Mapping[str, Any]) -> Any:
    import wandb

    # A resumed run goes on under the same name there.
    note = options.save / "wandb_id.txt"
    if not note.exists():
        with atomic_file(note) as path:
            path.write_text(uuid.uuid4().hex[:12] + "\n")
    try:
        run = wandb.init(
            project=options.wandb_project,
            name=options.wandb_exp_name or options.save.resolve().name,
            dir=str(options.wandb_save_dir or options.save),
            id=note.read_text().strip(),
            resume="allow",
            config=dict(config),
            allow_val_change=True,  # a resumed run may be longer, or laid out otherwise
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--wandb-project: {reason} Or set WANDB_MODE=offline.") from error
    # Steps done again after a resume would be refused under wandb's own count, which only grows.
    run.define_metric("*", step_metric="step")
    return run


def _keep_until(path: Path, step: int) -> None:
    """Remove the lines of later steps, and what is no line of numbers: the last of a killed run may be cut off."""
    if not path.exists():
        return
    raw = raw_lines(path)
    read = [read_line(line) for line in raw]
    damaged = sum(line is None for line in read[:-1])
    if damaged:
        logger.warning("%s: %d of %d lines are damaged, and are removed", path, damaged, len(read))
    kept = [line for line, numbers in zip(raw, read) if numbers is not None and numbers["step"] <= step]
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
