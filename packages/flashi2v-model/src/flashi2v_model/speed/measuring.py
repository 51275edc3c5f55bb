"""How velocities hang together, measured on runs that are computed whole; and whether predictions hold.

B videos, C latent channels, F latent frames, H W latent grid, S steps, V velocities.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from flashi2v_model.errors import InputError
from flashi2v_model.sampling import VelocityField, guided, set_timesteps
from flashi2v_model.speed.calibration import Calibration, Products
from flashi2v_model.speed.choice import NOTHING, Calls, choose_calls, polynomial
from flashi2v_model.speed.plan import PRESETS
from flashi2v_model.transformer import FlashI2VTransformer3DModel

# Of the ratios between true and predicted errors in the calibrated runs, a little more than the 95 % that are promised.
_QUANTILE = 0.975
_BLOCK = 2**16  # numbers of each velocity that are turned to fp64 at once


@dataclass(frozen=True)
class Start:
    """What some videos start from, as of `sampling.denoise`; B are computed at once, and measured one by one."""

    noise: Tensor
    condition: Tensor
    text: Tensor
    negative_text: Tensor | None
    low_freq_energy_ratio: float = 0.1
    conditioning: Mapping[str, Tensor] | None = None

    def field(
        self, network: FlashI2VTransformer3DModel, guidance_scale: float, calls: Calls | None = None
    ) -> "_Watched":
        """Return the field that the run follows."""
        return _Watched(
            network,
            self.condition,
            self.text,
            self.negative_text,
            guidance_scale,
            self.low_freq_energy_ratio,
            conditioning=self.conditioning,
            calls=calls,
        )


class _Watched(VelocityField):
    """A field that computes every step whole, whatever it goes on with."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # as of the field
        self.text_parts, self.guidance_parts = list[Tensor](), list[Tensor]()
        self.taken = list[Tensor]()

    def __call__(self, y: Tensor, timestep: Tensor) -> Tensor:
        velocity, negative = self.branches(y, timestep)
        self.text_parts.append(velocity.cpu())
        if negative is not None:
            self.guidance_parts.append((velocity - negative).cpu())
        if self._calls is not None:
            found = super().__call__(y, timestep)
        else:
            found = velocity if negative is None else guided(velocity, negative, self.guidance_scale)
            self._step, self._last = self._step + 1, (y, timestep, found)
        self.taken.append(found.cpu())
        return found


class _Sums(NamedTuple):
    """Products of all velocities of one video, (V, V) in fp64: of them whole, and of what changes over their frames."""

    whole: Tensor
    moving: Tensor
    energies: tuple[float, float]


@torch.no_grad()
def calibrate(
    transformer: FlashI2VTransformer3DModel,
    scheduler: SchedulerMixin,
    starts: Iterable[Start],
    num_steps: int,
    guidance_scale: float,
    *,
    weights: str,
    made_from: str,
) -> Calibration:
    """Calibrate a model on some videos, at least two; all velocities of a start lie in the CPU's memory at a time.

    Args:
        transformer: the velocity network.
        scheduler: of the runs.
        starts: what the videos start from, with negative texts.
        num_steps: S.
        guidance_scale: of the runs, above 1.
        weights: fingerprint of the transformer.
        made_from: in words, what the runs were.

    Raises:
        InputError: there are fewer than two videos, they are not guided, or all velocities are zero.
        FloatingPointError: a run ended in NaN or infinity.
    """
    sums = []
    for start in starts:
        if start.negative_text is None or guidance_scale <= 1:
            raise InputError("calibration needs guided runs: set guidance_scale above 1")
        set_timesteps(scheduler, num_steps, start.noise.device)
        sums += _sums(transformer, scheduler, start, guidance_scale)
    if len(sums) < 2:
        raise InputError(f"calibration needs at least 2 pictures with prompts, got {len(sums)}")
    energies = (_mean([one.energies[0] for one in sums]), _mean([one.energies[1] for one in sums]))
    products = [_joined(one, energies) for one in sums]
    sigmas = scheduler.sigmas.tolist()
    mean = torch.stack(products).mean(0)
    if not bool((mean.diagonal() > 0).all()):
        raise InputError("the network answers with zeros: these are not the weights of a trained model")
    rows = [row[: i + 1] for i, row in enumerate(mean.tolist())]
    found = Calibration(
        weights=weights,
        made_from=made_from,
        guidance_scale=float(guidance_scale),
        sigmas=sigmas,
        energies=energies,
        covered=1.0,
        products=rows,
    )
    ratios = list[float]()
    for plan in PRESETS.values():
        calls = choose_calls(plan, found, sigmas, guidance_scale)
        ratios += _ratios(calls, sigmas, guidance_scale, products)
    return found.model_copy(update={"covered": _quantile(ratios)})


