"""Flow matching: sigmas, interpolation, target.

sigma runs from 0 (video) to 1 (noise); the network sees t = 1000 * sigma.  The integration itself is that of diffusers'
schedulers, given the sigmas of `inference_sigmas` where they take them.
"""

import inspect
import math
from collections.abc import Sequence

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from flashi2v_model.config import SchedulerName

NUM_TIMESTEPS = 1000

# The shift grows exponentially on the line through these (tokens of one latent frame, logarithm of the shift).
_DYNAMIC_SHIFT = ((256, 0.5), (4096, 1.15))


def shift_sigma(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """Return shift * sigma / (1 + (shift - 1) * sigma), any shape."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(height: int, width: int) -> float:
    """Return the shift for a latent grid of `height` x `width` (patch 2x2), Esser et al., arXiv 2403.03206."""
    (tokens0, log0), (tokens1, log1) = _DYNAMIC_SHIFT
    slope = (log1 - log0) / (tokens1 - tokens0)
    return math.exp(log0 + slope * (height * width / 4 - tokens0))


def inference_sigmas(num_steps: int) -> list[float]:
    """Return the sigmas of a sampling run before the shift: `num_steps` even steps down from 1, without the final 0."""
    return [1 - step / num_steps for step in range(num_steps)]


def euler_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Return the default sampler."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=shift)


def make_scheduler(name: SchedulerName, shift: float) -> SchedulerMixin:
    """Return a sampler: Euler is the reference's; the others are of second order and need fewer steps."""
    if name == "euler":
        return euler_scheduler(shift)
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=shift)
    multistep = UniPCMultistepScheduler if name == "unipc" else DPMSolverMultistepScheduler
    return multistep(
        num_train_timesteps=NUM_TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def draw_sigmas(generators: Sequence[torch.Generator], *, logit_normal: bool, shift: float | None) -> Tensor:
    """Draw one training sigma per sample.

    Args:
        generators: one per sample.
        logit_normal: sigmoid(N(0, 1)) instead of U(0, 1).
        shift: as of `dynamic_shift`, or None.

    Returns:
        (B,) fp32 on the CPU.
    """
    if logit_normal:
        sigma = torch.cat([torch.randn(1, generator=g) for g in generators]).sigmoid()
    else:
        sigma = torch.cat([torch.rand(1, generator=g) for g in generators])
    return sigma if shift is None else shift_sigma(sigma, shift)


def interpolate(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return sigma * noise + (1 - sigma) * latents: (B, C, F, H, W) in fp32.

    Args:
        latents: z (B, C, F, H, W).
        noise: eps (B, C, F, H, W).
        sigma: (B,).
    """
    sigma = sigma.to(latents.device, torch.float32).view(-1, 1, 1, 1, 1)
    return sigma * noise.float() + (1 - sigma) * latents.float()


def target(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity that the network learns, noise - latents, in fp32."""
    return noise.float() - latents.float()


def fitted(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Return a scheduler set up for the flow, where it was made from the configuration of one that is.

    `UniPCMultistepScheduler.from_config(flow_scheduler.config)` knows the shift, under another name than its own, and
    nothing says that it predicts a flow.
    """
    config = scheduler.config
    unsaid = {"prediction_type", "use_flow_sigmas"} <= {*config.get("_use_default_values", ())}
    if not (unsaid and "shift" in config and "flow_shift" in config):
        return scheduler
    own = inspect.signature(type(scheduler).__init__).parameters
    chosen = {name: value for name, value in config.items() if name in own}
    chosen |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
    return type(scheduler)(**chosen)
