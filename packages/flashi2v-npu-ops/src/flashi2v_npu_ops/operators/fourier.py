"""Splitting an image's latent into low and high spatial frequencies at an energy share.

B batch, C channels, H W latent grid.
"""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference

MAGNITUDE_EPS = 1e-12  # keeps the root differentiable at zero


def split_frequencies(
    latent: Tensor, ratio: float | Tensor, *, magnitude: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Split each sample at the radius within which the share `ratio` of its spectrum's magnitude lies.

    The bins of the centred spectrum are ordered by their distance to the centre bin (H // 2, W // 2); magnitudes,
    averaged over channels, are cumulated in that order; the cut-off is the radius of the bin where the sum reaches
    `ratio` of the whole. Where the centre bin alone holds that share (flat images, ratio 0) the cut-off is 0 and the
    high-pass is the whole image, mean included. Where the sum reaches `ratio` among bins that hold nothing but rounding
    errors, backends may differ in the bin; for latents that are not finite nothing is said.

    Args:
        latent: (B, C, H, W), any floating dtype; computed in fp32 or better.
        ratio: in [0, 1], one number or (B,). A tensor on an accelerator is taken as it is: looking at it would wait.
        magnitude: return the high-pass as sqrt(re^2 + im^2 + 1e-12) instead of its real part.
        backend: "auto" or one of `backends("split_frequencies")`.

    Returns:
        high (B, C, H, W) and low (B, C, H, W) in the dtype of `latent`, and cutoff (B,) in bins, in fp32 or better.
        Gradients flow through high and low; the cut-off is piecewise constant and has none.

    Raises:
        ValueError: shapes do not match, or a ratio lies outside [0, 1].
        UnsupportedError: the named backend cannot serve this call.

    Source: FlashI2V, arXiv 2509.25187, Fourier guidance.
    """
    check_floating("split_frequencies", latent)
    if latent.ndim != 4 or latent.numel() == 0:
        raise ValueError(f"latent must be (B, C, H, W), none of them 0, got {tuple(latent.shape)}")
    exact = torch.promote_types(latent.dtype, torch.float32)
    shares = _checked_ratio(ratio, latent, exact)
    if latent.dtype == exact:
        return dispatch("split_frequencies", backend, latent, shares, magnitude)
    high, low, cutoff = dispatch("split_frequencies", backend, latent.to(exact), shares, magnitude)
    return high.to(latent.dtype), low.to(latent.dtype), cutoff


def _checked_ratio(ratio: float | Tensor, latent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one ratio per sample, (B,), on the latent's device."""
    batch = latent.shape[0]
    if not isinstance(ratio, Tensor):
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
        return latent.new_full((batch,), ratio, dtype=dtype)
    if ratio.ndim > 1 or (ratio.ndim == 1 and ratio.shape[0] != batch):
        raise ValueError(f"ratio must be one number or (B,) = ({batch},), got {tuple(ratio.shape)}")
    # To look at numbers on a device would be to wait for it.
    shares = _check_values(ratio.detach()) if ratio.device.type == "cpu" else ratio.detach()
    return shares.to(latent.device, dtype).expand(batch)


@torch.library.custom_op("flashi2v::check_ratio", mutates_args=())
def _check_values(ratio: Tensor) -> Tensor:
    # An operator, so that a compiled graph looks at the values of each run.
    if not ((ratio >= 0) & (ratio <= 1)).all():
        raise ValueError(f"ratio must lie in [0, 1], got {ratio.tolist()}")
    return ratio.clone()


_check_values.register_fake(torch.empty_like)


@reference.serves("split_frequencies")
def _reference(latent: Tensor, ratio: Tensor, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    height, width = latent.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(latent), dim=(-2, -1))  # (B, C, H, W)
    y, x = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    radius = bin_radius(y, x, latent.dtype).to(latent.device)  # (H, W)
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
    return (x.real.square() + x.imag.square() + MAGNITUDE_EPS).sqrt()


def bin_radius(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far every pair of an integer y (H,) and x (W,) is from the centre bin: (H, W)."""
    # Rounded from fp64: the last bit of an fp32 root differs between CPUs, and equal radii must be equal numbers.
    return (y[:, None].square() + x.square()).double().sqrt().to(dtype)
