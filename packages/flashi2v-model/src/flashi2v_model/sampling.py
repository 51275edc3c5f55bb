"""From noise to a video's latent: the one sampling loop, free of files, text and images.

B videos, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flashi2v_model.acceleration import check_guided, needs_one_call, skips_work
from flashi2v_model.caching import conditions_kept
from flashi2v_model.errors import InputError
from flashi2v_model.scheduler import NUM_TIMESTEPS, inference_sigmas
from flashi2v_model.speed.choice import NOTHING, Calls
from flashi2v_model.speed.stand_ins import Past
from flashi2v_model.transformer import FlashI2VTransformer3DModel

Generators = torch.Generator | list[torch.Generator]

# From the state y (B, C, F, H, W) in fp32 and the timestep, a number, to the velocity, as y.
Velocity = Callable[[Tensor, Tensor], Tensor]

# Called after each step with its number, its timestep and the state; returns the state to go on with, None to stop.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]

# Older versions of diffusers tell caches nothing but the name of the branch.
_TELLS_POSITION = "kwargs" in inspect.signature(CacheMixin.cache_context).parameters


def set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> None:
    """Lay out a run of `num_steps`, with the reference's sigmas where the scheduler lets us choose them.

    Raises:
        InputError: the scheduler does not integrate a flow.
    """
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction" or not config.get("use_flow_sigmas", True):
        raise InputError(
            f"{name} is set up for {prediction!r}, the network predicts a flow: use FlowMatchEulerDiscreteScheduler, "
            "or give the scheduler prediction_type='flow_prediction', use_flow_sigmas=True and flow_shift"
        )
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        # An array, as some schedulers compute with what they are given.
        scheduler.set_timesteps(sigmas=np.array(inference_sigmas(num_steps)), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    if scheduler.sigmas[-1] != 0:
        raise InputError(
            f"{name} would stop at sigma {scheduler.sigmas[-1]:.2g}, with noise left: give it final_sigmas_type='zero'"
        )


def integrate(
    scheduler: SchedulerMixin,
    velocity: Velocity,
    noise: Tensor,
    *,
    generator: Generators | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    on_step: OnStep = lambda step, timestep, y: y,
) -> Tensor:
    """Integrate a flow from noise.

    Args:
        scheduler: any flow-matching scheduler, its timesteps set.
        velocity: the field.
        noise: (B, C, F, H, W), standard normal.
        generator: for schedulers that draw noise along the way.
        progress: wraps the timesteps, for example in a progress bar.
        on_step: observes, changes or ends the run.

    Returns:
        (B, C, F, H, W) in fp32.
    """
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    advance = partial(scheduler.step, generator=generator) if takes_generator else scheduler.step
    y = noise.float()
    for step, (t, exact) in enumerate(zip(progress(scheduler.timesteps), exact_timesteps(scheduler))):
        found = velocity(y, exact)
        with _SolveOnCPU():
            y = advance(found, t, y, return_dict=False)[0]
        changed = on_step(step, t, y)
        if changed is None:
            break
        y = changed
    return y


class _SolveOnCPU(TorchFunctionMode):
    """Solves small systems of equations, as UniPC's, on the CPU: not every device has a kernel for that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.linalg.solve:
            return func(*args, **(kwargs or {}))
        matrix, right = args
        return func(matrix.cpu(), right.cpu()).to(right.device)


def denoise(
    transformer: FlashI2VTransformer3DModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    condition: Tensor,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
    low_freq_energy_ratio: float | Tensor = 0.1,
    *,
    cfg_batch: bool = False,
    conditioning: Mapping[str, Tensor] | None = None,
    calls: Calls | None = None,
    generator: Generators | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    on_step: OnStep = lambda step, timestep, y: y,
) -> Tensor:
    """Sample latents that start with given frames. What the steps have in common of the text is computed once.

    Args:
        transformer: the velocity network.
        scheduler: as of `integrate`, and `noise`, `generator`, `progress`, `on_step` likewise.
        noise: (B, C, F, H, W), standard normal.
        condition: (B, C, 1, H, W), the normalised latents of the first frames.
        text: (B, L, text_dim), the encoded prompts.
        negative_text: (B, L, text_dim), the encoded negative prompts; None where `guidance_scale` is at most 1.
        guidance_scale: g of v = v_negative + g * (v_text - v_negative), which is used above 1.
        low_freq_energy_ratio: in [0, 1], one number or (B,): where the high frequencies of the first frames start.
        cfg_batch: run both branches of guidance as one batch of 2 B, rather than one after the other.
        conditioning: what a variant of the network asks for, (B, ...) each, by name.
        calls: which steps call the network, and what stands in elsewhere; None calls it in every step.
        generator: for schedulers that draw noise along the way.
        progress: wraps the timesteps.
        on_step: observes, changes or ends the run.

    Returns:
        (B, C, F, H, W) in fp32, normalised latents.

    Raises:
        FloatingPointError: the result holds NaN or infinity.
    """
    field = VelocityField(
        transformer,
        condition,
        text,
        negative_text,
        guidance_scale,
        low_freq_energy_ratio,
        cfg_batch=cfg_batch,
        conditioning=conditioning,
        calls=calls,
    )
    return field.follow(scheduler, noise, generator=generator, progress=progress, on_step=on_step)


