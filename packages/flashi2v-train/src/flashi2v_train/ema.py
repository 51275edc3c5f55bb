"""Exponential moving average of the weights."""

from collections.abc import Iterable

import torch
from torch import nn


class EMA:
    """fp32 shadows of all parameters, sharded as the parameters are.

    Args:
        parameters: (name, parameter) pairs; the shadows start as copies.
        decay: share of the shadow that stays at each update.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self._parameters = dict(parameters)
        self.shadows = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every shadow: shadow -= (1 - decay) * (shadow - parameter)."""
        for name, parameter in self._parameters.items():
            self.shadows[name].lerp_(parameter.detach().float(), 1 - self.decay)
