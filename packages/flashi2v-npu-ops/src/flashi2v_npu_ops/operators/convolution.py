"""Convolution over frames, rows and columns.

B batch, C channels, O channels of the result, F frames, H W rows and columns, kf kh kw the kernel.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashi2v_npu_ops.registry import check_floating, dispatch, reference

Triple = tuple[int, int, int]
_ONES: Triple = (1, 1, 1)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Triple = _ONES,
    padding: Triple = (0, 0, 0),
    dilation: Triple = _ONES,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Return what `torch.nn.functional.conv3d` returns.

    Args:
        x: (B, C, F, H, W), any floating dtype.
        weight: (O, C / groups, kf, kh, kw), of the same dtype.
        bias: (O,), of the same dtype.
        stride: by frames, rows and columns.
        padding: zeros on both sides of frames, rows and columns.
        dilation: distance between the kernel's elements.
        groups: parts of the channels that are convolved by themselves.
        backend: "auto" or one of `backends("conv3d")`.

    Returns:
        (B, O, F', H', W') in the dtype of `x`; sums are fp32 or better.

    Raises:
        ValueError: shapes or dtypes do not match.
        UnsupportedError: the named backend cannot serve this call.
    """
    check_floating("conv3d", x)
    if x.dim() != 5 or weight.dim() != 5 or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ValueError(f"weight {tuple(weight.shape)} with {groups} groups does not match input {tuple(x.shape)}")
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(f"input and weights must have one dtype, got {x.dtype} and {weight.dtype}")
    out: Tensor = dispatch("conv3d", backend, x, weight, bias, stride, padding, dilation, groups)
    return out


def route_conv3d(module: nn.Module, *, skips_zeros: bool = False) -> None:
    """Let `conv3d` serve every `nn.Conv3d` in a module, subclasses too: another library's VAE, say.

    Weights, names, hooks, and what a subclass does around the convolution stay as they are.

    Args:
        module: with the convolutions.
        skips_zeros: on CPUs, a kernel whose first frames are all zero does not meet the frames that they would weigh.
            They are looked for again whenever weights are loaded; in training, leave that be.

    Raises:
        ValueError: a convolution pads with something other than zeros, or by a word.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv3d):
            if part.padding_mode != "zeros" or isinstance(part.padding, str):
                raise ValueError(f"{name} pads by {part.padding_mode!r}, {part.padding!r}: conv3d pads with zeros")
            settings = (part.stride, part.padding, part.dilation, part.groups)
            pads_itself = not part.padding[0] and part.dilation[0] == 1  # as causal ones do
            zeros = _Zeros() if skips_zeros and pads_itself else None
            part._conv_forward = partial(_convolve, settings, zeros)  # type: ignore[method-assign]


class _Zeros:
    """How many of a kernel's first frames are zero, found anew where its weights have changed."""

    def __init__(self) -> None:
        self._weight: Tensor | None = None  # itself: another may come to have its id
        self._version = 0
        self._first = 0

    def count(self, weight: Tensor) -> int:
        # Other devices would have to be asked, and of inference tensors nothing counts the changes.
        if weight.device.type != "cpu" or weight.is_inference():
            return 0
        if weight is not self._weight or weight._version != self._version:
            try:
                used = weight.detach().ne(0).any(dim=4).any(dim=3).any(dim=1).any(dim=0).tolist()
            except RuntimeError:  # a fake tensor has a shape and no numbers
                used = []
            self._weight, self._version = weight, weight._version
            self._first = used.index(True) if True in used else 0
        return self._first


def _convolve(settings: Any, zeros: _Zeros | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    first = 0 if zeros is None else zeros.count(weight)
    return conv3d(x[:, :, first:], weight[:, :, first:], bias, *settings)


@reference.serves("conv3d")
def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.conv3d(x.to(exact), weight.to(exact), None if bias is None else bias.to(exact), *settings).to(x.dtype)
