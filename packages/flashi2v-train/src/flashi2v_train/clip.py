"""Gradient clipping: how much of a gradient is kept, given its norm."""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any


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
