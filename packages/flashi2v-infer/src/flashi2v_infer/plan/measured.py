"""What a run did take, beside what was planned."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from flashi2v_infer.plan.plan import Plan, gib, tera
from flashi2v_npu_ops.device import peak_memory, reset_peak_memory, synchronize


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        device: where.
        peak: bytes: allocated by PyTorch on an accelerator, resident in the process, libraries included, on the CPU.
        seconds_per_step: the median over all steps but each video's first, which warms up; None where no video had two.
    """

    device: torch.device
    peak: int
    seconds_per_step: float | None


class Meter:
    """Measures from its making on; hand `on_step_end` to every call of the pipeline as `callback_on_step_end`.

    Args:
        device: where the run computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._last = 0.0
        reset_peak_memory(device)

    def on_step_end(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Time a step, waiting for the device; `tensors` are given back as they are."""
        synchronize(self._device)
        now = time.perf_counter()
        if step:
            self._seconds.append(now - self._last)
        self._last = now
        return tensors

    def read(self) -> Measured:
        """Return what was measured so far."""
        return Measured(
            self._device, peak_memory(self._device), statistics.median(self._seconds) if self._seconds else None
        )


def comparison(plan: Plan, measured: Measured) -> str:
    """Return a table of what was planned and what was measured, and what each number counts."""
    on_cpu = measured.device.type == "cpu"
    seconds = measured.seconds_per_step
    rate = "" if seconds is None else f"{tera(plan.step_flops / seconds)}/s"
    lines = [
        "| | planned | measured |",
        "|---|---|---|",
        f"| peak memory | {gib(plan.peak)} | {gib(measured.peak)} |",
        f"| operations per step | {tera(plan.step_flops)} | |",
        f"| seconds per step | | {'' if seconds is None else f'{seconds:.3f}'} |",
        f"| operations per second | | {rate} |",
        "",
        "planned memory: weights and tensors; measured memory: "
        + (
            "all that was resident in this process on the CPU, Python and libraries included"
            if on_cpu
            else f"what PyTorch allocated on {measured.device}, kernels' workspace included"
        ),
    ]
    return "\n".join(lines)
