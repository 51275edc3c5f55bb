"""What a sampling run may leave out; nothing heavy is imported."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from flashi2v_model.errors import InputError

Preset: TypeAlias = Literal["exact", "balanced", "fast"]
Speed: TypeAlias = Preset | float
HIGHEST_ORDER = 2


@dataclass(frozen=True)
class SamplingPlan:
    """Which calls of the network a run may leave out, and how it is guided.

    A call that is left out has a stand-in, the polynomial in sigma through the last velocities that were computed.
    Calls are left out in the order of what the calibration of the model predicts that they cost, until one of the two
    limits is reached. `exact` is the plain loop, bit for bit.

    Attributes:
        times: at most so many times fewer calls than a run in which every step is computed, and guided.
        budget: at most so large an error of the latents, predicted, as a fraction of the latents themselves.
        order: of the polynomials, at most: 0 repeats the last velocity, 2 is a parabola.
        guided: sigmas between which there is guidance; the negative prompt takes no call outside. This makes another
            video, rather than nearly the same one.
        cfg_zero: CFG-Zero* (arXiv 2503.18886): the first step stands still, and the negative branch is scaled to fit
            the other. This makes another video, too.

    Raises:
        InputError: a number is out of range.
    """

    times: float = math.inf
    budget: float = math.inf
    order: int = HIGHEST_ORDER
    guided: tuple[float, float] = (0.0, 1.0)
    cfg_zero: bool = False

    def __post_init__(self) -> None:
        if not self.times >= 1:
            raise InputError(f"times must be at least 1, got {self.times}")
        if not self.budget >= 0:
            raise InputError(f"budget must be at least 0, got {self.budget}")
        if self.times == self.budget == math.inf:
            raise InputError("a plan needs a limit: set times, budget or both")
        if self.order not in range(HIGHEST_ORDER + 1):
            raise InputError(f"order must be 0 to {HIGHEST_ORDER}, got {self.order}")
        if len(self.guided) != 2 or not 0 <= self.guided[0] < self.guided[1] <= 1:
            raise InputError(f"guided must be two sigmas from 0 to 1, the lower one first, got {self.guided}")

    @property
    def is_exact(self) -> bool:
        """Whether the run is the plain loop."""
        return not self.skips and self.guided == (0.0, 1.0) and not self.cfg_zero

    @property
    def skips(self) -> bool:
        """Whether calls may be left out, for which the model has to be calibrated."""
        return self.times > 1 and self.budget > 0


PRESETS: dict[Preset, SamplingPlan] = {
    "exact": SamplingPlan(times=1.0),
    "balanced": SamplingPlan(budget=0.01),
    "fast": SamplingPlan(budget=0.03),
}


def read_speed(speed: str | float) -> Speed:
    """Return a speed as it is written: a preset, or so many times fewer calls; "2.5" and 2.5 are the same.

    Raises:
        InputError: it is neither.
    """
    if isinstance(speed, str) and speed in get_args(Preset):
        return speed  # type: ignore[return-value]  # no type checker narrows a string so
    try:
        times = float(speed)
    except (TypeError, ValueError):
        times = math.nan
    if isinstance(speed, bool) or not 1 <= times < math.inf:
        choices = ", ".join(get_args(Preset))
        raise InputError(f"speed must be one of {choices}, or a number from 1, so many times fewer calls; got {speed}")
    return "exact" if times == 1 else times


def plan_of(speed: SamplingPlan | str | float | None) -> SamplingPlan:
    """Return the plan of a speed; None is exact.

    Raises:
        InputError: there is no such speed.
    """
    if isinstance(speed, SamplingPlan):
        return speed
    found = read_speed("exact" if speed is None else speed)
    return PRESETS[found] if isinstance(found, str) else SamplingPlan(times=found)
