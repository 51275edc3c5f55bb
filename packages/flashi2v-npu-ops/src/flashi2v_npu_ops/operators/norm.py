"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., D), any floating dtype.
        weight: (D,), any floating dtype; bf16 input with fp32 weight is usual.
        eps: added to the mean square.
        backend: "auto" or one of `backends("rms_norm")`.

    Returns:
        (..., D) in the dtype of `x`; the arithmetic is fp32 or better.

    Raises:
        ValueError: `weight` does not match the last dimension of `x`.
        UnsupportedError: the named backend cannot serve this call.

    Source: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    """
    check_floating("rms_norm", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not match the last dimension of {tuple(x.shape)}")
    return dispatch("rms_norm", backend, x, weight, eps)


@reference.serves("rms_norm")
def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)