def _sums(
    transformer: FlashI2VTransformer3DModel, scheduler: SchedulerMixin, start: Start, guidance_scale: float
) -> list[_Sums]:
    field = start.field(transformer, guidance_scale)
    ends = field.follow(scheduler, start.noise).cpu()
    parts = [*field.text_parts, *field.guidance_parts]
    return [_products([part[i] for part in parts], end) for i, end in enumerate(ends)]


def _products(parts: Sequence[Tensor], end: Tensor) -> _Sums:
    """Return what is known of the velocities of a video that ends in some latents, (C, F, H, W) all."""
    size = len(parts)
    whole = torch.zeros(size, size, dtype=torch.float64)
    flat = [part.flatten() for part in parts]
    for first in range(0, len(flat[0]), _BLOCK):
        block = torch.stack([part[first : first + _BLOCK] for part in flat]).double()  # (V, numbers)
        whole += block @ block.T
    still = torch.stack([part.mean(1).flatten() for part in parts]).double()  # (V, C H W)
    # What does not change is the same in every frame.
    moving = whole - end.shape[1] * (still @ still.T)
    return _Sums(whole, moving, _energies(end))


def _energies(latents: Tensor) -> tuple[float, float]:
    """Return the square sum of latents (C, F, H, W), and of what changes in them from frame to frame."""
    moving = latents.double() - latents.double().mean(1, keepdim=True)
    return float(latents.double().square().sum()), float(moving.square().sum())


def _joined(sums: _Sums, energies: tuple[float, float]) -> Tensor:
    """Return the products that a `Calibration` holds, of one run: (V, V)."""
    whole, moving = energies
    return (sums.whole / whole + sums.moving / moving) / 2 if moving > 0 else sums.whole / whole


def _ratios(calls: Calls, sigmas: Sequence[float], scale: float, products: Sequence[Tensor]) -> list[float]:
    """Return true by predicted error of every stand-in in every run; each is predicted from the other runs."""
    total, found = torch.stack(list(products)).sum(0), []
    pairs = list(_stand_in_vectors(calls, sigmas, scale))
    for own in products:
        others = Products(((total - own) / (len(products) - 1)).tolist())
        here = Products(own.tolist())
        for wrong, whole in pairs:
            predicted = math.sqrt(others.square(wrong) / others.square(whole))
            if predicted > 0:
                found.append(math.sqrt(here.square(wrong) / here.square(whole)) / predicted)
    return found


def _stand_in_vectors(
    calls: Calls, sigmas: Sequence[float], scale: float
) -> Iterable[tuple[dict[int, float], dict[int, float]]]:
    """Yield what each step with a stand-in gets wrong, and the velocity that it should be."""
    size = len(calls.text)
    for step in range(size):
        wrong: dict[int, float] = {}
        for first, acts, strength in ((0, calls.text, 1.0), (size, calls.guidance, scale - 1)):
            if not acts or (act := acts[step]) is None:
                continue
            made = [i for i in range(step) if acts[i] is None]
            nodes = made[len(made) - 1 - act :] if act != NOTHING else []
            weights = polynomial(sigmas[step], [sigmas[node] for node in nodes])
            wrong[first + step] = -strength
            wrong |= {first + node: strength * weight for node, weight in zip(nodes, weights)}
        if wrong:
            yield wrong, {step: 1.0, size + step: scale - 1}


class Compared(NamedTuple):
    """A stand-in beside the velocity that the network has for the same state, errors as fractions of it."""

    step: int
    predicted: float
    true: float


@torch.no_grad()
def compare(
    transformer: FlashI2VTransformer3DModel,
    scheduler: SchedulerMixin,
    start: Start,
    guidance_scale: float,
    calibration: Calibration,
    calls: Calls,
) -> list[Compared]:
    """Follow a plan, and compute the truth beside every stand-in; arguments as of `calibrate`."""
    field = start.field(transformer, guidance_scale, calls)
    set_timesteps(scheduler, len(calls.text), start.noise.device)
    field.follow(scheduler, start.noise)
    found = []
    for step, error in enumerate(calls.errors):
        if error > 0:
            true = field.text_parts[step]
            if field.guidance_parts:
                true = true + (guidance_scale - 1) * field.guidance_parts[step]
            for wrong, whole in zip(field.taken[step] - true, true):
                lengths = (_length(part, calibration.energies) for part in (wrong, whole))
                found.append(Compared(step, error, next(lengths) / next(lengths)))
    return found


def _length(latents: Tensor, energies: tuple[float, float]) -> float:
    """Return the length of something like latents, as the products of a calibration measure it."""
    parts = [own / of for own, of in zip(_energies(latents), energies) if of > 0]
    return math.sqrt(_mean(parts))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _quantile(values: Sequence[float]) -> float:
    """Return a number that all but a few of the values are at most, and 1 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(_QUANTILE * len(ordered)) - 1)] if ordered else 1.0
