"""Splitting an image's latent into low and high spatial frequencies at an energy share.

B batch, C channels, H W latent grid, R = W // 2 + 1 columns of a real image's spectrum.

The fast paths work on half of the spectrum, as the other half mirrors it, and find the cut-off without sorting. They
are custom operators: a compiler sees one node, and tables are made and kept outside of any tracing. Their gradient
needs no spectrum of its own: at a fixed cut-off the low-pass is linear and self-adjoint, so it is applied once more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, register

_MAGNITUDE_EPS = 1e-12  # keeps the root differentiable at zero
_NUM_TABLES = 32  # sizes and devices whose tables are kept


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
        ratio: in [0, 1], one number or (B,); as its values are looked at, a tensor is best left on the CPU.
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
    case = (latent.device.type, exact)
    if latent.dtype == exact:
        return dispatch("split_frequencies", backend, case, latent, shares, magnitude)
    high, low, cutoff = dispatch("split_frequencies", backend, case, latent.to(exact), shares, magnitude)
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
    return _check_values(ratio.detach()).to(latent.device, dtype).expand(batch)


@torch.library.custom_op("flashi2v::check_ratio", mutates_args=())
def _check_values(ratio: Tensor) -> Tensor:
    # An operator, so that a compiled graph looks at the values of each run.
    if not ((ratio >= 0) & (ratio <= 1)).all():
        raise ValueError(f"ratio must lie in [0, 1], got {ratio.tolist()}")
    return ratio.clone()


_check_values.register_fake(torch.empty_like)


@register("split_frequencies", "reference")
def _reference(latent: Tensor, ratio: Tensor, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    height, width = latent.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(latent), dim=(-2, -1))  # (B, C, H, W)
    y, x = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    radius = _radius(y, x, latent.dtype).to(latent.device)  # (H, W)
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


@dataclass(frozen=True)
class RealTransform:
    """A pair of transforms between a real image (..., H, W) and half of its spectrum (..., H, R).

    Attributes:
        forward: image -> spectrum, in whatever form multiplies by a mask (B, 1, H, R).
        power: spectrum -> re^2 + im^2 + 1e-12 (B, C, H, R).
        inverse: (spectrum, W) -> image.
    """

    forward: Callable[[Tensor], Tensor]
    power: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor, int], Tensor]


def low_pass(transform: RealTransform, image: Tensor, keep: Tensor) -> Tensor:
    """Take images (B, C, H, W) and the bins to keep (B, 1, H, R); return (B, C, H, W)."""
    return transform.inverse(transform.forward(image).mul_(keep), image.shape[-1])


def low_pass_share(transform: RealTransform, latent: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take latents (B, C, H, W) and shares (B,); return low (B, C, H, W), the bins kept (B, 1, H, R), cut-off (B,)."""
    spectrum = transform.forward(latent)
    profile = transform.power(spectrum).sqrt_().sum(1)  # (B, H, R); not the mean, as only shares count
    keep, cutoff = _low_bins(profile, ratio, latent.shape[-1])
    return transform.inverse(spectrum.mul_(keep), latent.shape[-1]), keep, cutoff


def splitter(name: str, transform: RealTransform) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return `split_frequencies` over a transform, as custom operators flashi2v::low_pass[_share]_`name`."""

    @torch.library.custom_op(f"flashi2v::low_pass_{name}", mutates_args=())
    def apply(image: Tensor, keep: Tensor) -> Tensor:
        return low_pass(transform, image, keep)

    @torch.library.custom_op(f"flashi2v::low_pass_share_{name}", mutates_args=())
    def find_and_apply(latent: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return low_pass_share(transform, latent, ratio)

    @apply.register_fake
    def _(image: Tensor, keep: Tensor) -> Tensor:
        return torch.empty_like(image, memory_format=torch.contiguous_format)

    @find_and_apply.register_fake
    def _(latent: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, height, width = latent.shape
        keep = latent.new_empty((batch, 1, height, width // 2 + 1), dtype=torch.bool)
        return torch.empty_like(latent, memory_format=torch.contiguous_format), keep, latent.new_empty(batch)

    def keep_given(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    def keep_found(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return apply(grad, keep), None

    apply.register_autograd(backward, setup_context=keep_given)
    find_and_apply.register_autograd(backward, setup_context=keep_found)

    def split(latent: Tensor, ratio: Tensor, magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
        # Where nothing is traced, faked or differentiated, the operator's wrapping would be a tenth of the time.
        bare = type(latent) is Tensor and not latent.requires_grad and not torch.compiler.is_compiling()
        low, _, cutoff = low_pass_share(transform, latent, ratio) if bare else find_and_apply(latent, ratio)
        high = latent - low
        if magnitude:
            high = torch.addcmul(high.new_full((), _MAGNITUDE_EPS), high, high).sqrt_()
        return high, low, cutoff.detach()

    return split


def _low_bins(profile: Tensor, ratio: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Take magnitudes (B, H, R) and shares (B,); return the bins below the cut-off (B, 1, H, R) and the cut-off (B,).

    The k-th bin in order of radius is at the cut-off; where k falls among bins of equal radius makes no difference.
    """
    table = _order_table(profile.shape[-2], width, profile.device, profile.dtype)
    ordered = profile.flatten(1).index_select(1, table.order)  # (B, H*R)
    cumulated = ordered.mul_(table.multiplicity).cumsum(-1)
    bins = torch.searchsorted(cumulated, cumulated[:, -1:] * ratio[:, None])  # (B, 1); past the last for NaN
    cutoff = table.radii.index_select(0, bins.flatten().clamp_(max=table.radii.shape[0] - 1))  # (B,)
    return table.radius < cutoff[:, None, None, None], cutoff


