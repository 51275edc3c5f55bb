"""Exponential moving average of the weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange weights and shadows for a while, so that what runs meanwhile runs with the average."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.shadows[name])
            self.shadows[name].copy_(weights)
