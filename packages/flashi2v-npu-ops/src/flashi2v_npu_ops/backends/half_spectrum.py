"""The Fourier filter on half of the spectrum, as the other half mirrors it; the cut-off is found without sorting.

B batch, C channels, H W latent grid, R = W // 2 + 1 columns of a real image's spectrum.

Over FFTs, or over plain matrix products for devices that have none. Both are custom operators: a compiler sees one
node, and tables are made and kept outside of any tracing. Their gradient needs no spectrum of its own: at a fixed
cut-off the low-pass is linear and self-adjoint, so it is applied once more.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashi2v_npu_ops.operators.fourier import MAGNITUDE_EPS, bin_radius
from flashi2v_npu_ops.tables import computed_once

_NUM_TABLES = 32  # sizes and devices whose tables are kept


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
            high = torch.addcmul(high.new_full((), MAGNITUDE_EPS), high, high).sqrt_()
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


@computed_once(maxsize=_NUM_TABLES)
def _order_table(height: int, width: int, device: torch.device, dtype: torch.dtype) -> _OrderTable:
    with torch.inference_mode(False):  # tables made while sampling must serve a training step, too
        y = (torch.arange(height) + height // 2) % height - height // 2
        radius = bin_radius(y, torch.arange(width // 2 + 1), dtype)
        radii, order = radius.flatten().sort(stable=True)
        multiplicity = _column_multiplicity(width, dtype).expand(height, -1).flatten()[order]
        return _OrderTable(*(part.to(device) for part in (radius, order, radii, multiplicity)))


def _column_multiplicity(width: int, dtype: torch.dtype) -> Tensor:
    """Return for R columns how many of the whole spectrum's W columns each stands for: itself, and its mirror image."""
    columns = torch.arange(width // 2 + 1)
    return torch.where((columns == 0) | (2 * columns == width), 1, 2).to(dtype)


def _fft_power(spectrum: Tensor) -> Tensor:
    parts = torch.view_as_real(spectrum)  # (B, C, H, R, 2)
    real, imaginary = torch.addcmul(parts.new_full((), MAGNITUDE_EPS / 2), parts, parts).unbind(-1)
    return real + imaginary


def _fft_inverse(spectrum: Tensor, width: int) -> Tensor:
    return torch.fft.irfft2(spectrum, s=(spectrum.shape[-2], width))


REAL_FFT = RealTransform(torch.fft.rfft2, _fft_power, _fft_inverse)


@dataclass(frozen=True)
class _DftTable:
    rows_cos: Tensor  # (H, H), symmetric
    rows_sin: Tensor  # (H, H), symmetric
    columns_cos: Tensor  # (W, R)
    columns_sin: Tensor  # (W, R)
    back_cos: Tensor  # (R, W), scaled so that the pair of transforms is the identity
    back_sin: Tensor  # (R, W)


@computed_once(maxsize=_NUM_TABLES)
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
    return spectrum.square().sum(0).add_(MAGNITUDE_EPS)


def _dft_inverse(spectrum: Tensor, width: int) -> Tensor:
    real, imaginary = spectrum
    table = _dft_table(real.shape[-2], width, real.device, real.dtype)
    left = table.rows_cos @ real - table.rows_sin @ imaginary
    right = table.rows_cos @ imaginary + table.rows_sin @ real
    return left @ table.back_cos - right @ table.back_sin


REAL_DFT = RealTransform(_dft_forward, _dft_power, _dft_inverse)
