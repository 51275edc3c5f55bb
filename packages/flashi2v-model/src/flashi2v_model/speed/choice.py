"""Which calls a run makes, decided before it begins: from the calibration, the sigmas, the guidance and the plan alone.

So every sample, batch, seed and process has the same. S steps.

What a stand-in gets wrong is a weighted sum of velocities, and so is what all of them do to the final latents: the sum
over steps of the error times the step's width. The calibration knows how long such sums are. Starting from every call,
the one whose loss costs least is left out, again and again. That later calls see a state that is a little off is not
reckoned with; what was predicted is measured against the truth elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from flashi2v_model.speed.calibration import Calibration, Products, Vector
from flashi2v_model.speed.plan import SamplingPlan

# What a step does for one part of the velocity: None calls the network, an order is that of the polynomial that stands
# in, and NOTHING stands for a velocity of zero.
Act: TypeAlias = int | None
NOTHING = -1

TEXT, GUIDANCE = 0, 1


def polynomial(sigma: float, nodes: Sequence[float]) -> list[float]:
    """Return weights of values at `nodes` that give the polynomial through them, at `sigma` (Lagrange)."""
    return [math.prod((sigma - other) / (node - other) for other in nodes if other != node) for node in nodes]


@dataclass(frozen=True)
class Calls:
    """What every step of a run does.

    Attributes:
        text: the part of the velocity that belongs to the prompt, (S).
        guidance: how much it differs from that of the negative prompt, (S); empty without guidance.
        errors: predicted of each step's velocity, as a fraction of it, (S).
        error: predicted of the final latents, likewise.
        covered: errors are at most so many times the predicted ones, in 95 % of cases.
        cfg_zero: the negative branch is scaled to fit the other.
    """

    text: tuple[Act, ...]
    guidance: tuple[Act, ...]
    errors: tuple[float, ...] = ()
    error: float = 0.0
    covered: float = 0.0
    cfg_zero: bool = False

    @property
    def num_calls(self) -> int:
        """Of the network, of one branch each."""
        return sum(act is None for act in (*self.text, *self.guidance))

    @property
    def num_whole(self) -> int:
        """How many a run takes in which every step is computed, and guided."""
        return len(self.text) + len(self.guidance)


def choose_calls(
    plan: SamplingPlan, calibration: Calibration | None, sigmas: Sequence[float], guidance_scale: float | None
) -> Calls:
    """Decide which calls a run makes.

    Args:
        plan: what may be left out.
        calibration: of the model; None will do where the plan leaves nothing out.
        sigmas: (S + 1) of the run, falling, 0 behind its steps.
        guidance_scale: weight of the prompt; None without a negative prompt.
    """
    steps = range(len(sigmas) - 1)
    text: list[Act] = [NOTHING if plan.cfg_zero and i == 0 else None for i in steps]
    low, high = plan.guided
    guidance: list[Act] = []
    if guidance_scale is not None:
        guidance = [None if low <= sigmas[i] <= high and text[i] is None else NOTHING for i in steps]
    if not plan.skips or calibration is None:
        return Calls(tuple(text), tuple(guidance), cfg_zero=plan.cfg_zero)
    strength = 0.0 if guidance_scale is None else guidance_scale - 1
    run = _Run(calibration.at(sigmas), sigmas, strength, plan.order, (text, guidance))
    fewest = (len(text) + len(guidance)) / plan.times
    while run.num_calls > fewest and run.leave_out(plan.budget):
        pass
    return Calls(*run.acts(), run.errors(), run.error, calibration.covered, plan.cfg_zero)


@dataclass(frozen=True)
class _Loss:
    """What leaving a call out changes: acts and errors of some steps, and through them the final latents."""

    acts: dict[int, Act]
    wrong: dict[int, Vector]
    final: Vector
    square: float


class _Run:
    """A run from which calls are left out, one by one."""

    def __init__(
        self,
        products: Products,
        sigmas: Sequence[float],
        strength: float,
        order: int,
        parts: tuple[list[Act], list[Act]],
    ) -> None:
        self._products, self._sigmas, self._order, self._parts = products, sigmas, order, parts
        self._size, self._strengths = len(sigmas) - 1, (1.0, strength)
        # What stands for nothing by the plan is no error.
        self._fixed = [{i for i, act in enumerate(part) if act is not None} for part in parts]
        self._wrong: list[dict[int, Vector]] = [{}, {}]
        self._final = [0.0] * 2 * self._size  # the error of the latents
        self._pull = [0.0] * 2 * self._size  # its products with every velocity
        self._square = 0.0
        self._losses: dict[tuple[int, int], _Loss] = {}

    @property
    def num_calls(self) -> int:
        return sum(act is None for part in self._parts for act in part)

    @property
    def error(self) -> float:
        return math.sqrt(max(self._square, 0.0))

    def acts(self) -> tuple[tuple[Act, ...], tuple[Act, ...]]:
        return tuple(self._parts[TEXT]), tuple(self._parts[GUIDANCE])

    def errors(self) -> tuple[float, ...]:
        """Return the predicted errors of all steps."""
        found = []
        for i in range(self._size):
            wrong = dict(self._wrong[TEXT].get(i, {}))
            _add(wrong, self._wrong[GUIDANCE].get(i, {}), self._strengths[GUIDANCE])
            guided = bool(self._parts[GUIDANCE]) and i not in self._fixed[GUIDANCE]
            whole = {i: 1.0} | ({self._size + i: self._strengths[GUIDANCE]} if guided else {})
            found.append(math.sqrt(self._products.square(wrong) / self._products.square(whole)) if wrong else 0.0)
        return tuple(found)

    def leave_out(self, budget: float) -> bool:
        """Leave out the call whose loss costs least; return whether there was one that keeps the error in a budget."""
        best: tuple[float, tuple[int, int]] | None = None
        for part in (TEXT, GUIDANCE):
            for step in self._removable(part):
                loss = self._losses.get((part, step)) or self._loss(part, step)
                self._losses[part, step] = loss
                square = self._square + loss.square + 2 * sum(a * self._pull[i] for i, a in loss.final.items())
                if best is None or square < best[0]:
                    best = square, (part, step)
        if best is None or best[0] > budget * budget:
            return False
        self._apply(*best[1])
        return True

    def _removable(self, part: int) -> list[int]:
        made = [i for i, act in enumerate(self._parts[part]) if act is None]
        # Guidance is the difference of two calls.
        needed = {i for i, act in enumerate(self._parts[GUIDANCE]) if act is None} if part == TEXT else set()
        return [i for i in made[1:] if i not in needed]

    def _loss(self, part: int, step: int) -> _Loss:
        """Work out what leaving out the call of a step changes."""
        made = [i for i, act in enumerate(self._parts[part]) if act is None and i != step]
        later = [i for i in made if i > step]
        end = later[self._order] if len(later) > self._order else self._size  # from there on nobody looks back here
        acts: dict[int, Act] = {}
        wrong: dict[int, Vector] = {}
        final: dict[int, float] = {}
        for i in range(step, end):
            if i in made or i in self._fixed[part]:
                continue
            acts[i], wrong[i] = self._stand_in(part, i, [node for node in made if node < i][-self._order - 1 :])
            width = (self._sigmas[i + 1] - self._sigmas[i]) * self._strengths[part]
            _add(final, wrong[i], width)
            _add(final, self._wrong[part].get(i, {}), -width)
        return _Loss(acts, wrong, final, self._products.square(final))

    def _stand_in(self, part: int, step: int, nodes: Sequence[int]) -> tuple[Act, Vector]:
        """Return which polynomial does best at a step, and what it gets wrong."""
        first = part * self._size
        best: tuple[float, Act, Vector] | None = None
        for order in range(NOTHING if part == GUIDANCE else 0, len(nodes)):
            last = nodes[len(nodes) - 1 - order :] if order >= 0 else []
            weights = polynomial(self._sigmas[step], [self._sigmas[node] for node in last])
            wrong = {first + step: -1.0, **{first + node: weight for node, weight in zip(last, weights)}}
            square = self._products.square(wrong)
            if best is None or square < best[0]:
                best = square, order, wrong
        assert best is not None
        return best[1], best[2]

    def _apply(self, part: int, step: int) -> None:
        loss = self._losses[part, step]
        for i, act in loss.acts.items():
            self._parts[part][i] = act
        self._wrong[part] |= loss.wrong
        for i, weight in loss.final.items():
            self._final[i] += weight
        for i, row in enumerate(self._products.values):
            self._pull[i] += sum(weight * row[j] for j, weight in loss.final.items())
        self._square = sum(weight * pull for weight, pull in zip(self._final, self._pull))
        # What a call looks back at, or is looked back at from, is this many calls away.
        made = [i for i, act in enumerate(self._parts[part]) if act is None]
        before = [i for i in made if i < step][-self._order - 2 :]
        after = [i for i in made if i > step][: self._order + 2]
        near = range(min(before, default=0), max(after, default=self._size) + 1)
        self._losses = {key: kept for key, kept in self._losses.items() if key[0] != part or key[1] not in near}


def _add(total: dict[int, float], vector: Vector, weight: float) -> None:
    for i, value in vector.items():
        total[i] = total.get(i, 0.0) + weight * value


def as_record(calls: Calls, made: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Return what a video's record says of its calls.

    Args:
        calls: that were planned.
        made: of each step that took place, whether the network was called for the prompt and for the negative prompt.
    """
    branches = {"prompt": [step[0] for step in made]}
    if calls.guidance:
        branches["negative_prompt"] = [step[1] for step in made]
    steps: Mapping[str, Any] = {
        name: {
            "called": [i for i, was in enumerate(branch) if was],
            "skipped": [i for i, was in enumerate(branch) if not was],
        }
        for name, branch in branches.items()
    }
    return {
        "calls": steps,
        "num_calls": sum(sum(step) for step in made),
        "num_calls_exact": calls.num_whole,
        "predicted_error": round(calls.error, 6),
        "predicted_step_errors": [round(error, 6) for error in calls.errors],
        "covered_by": calls.covered,
    }