@dataclass(frozen=True)
class _OrderTable:
    radius: Tensor  # (H, R), distance to the centre bin
    order: Tensor  # (H*R,) int64, bins by radius
    radii: Tensor  # (H*R,), in that order
    multiplicity: Tensor  # (H*R,), in that order: how many bins of the whole spectrum a bin stands for


@lru_cache(maxsize=_NUM_TABLES)
def _order_table(height: int, width: int, device: torch.device, dtype: torch.dtype) -> _OrderTable:
    with torch.inference_mode(False):  # tables made while sampling must serve a training step, too
        y = (torch.arange(height) + height // 2) % height - height // 2
        radius = _radius(y, torch.arange(width // 2 + 1), dtype)
        radii, order = radius.flatten().sort(stable=True)
        multiplicity = _column_multiplicity(width, dtype).expand(height, -1).flatten()[order]
        return _OrderTable(*(part.to(device) for part in (radius, order, radii, multiplicity)))


def _radius(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far every pair of an integer y (H,) and x (W,) is from the centre bin: (H, W)."""
    # Rounded from fp64: the last bit of an fp32 root differs between CPUs, and equal radii must be equal numbers.
    return (y[:, None].square() + x.square()).double().sqrt().to(dtype)


def _column_multiplicity(width: int, dtype: torch.dtype) -> Tensor:
    """Return for R columns how many of the whole spectrum's W columns each stands for: itself, and its mirror image."""
    columns = torch.arange(width // 2 + 1)
    return torch.where((columns == 0) | (2 * columns == width), 1, 2).to(dtype)


def _fft_power(spectrum: Tensor) -> Tensor:
    parts = torch.view_as_real(spectrum)  # (B, C, H, R, 2)
    real, imaginary = torch.addcmul(parts.new_full((), _MAGNITUDE_EPS / 2), parts, parts).unbind(-1)
    return real + imaginary


def _fft_inverse(spectrum: Tensor, width: int) -> Tensor:
    return torch.fft.irfft2(spectrum, s=(spectrum.shape[-2], width))


def _fft_obstacle(device: str, *facts: object) -> str | None:
    return "some NPUs have no FFT, and complex numbers are slow on all" if device == "npu" else None


register("split_frequencies", "torch", obstacle=_fft_obstacle)(
    splitter("fft", RealTransform(torch.fft.rfft2, _fft_power, _fft_inverse))
)


@dataclass(frozen=True)
class _DftTable:
    rows_cos: Tensor  # (H, H), symmetric
    rows_sin: Tensor  # (H, H), symmetric
    columns_cos: Tensor  # (W, R)
    columns_sin: Tensor  # (W, R)
    back_cos: Tensor  # (R, W), scaled so that the pair of transforms is the identity
    back_sin: Tensor  # (R, W)


@lru_cache(maxsize=_NUM_TABLES)
def _dft_table(height: int, width: int, device: torch.device, dtype: torch.dtype) -> _DftTable:
    with torch.inference_mode(False):
        rows = _angles(height, height)
        columns = _angles(width, width // 2 + 1)
        back = columns.T, _column_multiplicity(width, torch.float64)[:, None] / (height * width)
        parts = (
            rows.cos(),
            rows.sin(),
            columns.cos(),
            columns.sin(),
            back[0].cos() * back[1],
            back[0].sin() * back[1],
        )
        return _DftTable(*(part.to(dtype).to(device) for part in parts))  # rounded once, on the CPU


def _angles(length: int, num_frequencies: int) -> Tensor:
    """Return 2 pi n k / length as (length, num_frequencies) in fp64; n k is reduced first, so no accuracy is lost."""
    turns = torch.outer(torch.arange(length), torch.arange(num_frequencies)) % length
    return turns.to(torch.float64) * (2 * math.pi / length)


def _dft_forward(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    table = _dft_table(height, width, image.device, image.dtype)
    cos, sin = image @ table.columns_cos, image @ table.columns_sin  # (..., H, R)
    real = table.rows_cos @ cos - table.rows_sin @ sin
    imaginary = -(table.rows_cos @ sin + table.rows_sin @ cos)
    return torch.stack((real, imaginary))  # (2, ..., H, R)


def _dft_power(spectrum: Tensor) -> Tensor:
    return spectrum.square().sum(0).add_(_MAGNITUDE_EPS)


def _dft_inverse(spectrum: Tensor, width: int) -> Tensor:
    real, imaginary = spectrum
    table = _dft_table(real.shape[-2], width, real.device, real.dtype)
    left = table.rows_cos @ real - table.rows_sin @ imaginary
    right = table.rows_cos @ imaginary + table.rows_sin @ real
    return left @ table.back_cos - right @ table.back_sin


REAL_DFT = RealTransform(_dft_forward, _dft_power, _dft_inverse)
