"""From noise to a video's latent: the sampling loop, free of files, text and images.

B videos, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_model import FlashI2VTransformer3DModel, Guidance
from flashi2v_model.caching import SamplingCache
from flashi2v_model.scheduler import NUM_TIMESTEPS, inference_sigmas

Generators = torch.Generator | list[torch.Generator]

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


def denoise(
    transformer: FlashI2VTransformer3DModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    guidance: Guidance,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
    *,
    cfg_batch: bool = False,
    generator: Generators | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    on_step: OnStep = lambda step, timestep, y: y,
) -> Tensor:
    """Integrate the flow from noise to latents.

    The state y is never shifted: only the network sees y - s, and nothing is added back at the end. What the steps
    have in common (`SamplingCache`) is computed in the first.

    Args:
        transformer: the velocity network.
        scheduler: any flow-matching scheduler, its timesteps set.
        noise: (B, C, F, H, W), standard normal.
        guidance: of the first frames, from `flashi2v_model.guide`.
        text: (B, L, text_dim), the encoded prompts.
        negative_text: (B, L, text_dim), the encoded negative prompts; None where `guidance_scale` is at most 1.
        guidance_scale: g of v = v_negative + g * (v_text - v_negative), which is used above 1.
        cfg_batch: run both branches of guidance as one batch of 2 B, rather than one after the other.
        generator: for schedulers that draw noise along the way.
        progress: wraps the timesteps, for example in a progress bar.
        on_step: observes, changes or ends the run.

    Returns:
        (B, C, F, H, W) in fp32, normalised latents.

    Raises:
        FloatingPointError: the result holds NaN or infinity.

    Source: FlashI2V, arXiv 2509.25187, latent shifting at inference.
    """
    velocity = velocity_field(
        transformer,
        _exact_timesteps(scheduler),
        guidance,
        text,
        negative_text if guidance_scale > 1 else None,
        guidance_scale,
        cfg_batch=cfg_batch,
    )
    advance = _with_generator(scheduler.step, generator)
    y = noise.float()
    for step, t in enumerate(progress(scheduler.timesteps)):
        y = advance(velocity(step, y), t, y, return_dict=False)[0]
        changed = on_step(step, t, y)
        if changed is None:
            break
        y = changed
    if not y.isfinite().all():
        raise FloatingPointError("sampling ended in NaN or infinity: use dtype bf16 or fp32 instead of fp16")
    return y


def _exact_timesteps(scheduler: SchedulerMixin) -> Tensor:
    """Return what the network is told, (S,): some schedulers round their own timesteps to whole numbers."""
    timesteps: Tensor = scheduler.timesteps
    if timesteps.is_floating_point():
        return timesteps
    return NUM_TIMESTEPS * scheduler.sigmas[: len(timesteps)].to(timesteps.device)


def velocity_field(
    transformer: FlashI2VTransformer3DModel,
    timesteps: Tensor,
    guidance: Guidance,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
    *,
    cfg_batch: bool,
) -> Callable[[int, Tensor], Tensor]:
    """Return the field that is integrated: from a step's number and the state y to the guided velocity, as y in fp32.

    Its first call computes what all steps share. Arguments as of `denoise`; without `negative_text` nothing is guided.
    """
    cache = SamplingCache(timesteps)
    prompts = [(text, cache)]
    copies = 1
    if negative_text is not None:
        if cfg_batch:
            prompts, copies = [(torch.cat((text, negative_text)), cache)], 2
        else:
            prompts.append((negative_text, cache.other_prompt()))
    features = guidance.fourier.repeat(copies, 1, 1, 1, 1) if copies > 1 else guidance.fourier

    def velocity(step: int, y: Tensor) -> Tensor:
        x = (y - guidance.shift).repeat(copies, 1, 1, 1, 1)
        t = timesteps[step].expand(len(x))
        outputs = [
            transformer(x, t, context, features, return_dict=False, cache=cache.at(step))[0].float()
            for context, cache in prompts
        ]
        if negative_text is None:
            return outputs[0]
        v, v_negative = torch.cat(outputs).chunk(2)
        return v_negative + guidance_scale * (v - v_negative)

    return velocity


def _with_generator(step: Callable[..., Any], generator: Generators | None) -> Callable[..., Any]:
    takes_generator = "generator" in inspect.signature(step).parameters
    return partial(step, generator=generator) if takes_generator else step
