"""How the first frame guides the video: one definition for training and sampling.

B batch, C latent channels, F frames, H W latent grid.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flashi2v_model.transformer import FlashI2VTransformer3DModel
from flashi2v_npu_ops import split_frequencies


@dataclass(frozen=True)
class Guidance:
    """What the first frame contributes.

    Attributes:
        shift: (B, C, F, H, W), subtracted from the network's noisy input.
        fourier: (B, C, F, H, W), the high-pass features beside it.
    """

    shift: Tensor
    fourier: Tensor


def guide(
    transformer: FlashI2VTransformer3DModel, condition: Tensor, num_frames: int, ratio: float | Tensor
) -> Guidance:
    """Read the guidance off the first frame's latent.

    Args:
        transformer: its `learnable_proj` and config are used.
        condition: (B, C, 1, H, W), the normalised latent of the first frame.
        num_frames: F, latent frames of the video.
        ratio: `low_freq_energy_ratio`, in [0, 1], one number or (B,): where the high frequencies start.

    Returns:
        the guidance; gradients flow through the shift only.

    Raises:
        ValueError: the condition is not one frame.

    Source: FlashI2V, arXiv 2509.25187.
    """
    if condition.ndim != 5 or condition.shape[2] != 1:
        raise ValueError(f"condition must be (B, C, 1, H, W), got {tuple(condition.shape)}")
    config = transformer.config
    with torch.no_grad():
        high, low, _ = split_frequencies(condition[:, :, 0], ratio, magnitude=config.fft_return_abs)
    source = low[:, :, None] if config.low_freq_proj else condition
    if transformer.learnable_proj.device != condition.device:
        # Offloading brings weights along for the transformer's own call only.
        transformer.learnable_proj.to(condition.device)
    return Guidance(
        shift=transformer.learnable_proj(source, num_frames),
        fourier=high[:, :, None].expand(-1, -1, num_frames, -1, -1),
    )
