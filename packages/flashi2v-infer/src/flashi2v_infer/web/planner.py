"""What a video will take, told before it is asked for: memory and operations of a plan, time from the last video."""

from functools import lru_cache

from flashi2v_infer.plan.plan import Plan, gib, make_plan, target_device, tera
from flashi2v_infer.plan.skeleton import Parts, parts_of
from flashi2v_infer.settings import SamplingSettings
from flashi2v_infer.web.jobs import Jobs
from flashi2v_infer.web.schema import request_of
from flashi2v_infer.web.worker import Setup


class Planner:
    """Plans videos of one model; nothing is loaded.

    Args:
        setup: of the workers.
        jobs: the queue, whose last video tells how fast the device is.
    """

    def __init__(self, setup: Setup, jobs: Jobs) -> None:
        self._model, self._scheduler, self._jobs = setup.model(), setup.scheduler or "euler", jobs
        self._parts: Parts | None = None
        self.plan = lru_cache(64)(self._plan)

    def _plan(self, settings: SamplingSettings) -> Plan:
        device_type, free = target_device(self._model.device_name)
        if self._parts is None:
            self._parts = parts_of(self._model, device_type)
        calls, execution = self._model.calls(settings), self._model.execution
        return make_plan(self._parts, settings, execution, device_type, free, scheduler=self._scheduler, calls=calls)

    def tell(self, settings: SamplingSettings) -> str:
        """Return memory, operations and seconds in one line.

        Raises:
            InputError: it cannot be planned.
        """
        plan = self.plan(settings)
        flops = sum(stage.flops for stage in plan.stages)
        words = f"{gib(plan.peak)} of memory, {tera(flops)}"
        last = self._jobs.last_done()
        if last is None or not last.started or not last.ended:
            return f"{words}; how long that takes is known after the first video"
        rate = sum(stage.flops for stage in self.plan(request_of(last).settings).stages) / (last.ended - last.started)
        return f"{words}, about {flops / rate:.3g} s by the speed of the last video"
