"""Rotary position embedding in its interleaved form: channels 2i and 2i+1 are one rotating pair.

B batch, N tokens, K heads, d head size.
"""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> Tensor:
    """Rotate every pair of adjacent channels by its token's angle.

    Args:
        x: (B, N, K, d) with even d, any floating dtype.
        cos: (N, d / 2) real, the cosine of each pair's angle; fp32 from an fp64 table.
        sin: (N, d / 2) real.
        backend: "auto" or one of `backends("apply_rope")`.

    Returns:
        (B, N, K, d) in the dtype of `x`; the arithmetic is fp32 or better.

    Raises:
        ValueError: shapes do not match.
        UnsupportedError: the named backend cannot serve this call.

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    check_floating("apply_rope", x)
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be (B, N, K, d) with even d, got {tuple(x.shape)}")
    table = (x.shape[1], x.shape[-1] // 2)
    if cos.shape != table or sin.shape != table:
        raise ValueError(f"cos and sin must be (N, d / 2) = {table}, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    return dispatch("apply_rope", backend, x, cos, sin, num_heads=x.shape[2], head_size=x.shape[3])


@reference.serves("apply_rope")
def real_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = exact[..., 0::2], exact[..., 1::2]  # (B, N, K, d/2)
    cos, sin = cos[:, None], sin[:, None]  # (N, 1, d/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)  # (B, N, K, d/2, 2)
    return rotated.flatten(-2).to(x.dtype)
