"""What a pipeline knows of its model's velocities, and which calls a plan leaves out of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from flashi2v_data.errors import InputError
from flashi2v_infer.settings import SamplingSettings
from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.sampling import check_falling
from flashi2v_model.speed.calibration import FILE, Calibration, read_calibration
from flashi2v_model.speed.choice import Calls, choose_calls
from flashi2v_model.speed.plan import SamplingPlan as SamplingPlan
from flashi2v_model.weights.fingerprint import fingerprint

logger = logging.getLogger(__name__)


def calibration_in(directories: Sequence[Path]) -> Calibration:
    """Return the calibration that lies beside a transformer, if it was made for these weights.

    Args:
        directories: where the weights may lie, or files of weights.

    Raises:
        InputError: there is none, or it cannot be used; the message says what to do.
    """
    places = [place.parent if place.is_file() else place for place in directories]
    place = next((place for place in places if (place / FILE).is_file()), None)
    try:
        return read_calibration(places, None if place is None else fingerprint(place))
    except ValueError as error:
        raise InputError(str(error)) from None


class SpeedMixin:
    """A pipeline that leaves calls of the network out, as a plan says."""

    transformer: FlashI2VTransformer3DModel
    scheduler: SchedulerMixin
    config: Any
    _calibration: Calibration | None = None

    def calibration(self) -> Calibration:
        """Return what is known of the model's velocities, from the file beside its transformer.

        Raises:
            InputError: there is none, or it is of other weights; the message says how to make one.
        """
        if self._calibration is None:
            own, whole = (Path(part.config.get("_name_or_path") or "") for part in (self.transformer, self))
            self._calibration = calibration_in((own, own / "transformer", whole / "transformer"))
        return self._calibration

    def _check_plan(self, plan: SamplingPlan) -> None:
        """Refuse a plan that leaves calls out of a model that is not calibrated."""
        if plan.skips:
            self.calibration()

    def _calls(self, plan: SamplingPlan, settings: SamplingSettings) -> Calls | None:
        """Return what every step does, once the scheduler's steps are set; None is the plain loop."""
        if plan.is_exact:
            return None
        if plan.skips and getattr(self.transformer, "peft_config", None):
            logger.warning("speed: the model was calibrated without adapters, so errors may be larger than predicted")
        return planned_calls(plan, self.calibration() if plan.skips else None, self.scheduler, settings)


def planned_calls(
    plan: SamplingPlan, calibration: Calibration | None, scheduler: SchedulerMixin, settings: SamplingSettings
) -> Calls:
    """Return what every step of a run does, once the scheduler's steps are set.

    Raises:
        InputError: nothing can stand in for another velocity with this scheduler.
    """
    try:
        check_falling(scheduler)
    except ValueError as error:
        raise InputError(str(error)) from None
    scale = settings.guidance_scale if settings.uses_negative_prompt else None
    return choose_calls(plan, calibration, scheduler.sigmas.tolist(), scale)
