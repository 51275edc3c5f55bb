"""Gradient clipping: the norm of a gradient that is spread over processes, and how much of it is kept."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def share_of_square(parameters: Iterable[nn.Parameter], num_holders: int, device: torch.device) -> Tensor:
    """Return what this process adds to the square of the gradient's norm; summed over all processes it is the square.

    Args:
        parameters: of this process; sharded, replicated or both.
        num_holders: processes that hold them, in shards or copies: all of a pipeline stage.
        device: of the result, a number in fp32.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        num_shards = 1
        if isinstance(gradient, DTensor):
            sizes = zip(gradient.placements, gradient.device_mesh.shape)
            num_shards = prod(size for placement, size in sizes if not placement.is_replicate())
        by_copies[num_holders // num_shards].append(_local(gradient))
    total = torch.zeros((), device=device)
    for copies, gradients in by_copies.items():
        norms = torch.stack(torch._foreach_norm(gradients))
        total += (norms.float().square().sum() / copies).to(device)
    return total


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients of this process by a factor, in place."""
    gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if factor == 0:  # which would keep what is not finite
        torch._foreach_zero_(gradients)
    else:
        torch._foreach_mul_(gradients, factor)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


@dataclass
class PlainClip:
    """Scale gradients longer than `max_norm` down to it."""

    max_norm: float

    def factor(self, norm: float) -> float:
        """Return what to multiply the gradient by."""
        return min(1.0, self.max_norm / (norm + 1e-6))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class AdaptiveClip:
    """Clip where a norm stands out from the past ones, and drop a gradient that stands out by far.

    The threshold is three standard deviations above the moving mean of past norms; gradients above five (and above
    20) are set to zero.  Clipped gradients do not move the mean.  As in the NPU release of FlashI2V.

    Args:
        max_norm: largest mean to start from.
        decay: of the moving mean and variance.
    """

    max_norm: float
    decay: float
    mean: float | None = None
    variance: float = 0.0

    def factor(self, norm: float) -> float:
        """Return what to multiply the gradient by, and learn from its norm."""
        first = self.mean is None
        if self.mean is None:
            self.mean = min(3 * norm, self.max_norm)
        threshold = self.mean + 3 * sqrt(self.variance)
        extreme = max(self.mean + 5 * sqrt(self.variance), 20.0)
        if norm > extreme:
            return 0.0
        if norm > threshold:
            return 1 / (norm / threshold + 1e-6)
        if first:
            return 1.0
        self.mean = self.decay * self.mean + (1 - self.decay) * norm
        self.variance = self.decay * self.variance + (1 - self.decay) * (self.mean - norm) ** 2
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {key: asdict(self)[key] for key in ("mean", "variance")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # A run that was clipped plainly before has no moments; they start anew.
        self.mean, self.variance = state.get("mean"), state.get("variance", 0.0)
