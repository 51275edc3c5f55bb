"""What stands in for a call of the network that is not made: the polynomial through the last velocities.

B videos, C latent channels, F latent frames, H W latent grid.
"""

from torch import Tensor

from flashi2v_model.speed.choice import polynomial
from flashi2v_model.speed.plan import HIGHEST_ORDER


class Past:
    """The last velocities, (B, C, F, H, W) each, by their sigmas."""

    def __init__(self) -> None:
        self._known: list[tuple[float, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, sigma: float, velocity: Tensor) -> None:
        """Remember a velocity that was computed."""
        self._known = [*self._known, (sigma, velocity)][-HIGHEST_ORDER - 1 :]

    def at(self, sigma: float, order: int) -> Tensor:
        """Return the polynomial of an order at a sigma; a lower order where too few velocities are known."""
        last = self._known[-order - 1 :]
        weights = polynomial(sigma, [node for node, _ in last])
        total = last[-1][1] * weights[-1]
        for weight, (_, velocity) in zip(weights[:-1], last[:-1]):
            total = total + weight * velocity
        return total
