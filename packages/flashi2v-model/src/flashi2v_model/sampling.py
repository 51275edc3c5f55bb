"""From noise to a video's latent: the one sampling loop, free of files, text and images.

B videos, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from flashi2v_model.caching import text_kept
from flashi2v_model.errors import InputError
from flashi2v_model.scheduler import NUM_TIMESTEPS, inference_sigmas
from flashi2v_model.transformer import FlashI2VTransformer3DModel

Generators = torch.Generator | list[torch.Generator]

# From the state y (B, C, F, H, W) in fp32 and the timestep, a number, to the velocity, as y.
Velocity = Callable[[Tensor, Tensor], Tensor]

# Called after each step with its number, its timestep and the state; returns the state to go on with, None to stop.
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


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
        y = advance(velocity(y, exact), t, y, return_dict=False)[0]
        changed = on_step(step, t, y)
        if changed is None:
            break
        y = changed
    return y


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
        generator: for schedulers that draw noise along the way.
        progress: wraps the timesteps.
        on_step: observes, changes or ends the run.

    Returns:
        (B, C, F, H, W) in fp32, normalised latents.

    Raises:
        FloatingPointError: the result holds NaN or infinity.
    """
    velocity = velocity_field(
        transformer,
        condition,
        text,
        negative_text if guidance_scale > 1 else None,
        guidance_scale,
        low_freq_energy_ratio,
        cfg_batch=cfg_batch,
        conditioning=conditioning,
    )
    with text_kept(transformer):
        y = integrate(scheduler, velocity, noise, generator=generator, progress=progress, on_step=on_step)
    if not y.isfinite().all():
        raise FloatingPointError("sampling ended in NaN or infinity: use dtype bf16 or fp32 instead of fp16")
    return y


def velocity_field(
    transformer: FlashI2VTransformer3DModel,
    condition: Tensor,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
    low_freq_energy_ratio: float | Tensor,
    *,
    cfg_batch: bool,
    conditioning: Mapping[str, Tensor] | None = None,
) -> Velocity:
    """Return the field that is integrated. Arguments as of `denoise`; without `negative_text` nothing is guided."""
    copies = 2 if cfg_batch and negative_text is not None else 1
    texts = [text] if negative_text is None else [text, negative_text]
    if copies == 2:
        texts = [torch.cat(texts)]
        condition = condition.repeat(2, 1, 1, 1, 1)
        if isinstance(low_freq_energy_ratio, Tensor) and low_freq_energy_ratio.ndim:
            low_freq_energy_ratio = low_freq_energy_ratio.repeat(2)
        conditioning = {name: torch.cat((tensor, tensor)) for name, tensor in (conditioning or {}).items()}

    network: Callable[..., Any] = transformer
    if conditioning:
        network = partial(transformer, conditioning=conditioning)  # type: ignore[misc]

    def velocity(y: Tensor, timestep: Tensor) -> Tensor:
        noisy = y.repeat(copies, 1, 1, 1, 1) if copies > 1 else y
        t = timestep.expand(len(noisy))
        outputs = [network(noisy, t, states, condition, low_freq_energy_ratio, return_dict=False) for states in texts]
        velocities = torch.cat([output[0].float() for output in outputs])
        if negative_text is None:
            return velocities
        with_prompt, negative = velocities.chunk(2)
        return guided(with_prompt, negative, guidance_scale)

    return velocity


def guided(velocity: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
    """Return the velocity, away from that of the negative prompt."""
    return negative + guidance_scale * (velocity - negative)


def exact_timesteps(scheduler: SchedulerMixin) -> Tensor:
    """Return what the network is told, (S,): some schedulers round their own timesteps to whole numbers."""
    timesteps: Tensor = scheduler.timesteps
    if timesteps.is_floating_point():
        return timesteps
    return NUM_TIMESTEPS * scheduler.sigmas[: len(timesteps)].to(timesteps.device)
