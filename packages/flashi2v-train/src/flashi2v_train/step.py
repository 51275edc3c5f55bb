"""One training step's mathematics: draws and loss.

B batch, C latent channels, F latent frames, H W latent grid, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashi2v_data.randomness import generator
from flashi2v_model import FlashI2VTransformer3DModel, guide
from flashi2v_model.scheduler import NUM_TIMESTEPS, draw_sigmas, dynamic_shift, interpolate, target
from flashi2v_train.config import RunConfig


@dataclass(frozen=True)
class Draws:
    """What is random about a batch, a function of seed, epoch and sample alone.

    Attributes:
        noise: (B, C, F, H, W), eps.
        sigma: (B,).
        ratio: (B,), the Fourier cut-off's energy share.
        posterior: (B, C, F, H, W), for the draw from the VAE's posterior of the video.
        condition_posterior: (B, C, 1, H, W), the same of the first frame.
    """

    noise: Tensor
    sigma: Tensor
    ratio: Tensor
    posterior: Tensor
    condition_posterior: Tensor


def draw(config: RunConfig, keys: Sequence[tuple[int, int]]) -> Draws:
    """Make the draws of the samples with these (epoch, index) keys, on the CPU."""
    channels, frames, height, width = config.latent_shape
    diffusion = config.model.diffusion
    low, high = config.model.predictor.low_freq_energy_ratio

    def generators(purpose: str) -> list[torch.Generator]:
        return [generator(config.options.seed, purpose, epoch, index) for epoch, index in keys]

    def normal(purpose: str, frames: int) -> Tensor:
        return torch.stack([torch.randn(channels, frames, height, width, generator=g) for g in generators(purpose)])

    return Draws(
        noise=normal("noise", frames),
        sigma=draw_sigmas(
            generators("sigma"),
            logit_normal=diffusion.use_logitnorm_time_sampling,
            shift=dynamic_shift(height, width) if diffusion.use_dynamic_shifting else None,
        ),
        ratio=torch.cat([low + (high - low) * torch.rand(1, generator=g) for g in generators("ratio")]),
        posterior=normal("posterior", frames),
        condition_posterior=normal("condition posterior", 1),
    )


class FlowMatchingLoss(nn.Module):
    """From features and draws to the loss.

    A module, so that sharding sees the whole computation: the latent shift is called beside the transformer's own
    forward.
    """

    def __init__(self, transformer: FlashI2VTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: Tensor, condition: Tensor, context: Tensor, noise: Tensor, sigma: Tensor, ratio: Tensor
    ) -> Tensor:
        """Return every sample's mean squared error, (B,) in fp32; arguments as in `encode.Features` and `Draws`."""
        noise = noise.to(latents.device)
        guidance = guide(self.transformer, condition, latents.shape[2], ratio)
        x_t = interpolate(latents, noise, guidance.shift, sigma)
        velocity = self.transformer(x_t, NUM_TIMESTEPS * sigma, context, guidance.fourier).sample
        return F.mse_loss(velocity, target(latents, noise), reduction="none").mean(dim=(1, 2, 3, 4))
