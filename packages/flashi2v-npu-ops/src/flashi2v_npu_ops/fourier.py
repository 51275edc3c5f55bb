"""Splitting an image's latent into low and high spatial frequencies at an energy share.

B batch, C channels, H W latent grid.
"""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import dispatch, register

_MAGNITUDE_EPS = 1e-12  # keeps the root differentiable at zero


def split_frequencies(
    latent: Tensor, ratio: float | Tensor, *, magnitude: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Split each sample at the radius within which the share `ratio` of its spectrum's magnitude lies.

    The bins of the centred spectrum are ordered by their distance to the centre bin (H // 2, W // 2); magnitudes,
    averaged over channels, are cumulated in that order; the cut-off is the radius of the bin where the sum reaches
    `ratio` of the whole. Where the centre bin alone holds that share (flat images, ratio 0) the cut-off is 0 and the
    high-pass is the whole image, mean included.

    Args:
        latent: (B, C, H, W), any floating dtype; computed in fp32 or better.
        ratio: in [0, 1], one number or (B,).
        magnitude: return the high-pass as sqrt(re^2 + im^2 + 1e-12) instead of its real part.
        backend: "auto" or one of `backends("split_frequencies")`.

    Returns:
        high (B, C, H, W) and low (B, C, H, W) in the dtype of `latent`, and cutoff (B,) in bins, in fp32 or better.

    Raises:
        ValueError: shapes do not match, or a ratio lies outside [0, 1].
        UnsupportedError: the named backend cannot serve this call.

    Source: FlashI2V, arXiv 2509.25187, Fourier guidance.
    """
    if latent.ndim != 4:
        raise ValueError(f"latent must be (B, C, H, W), got {tuple(latent.shape)}")
    exact = torch.promote_types(latent.dtype, torch.float32)
    shares = torch.as_tensor(ratio, dtype=exact)
    if shares.ndim > 1 or (shares.ndim == 1 and shares.shape[0] != latent.shape[0]):
        raise ValueError(f"ratio must be one number or (B,) = ({latent.shape[0]},), got {tuple(shares.shape)}")
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"ratio must lie in [0, 1], got {shares.tolist()}")
    shares = shares.to(latent.device).expand(latent.shape[0])
    high, low, cutoff = dispatch("split_frequencies", backend, latent.device, latent.to(exact), shares, magnitude)
    return high.to(latent.dtype), low.to(latent.dtype), cutoff


@register("split_frequencies", "reference")
def _reference(latent: Tensor, ratio: Tensor, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    height, width = latent.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(latent), dim=(-2, -1))  # (B, C, H, W)
    radius = _radii(height, width, latent)  # (H, W)
    profile = _magnitude(spectrum).mean(1).flatten(1)  # (B, H*W)
    radii, order = radius.flatten().sort(stable=True)
    cumulated = profile[:, order].cumsum(-1)  # (B, H*W)
    below = (cumulated < ratio[:, None] * profile.sum(-1, keepdim=True)).sum(-1)  # (B,)
    cutoff = radii[below.clamp(max=height * width - 1)]  # (B,)

    passes = radius >= cutoff[:, None, None, None]  # (B, 1, H, W)
    high = torch.fft.ifft2(torch.fft.ifftshift(spectrum * passes, dim=(-2, -1)))
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * ~passes, dim=(-2, -1))).real
    return (_magnitude(high) if magnitude else high.real), low, cutoff


def _magnitude(x: Tensor) -> Tensor:
    return (x.real.square() + x.imag.square() + _MAGNITUDE_EPS).sqrt()


def _radii(height: int, width: int, like: Tensor) -> Tensor:
    """Distance of every bin of a centred spectrum to the centre bin: (H, W)."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) - height // 2
    x = torch.arange(width, dtype=like.dtype, device=like.device) - width // 2
    return (y[:, None].square() + x.square()).sqrt()
