"""The activation of the transformer's MLPs."""

import math

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference


def gelu_tanh(x: Tensor, backend: str = "auto") -> Tensor:
    """Return x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), element by element.

    Args:
        x: any shape, any floating dtype.
        backend: "auto" or one of `backends("gelu_tanh")`.

    Returns:
        the shape and dtype of `x`; the arithmetic is fp32 or better.

    Raises:
        UnsupportedError: the named backend cannot serve this call.

    Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    """
    check_floating("gelu_tanh", x)
    return dispatch("gelu_tanh", backend, x)


@reference.serves("gelu_tanh")
def _reference(x: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return (exact / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)))).to(x.dtype)
