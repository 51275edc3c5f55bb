"""One training step's mathematics: draws, velocity, loss.

B batch, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from flashi2v_data.randomness import generator
from flashi2v_model.scheduler import NUM_TIMESTEPS, draw_sigmas, dynamic_shift, interpolate, target
from flashi2v_train.config import RunConfig
from flashi2v_train.features import Features


@dataclass(frozen=True)
class Draws:
    """What is random about a batch, a function of seed, epoch and sample alone.

    Attributes:
        noise: (B, C, F, H, W), eps.
        sigma: (B,).
        ratio: (B,), the Fourier cut-off's energy share.
    """

    noise: Tensor
    sigma: Tensor
    ratio: Tensor


def draw(config: RunConfig, keys: Sequence[tuple[int, int]]) -> Draws:
    """Make the draws of the samples with these (epoch, index) keys, on the CPU."""
    channels, frames, height, width = config.latent_shape
    diffusion = config.model.diffusion
    low, high = config.model.predictor.low_freq_energy_ratio

    def generators(purpose: str) -> list[torch.Generator]:
        return [generator(config.options.seed, purpose, epoch, index) for epoch, index in keys]

    return Draws(
        noise=torch.stack([torch.randn(channels, frames, height, width, generator=g) for g in generators("noise")]),
        sigma=draw_sigmas(
            generators("sigma"),
            logit_normal=diffusion.use_logitnorm_time_sampling,
            shift=dynamic_shift(height, width) if diffusion.use_dynamic_shifting else None,
        ),
        ratio=torch.cat([low + (high - low) * torch.rand(1, generator=g) for g in generators("ratio")]),
    )


@dataclass(frozen=True)
class Inputs:
    """What the transformer's forward pass is given, in its order.

    Attributes:
        noisy: (B, C, F, H, W) in fp32, sigma * eps + (1 - sigma) * z.
        timestep: (B,), 1000 * sigma.
        text: (B, L, text_dim), text states with zeroed padding.
        condition: (B, C, 1, H, W), the first frame's latent.
        ratio: (B,), the Fourier cut-off's energy share.
    """

    noisy: Tensor
    timestep: Tensor
    text: Tensor
    condition: Tensor
    ratio: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of it, in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def split(self, number: int) -> "list[Inputs]":
        """Return equal parts of the batch."""
        return [Inputs(*tensors) for tensors in zip(*(tensor.chunk(number) for tensor in self.tensors()), strict=True)]


def make_inputs(features: Features, draws: Draws) -> tuple[Inputs, Tensor]:
    """Put a batch's features and draws together, on the features' device.

    Returns:
        the inputs, and the velocity to learn, (B, C, F, H, W) in fp32.
    """
    device = features.latents.device
    noise, sigma, ratio = (tensor.to(device) for tensor in (draws.noise, draws.sigma, draws.ratio))
    noisy = interpolate(features.latents, noise, sigma)
    inputs = Inputs(noisy, NUM_TIMESTEPS * sigma, features.context, features.condition, ratio)
    return inputs, target(features.latents, noise)


def mean_loss(velocity: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error, a number in fp32."""
    return F.mse_loss(velocity.float(), wanted)