class VelocityField:
    """The network as a field of velocities: what a sampling run integrates. Arguments are those of `denoise`.

    Attributes:
        text: may be changed between two steps, as the next two may.
        negative_text: None: nothing is guided.
        guidance_scale: up to 1 nothing is guided.
        made: of each step so far, whether the network was called with the text, and with the negative text.
    """

    def __init__(
        self,
        transformer: FlashI2VTransformer3DModel,
        condition: Tensor,
        text: Tensor,
        negative_text: Tensor | None = None,
        guidance_scale: float = 1.0,
        low_freq_energy_ratio: float | Tensor = 0.1,
        *,
        cfg_batch: bool = False,
        conditioning: Mapping[str, Tensor] | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        calls: Calls | None = None,
    ) -> None:
        self.made = list[tuple[bool, bool]]()
        self._calls, self._past = calls, (Past(), Past())
        self.text, self.negative_text, self.guidance_scale = text, negative_text, guidance_scale
        self._transformer = transformer
        self._one_call = cfg_batch or needs_one_call(transformer)
        self._inputs: dict[str, Any] = {"condition": condition, "low_freq_energy_ratio": low_freq_energy_ratio}
        if conditioning:
            self._inputs["conditioning"] = dict(conditioning)
        if attention_kwargs:
            self._inputs["attention_kwargs"] = dict(attention_kwargs)
        self._inputs_of_both: dict[str, Any] | None = None
        self._both: tuple[Tensor, Tensor, Tensor] | None = None  # (negative text, text, both as one batch)
        self._step, self._sigmas = 0, list[float]()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # (state, timestep, velocity)

    @property
    def denoised(self) -> Tensor:
        """Where the last velocity leads in a straight line, (B, C, F, H, W): the estimate of the end of the run."""
        assert self._last is not None
        y, timestep, velocity = self._last
        return y - timestep / NUM_TIMESTEPS * velocity

    @property
    def is_guided(self) -> bool:
        """Whether there is a branch with the negative text."""
        return self.guidance_scale > 1 and self.negative_text is not None

    def follow(
        self,
        scheduler: SchedulerMixin,
        noise: Tensor,
        *,
        generator: Generators | None = None,
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
        on_step: OnStep = lambda step, timestep, y: y,
    ) -> Tensor:
        """Return where the field leads from noise; arguments, result and errors as of `denoise`."""
        check_guided(self._transformer, self.is_guided)
        if self._calls is not None:
            check_plannable(self._transformer, scheduler)
        self._step, self._sigmas = 0, scheduler.sigmas.tolist()
        self.made = []
        self.forget()

        def observed(step: int, timestep: Tensor, y: Tensor) -> Tensor | None:
            texts = self.text, self.negative_text
            changed = on_step(step, timestep, y)
            if changed is not y or texts[0] is not self.text or texts[1] is not self.negative_text:
                self.forget()
            return changed

        with conditions_kept(self._transformer):
            y = integrate(scheduler, self, noise, generator=generator, progress=progress, on_step=observed)
        if not y.isfinite().all():
            raise FloatingPointError("sampling ended in NaN or infinity: use dtype bf16 or fp32 instead of fp16")
        return y

    def __call__(self, y: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity, (B, C, F, H, W), of the state y at a timestep, a number."""
        if self._calls is None:
            velocity, negative = self.branches(y, timestep)
            if negative is not None:
                velocity = guided(velocity, negative, self.guidance_scale)
            self.made.append((True, negative is not None))
        else:
            velocity = self._planned(self._calls, y, timestep)
        self._step, self._last = self._step + 1, (y, timestep, velocity)
        return velocity

    def branches(self, y: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the velocity with the text, and with the negative text where that guides, as `__call__` takes them."""
        times = timestep.expand(len(y))
        if self.negative_text is None or not self.is_guided:
            return self._call("cond", y, times, self.text, self._inputs), None
        if self._one_call:
            # The same tensors in every step, so that what depends on them alone is known again.
            self._inputs_of_both = self._inputs_of_both or _twice(self._inputs)
            texts = self._both_texts(self.negative_text)
            times = timestep.expand(2 * len(y))
            twice = self._call("cond", y.repeat(2, 1, 1, 1, 1), times, texts, self._inputs_of_both)
            negative, velocity = twice.chunk(2)
        else:
            velocity = self._call("cond", y, times, self.text, self._inputs)
            negative = self._call("uncond", y, times, self.negative_text, self._inputs)
        return velocity, negative

    def forget(self) -> None:
        """Let nothing stand in for the next calls: the state or the text is another than they would have led to."""
        self._past = (Past(), Past())

    def _planned(self, calls: Calls, y: Tensor, timestep: Tensor) -> Tensor:
        """Return the velocity with the stand-ins that a plan has for this step."""
        sigma, (text, guidance) = self._sigmas[self._step], self._past
        act = calls.text[self._step]
        other = calls.guidance[self._step] if self.is_guided and calls.guidance else NOTHING
        if act == NOTHING:  # and so is the guidance
            self.made.append((False, False))
            return torch.zeros_like(y)
        negative: Tensor | None = None
        if other is None or (other != NOTHING and not guidance):
            velocity, negative = self.branches(y, timestep)
            assert negative is not None
            text.add(sigma, velocity)
            guidance.add(sigma, velocity - negative)
            self.made.append((True, True))
        else:
            called = act is None or not text
            if act is None or not text:
                velocity = self._call("cond", y, timestep.expand(len(y)), self.text, self._inputs)
                text.add(sigma, velocity)
            else:
                velocity = text.at(sigma, act)
            if other != NOTHING:
                negative = velocity - guidance.at(sigma, other)
            self.made.append((called, False))
        if negative is None:
            return velocity
        combine = guided_zero if calls.cfg_zero else guided
        return combine(velocity, negative, self.guidance_scale)

    def _call(self, branch: str, y: Tensor, times: Tensor, text: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        # By name, and the negative text first, as hooks of diffusers expect.
        with self._transformer.cache_context(branch, **self._position()):
            output = self._transformer(
                hidden_states=y,
                timestep=times,
                encoder_hidden_states=text,
                return_dict=False,
                **inputs,
            )
        return output[0].float()

    def _both_texts(self, negative: Tensor) -> Tensor:
        """Return both texts in one batch, the same one as long as they are the same."""
        if self._both is None or self._both[0] is not negative or self._both[1] is not self.text:
            self._both = negative, self.text, torch.cat((negative, self.text))
        return self._both[2]

    def _position(self) -> dict[str, Any]:
        """Return what caches may want to know of where the run is."""
        if not (_TELLS_POSITION and self._sigmas):
            return {}
        steps = len(self._sigmas) - 1
        return {"step_index": self._step, "sigma": self._sigmas[self._step], "num_inference_steps": steps}


def _twice(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs for a batch and the same batch again."""
    condition, ratio = inputs["condition"], inputs["low_freq_energy_ratio"]
    changed: dict[str, Any] = {"condition": torch.cat((condition, condition))}
    if isinstance(ratio, Tensor) and ratio.ndim:
        changed["low_freq_energy_ratio"] = torch.cat((ratio, ratio))
    if "conditioning" in inputs:
        changed["conditioning"] = {name: torch.cat((x, x)) for name, x in inputs["conditioning"].items()}
    return {**inputs, **changed}


def guided(velocity: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Return the velocity, away from that of the negative prompt."""
    return negative + guidance_scale * (velocity - negative)


def guided_zero(velocity: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Return the same of the negative velocity scaled, per video, to be as near to the other as it can (CFG-Zero*)."""
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale  # with all other guiders

    scale = cfg_zero_star_scale(velocity.flatten(1), negative.flatten(1)).view(-1, 1, 1, 1, 1)
    return guided(velocity, scale * negative, guidance_scale)


def check_plannable(transformer: FlashI2VTransformer3DModel, scheduler: SchedulerMixin) -> None:
    """Refuse what a plan's stand-ins do not fit.

    Raises:
        InputError: a cache of diffusers leaves out work of its own, or as of `check_falling`.
    """
    if skips_work(transformer):
        raise InputError(
            "speed: a cache of diffusers is enabled too, and neither knows of the other: call disable_cache(), or "
            "leave speed at exact"
        )
    check_falling(scheduler)


def check_falling(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler, its timesteps set, whose steps do not follow one path from noise to a video.

    Raises:
        InputError: it draws noise on the way, or comes back to a noise level.
    """
    name, config, sigmas = type(scheduler).__name__, scheduler.config, scheduler.sigmas.tolist()
    draws = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type")) or "LCM" in name
    if draws or any(first <= second for first, second in itertools.pairwise(sigmas)):
        raise InputError(
            f"speed: {name} draws noise on the way, or looks twice at a noise level, and no velocity can stand in for "
            "another then: choose the scheduler euler, unipc or dpm++, or leave speed at exact"
        )


def exact_timesteps(scheduler: SchedulerMixin) -> Tensor:
    """Return what the network is told, (S,): some schedulers round their own timesteps to whole numbers."""
    timesteps: Tensor = scheduler.timesteps
    if timesteps.is_floating_point():
        return timesteps
    return NUM_TIMESTEPS * scheduler.sigmas[: len(timesteps)].to(timesteps.device)
