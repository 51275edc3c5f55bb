"""What a run has written of itself, read again: its lines of numbers, summed up, as a table and as pictures.

Nothing heavy is imported here: `flashi2v-train status` answers at once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashi2v_data.atomic import atomic_file

Lines = Sequence[Mapping[str, Any]]

_SUMMED = {"step", "seconds", "samples_per_second", "peak_memory_bytes"}
# The reference's script measures its speed over these steps, when everything is warm.
_TIMED = range(100, 201)
_MAX_POINTS = 1000
_MAX_STRIPS = 6
# Rows of the table of held-out clips: what it is called, of the validation, of the real clips; how it is written.
_HELD_OUT = (
    ("loss", "validation_loss", None, "{:.4f}"),
    ("first frame PSNR [dB]", "first_frame_psnr", None, "{:.1f}"),
    ("motion [levels of 255 a frame]", "motion", "real_motion", "{:.2f}"),
    ("pixels that stand still", "stillness", "real_stillness", "{:.0%}"),
)


def raw_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, whatever they hold; none where there is no file."""
    return path.read_bytes().splitlines() if path.exists() else []


def read_line(raw: bytes) -> dict[str, Any] | None:
    """Return a line's numbers by name (None: not finite); None where it is no such line."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(value is None or type(value) in (int, float) for value in line.values()):
        return None
    # What a summary needs of a step; a line of a validation has a loss of another name.
    needed = _SUMMED if "loss" in line else {"step"}
    return line if all(line.get(name) is not None for name in needed) else None


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Return the numbers of a run's steps."""
    return [line for line in map(read_line, raw_lines(run / "metrics.jsonl")) if line and "loss" in line]


def read_validations(run: Path) -> list[dict[str, Any]]:
    """Return the numbers of a run's validations; that before the first step is of step 0."""
    lines = map(read_line, raw_lines(run / "validation.jsonl"))
    return [line for line in lines if line and "validation_loss" in line]


def summarise(lines: Lines) -> dict[str, Any]:
    """Sum up a run's lines of metrics: of every logged step, null where a number was not finite."""
    timed = [line for line in lines if line["step"] in _TIMED] or lines
    losses = [(line["loss"], line["step"]) for line in lines if line["loss"] is not None]
    least, least_step = min(losses, default=(None, None))
    overall, last = _speed(lines), lines[-1] if lines else {}
    return {
        **_speed(timed),
        "timed_steps": [timed[0]["step"], timed[-1]["step"]] if timed else [],
        "seconds_per_step_overall": overall["seconds_per_step"],
        "samples_per_second_overall": overall["samples_per_second"],
        "final_loss": losses[-1][0] if losses else None,
        "least_loss": least,
        "least_loss_step": least_step,
        "mean_loss_of_last_tenth": mean_of(lines[-max(1, len(lines) // 10) :], "loss"),
        "peak_memory_bytes": max((line["peak_memory_bytes"] for line in lines), default=None),
        "data_wait_share": mean_of(timed, "data_wait_share"),
        "model_flops_utilisation": mean_of(timed, "model_flops_utilisation"),
        "skipped_videos": last.get("skipped_videos", 0),
        "skipped_steps": last.get("skipped_steps", 0),
    }


def _speed(lines: Lines) -> dict[str, float | None]:
    seconds = sum(line["seconds"] for line in lines)
    samples = sum(line["samples_per_second"] * line["seconds"] for line in lines)
    return {
        "seconds_per_step": seconds / len(lines) if lines else None,
        "samples_per_second": samples / seconds if lines else None,
    }


def mean_of(lines: Lines, name: str) -> float | None:
    """Return the mean of a number over the lines that have it."""
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) / len(values) if values else None


def held_out_table(validations: Lines) -> str | None:
    """Return how good a run became: its first validation, its last, and the real clips; None of less than two."""
    if len(validations) < 2:
        return None
    before, after = validations[0], validations[-1]
    began = "before training" if before["step"] == 0 else f"at step {before['step']}"
    rows: list[tuple[str, ...]] = [("held-out clips", began, f"at step {after['step']}", "real clips")]
    for name, key, real, form in _HELD_OUT:
        if key in after:
            numbers = (before.get(key), after.get(key), after.get(real or ""))
            rows.append((name, *("" if number is None else form.format(number) for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


class Curve:
    """Losses of a run of any length as at most 2,000 points: the longer it is, the more steps each is the mean of."""

    def __init__(self) -> None:
        self.steps_per_point = 1
        self.points: list[tuple[float, float]] = []  # step, loss
        self._waiting: list[tuple[float, float]] = []

    def add(self, step: int, loss: float) -> None:
        """Note a step; one whose loss is not finite is left out."""
        if math.isfinite(loss):
            self._waiting.append((step, loss))
        if len(self._waiting) == self.steps_per_point:
            self.points += _means(self._waiting, self.steps_per_point)
            self._waiting.clear()
        if len(self.points) == 2 * _MAX_POINTS:
            self.points = _means(self.points, 2)
            self.steps_per_point *= 2


def _means(points: Sequence[tuple[float, float]], number: int) -> list[tuple[float, float]]:
    """Return the means of so many neighbours at a time."""
    groups = [points[begin : begin + number] for begin in range(0, len(points), number)]
    return [(sum(step for step, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def draw_loss(curve: Curve, validations: Lines, path: Path) -> None:
    """Plot the loss of the steps, its mean over neighbours, and that of the validations."""
    from matplotlib.figure import Figure  # without pyplot, which would open windows, or close a notebook's

    points, each = curve.points, curve.steps_per_point
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_axes(points), color="0.8", label="a step" if each == 1 else f"mean of {each} steps")
    if (window := len(points) // 20) > 1:
        axes.plot(*_axes(_means(points, window)), label=f"mean of {window * each} steps")
    held_out = [(line["step"], line["validation_loss"]) for line in validations if line["validation_loss"] is not None]
    if held_out:
        axes.plot(*_axes(held_out), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _axes(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def draw_progress(run: Path, path: Path) -> None:
    """Put the first film strip of some validations below each other: how a video became what it is."""
    from PIL import Image, ImageDraw, ImageFont

    from flashi2v_data.video.strips import stack

    strips = sorted(run.glob("validation/step_*/strip_0.png"))
    if not strips:
        return
    last = len(strips) - 1
    chosen = sorted({round(number * last / (_MAX_STRIPS - 1)) for number in range(_MAX_STRIPS)})
    rows = []
    for strip in (strips[number] for number in chosen):
        title = Image.new("RGB", (400, 24), "white")
        step = int(strip.parent.name.removeprefix("step_"))
        ImageDraw.Draw(title).text((4, 4), f"step {step}", fill="black", font=ImageFont.load_default(14))
        with Image.open(strip) as picture:
            rows += [title, picture.convert("RGB")]
    with atomic_file(path) as temporary:
        stack(rows).save(temporary)
