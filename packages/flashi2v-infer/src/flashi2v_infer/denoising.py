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
from flashi2v_model.scheduler import inference_sigmas

Generators = torch.Generator | list[torch.Generator]


def set_timesteps(scheduler: SchedulerMixin, num_steps: int, device: torch.device) -> None:
    """Lay out a run of `num_steps`, with the reference's sigmas where the scheduler lets us choose them.

    Raises:
        InputError: the scheduler does not integrate a flow.
    """
    prediction = scheduler.config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise InputError(
            f"{type(scheduler).__name__} expects {prediction!r} from the network, which predicts a flow: use a "
            "flow-matching scheduler, such as diffusers' FlowMatchEulerDiscreteScheduler"
        )
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        # An array, as some schedulers compute with what they are given.
        scheduler.set_timesteps(sigmas=np.array(inference_sigmas(num_steps)), device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)


def denoise(
    transformer: FlashI2VTransformer3DModel,
    scheduler: SchedulerMixin,
    noise: Tensor,
    guidance: Guidance,
    text: Tensor,
    negative_text: Tensor | None,
    guidance_scale: float,
    *,
    generator: Generators | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """Integrate the flow from noise to latents.

    The state y is never shifted: only the network sees y - s, and nothing is added back at the end.

    Args:
        transformer: the velocity network.
        scheduler: any flow-matching scheduler, its timesteps set.
        noise: (B, C, F, H, W), standard normal.
        guidance: of the first frames, from `flashi2v_model.guide`.
        text: (B, L, text_dim), the encoded prompts.
        negative_text: (B, L, text_dim), the encoded negative prompts; None where `guidance_scale` is at most 1.
        guidance_scale: g of v = v_negative + g * (v_text - v_negative), which is used above 1.
        generator: for schedulers that draw noise along the way.
        progress: wraps the timesteps, for example in a progress bar.

    Returns:
        (B, C, F, H, W) in fp32, normalised latents.

    Raises:
        FloatingPointError: the result holds NaN or infinity.

    Source: FlashI2V, arXiv 2509.25187, latent shifting at inference.
    """

    def velocity(y: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output = transformer(y - guidance.shift, t.expand(len(y)), context, guidance.fourier, return_dict=False)
        return output[0].float()

    step = _with_generator(scheduler.step, generator)
    y = noise.float()
    for t in progress(scheduler.timesteps):
        v = velocity(y, t, text)
        if guidance_scale > 1:
            assert negative_text is not None
            v_negative = velocity(y, t, negative_text)
            v = v_negative + guidance_scale * (v - v_negative)
        y = step(v, t, y, return_dict=False)[0]
    if not y.isfinite().all():
        raise FloatingPointError("sampling ended in NaN or infinity: use dtype bf16 or fp32 instead of fp16")
    return y


def _with_generator(step: Callable[..., Any], generator: Generators | None) -> Callable[..., Any]:
    takes_generator = "generator" in inspect.signature(step).parameters
    return partial(step, generator=generator) if takes_generator else step
