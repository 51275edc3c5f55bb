"""Adaptive layer norm and the gated residual that goes with it: how the time embedding steers a transformer block.

B batch, N tokens, D width.
"""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Return layer_norm(x) * (1 + scale) + shift, normalised over the last dimension without weights.

    Args:
        x: (B, N, D), any floating dtype.
        shift: (B, 1, D), or another shape of three dimensions that broadcasts to (B, N, D); any floating dtype.
        scale: of the shape of `shift`.
        eps: added to the variance.
        backend: "auto" or one of `backends("layer_norm_modulate")`.

    Returns:
        (B, N, D) in the dtype of `x`; the arithmetic is fp32 or better, rounded once.

    Raises:
        ValueError: shapes do not match.
        UnsupportedError: the named backend cannot serve this call.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2 (adaLN).
    """
    check_floating("layer_norm_modulate", x)
    if shift.shape != scale.shape or not _broadcasts(shift, x):
        raise ValueError(
            f"x must be (B, N, D) and shift and scale alike broadcast to it, as (B, 1, D) does; "
            f"got {tuple(x.shape)}, {tuple(shift.shape)} and {tuple(scale.shape)}"
        )
    return dispatch("layer_norm_modulate", backend, x, shift, scale, eps)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor, backend: str = "auto") -> Tensor:
    """Return x + gate * update.

    Args:
        x: (B, N, D), any floating dtype.
        update: (B, N, D), any floating dtype.
        gate: (B, 1, D), or another shape of three dimensions that broadcasts to (B, N, D); any floating dtype.
        backend: "auto" or one of `backends("gated_residual")`.

    Returns:
        (B, N, D) in the dtype of `x`; the arithmetic is fp32 or better, rounded once.

    Raises:
        ValueError: shapes do not match.
        UnsupportedError: the named backend cannot serve this call.

    Source: Peebles and Xie, arXiv 2212.09748, section 3.2 (adaLN-Zero).
    """
    check_floating("gated_residual", x)
    if x.shape != update.shape or not _broadcasts(gate, x):
        raise ValueError(
            f"x and update must both be (B, N, D) and gate broadcast to it, as (B, 1, D) does; "
            f"got {tuple(x.shape)}, {tuple(update.shape)} and {tuple(gate.shape)}"
        )
    return dispatch("gated_residual", backend, x, update, gate)


def _broadcasts(part: Tensor, x: Tensor) -> bool:
    return (
        x.ndim == part.ndim == 3
        and part.shape[-1] == x.shape[-1]
        and all(ours in (1, theirs) for ours, theirs in zip(part.shape, x.shape))
    )


@reference.serves("layer_norm_modulate")
def _reference_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = exact - exact.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + scale.to(exact.dtype)) + shift.to(exact.dtype)).to(x.dtype)


@reference.serves("gated_residual")
def _reference_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    return (x.to(exact) + gate.to(exact) * update.to(exact)).to(x.dtype)
