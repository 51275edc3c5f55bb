"""Scaled dot-product attention.

B batch, N queries, M keys, K heads, d head size.
"""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import check_floating, dispatch, reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return softmax(scale * query key^T) value, per head.

    Args:
        query: (B, N, K, d), any floating dtype.
        key: (B, M, K, d), same dtype.
        value: (B, M, K, d), same dtype.
        mask: boolean, broadcastable to (B, K, N, M); True means that the query attends to the key. A query that
            attends to nothing gets zeros. None: all attend to all.
        scale: None means 1 / sqrt(d).
        backend: "auto" or one of `backends("attention")`.

    Returns:
        (B, N, K, d) in the dtype of `query`. The softmax is taken in fp32 or better.

    Raises:
        ValueError: shapes or dtypes do not match.
        UnsupportedError: the named backend cannot serve this call.

    Source: Vaswani et al., arXiv 1706.03762, section 3.2.1.
    """
    check_attention("attention", query, key, value)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be boolean with True = attend, got {mask.dtype}")
        full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        if mask.ndim > 4 or any(ours not in (1, theirs) for ours, theirs in zip(mask.shape[::-1], full[::-1])):
            raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to (B, K, N, M) = {full}")
        mask = mask[(None,) * (4 - mask.ndim)]  # of four dimensions, as kernels want it
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_heads, head_size = query.shape[2:]
    return dispatch(
        *("attention", backend, query, key, value, mask, scale),
        num_heads=num_heads,
        head_size=head_size,
        masked=mask is not None,
    )


def check_attention(operator: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise a ValueError unless query (B, N, K, d), key and value (B, M, K, d) fit each other."""
    check_floating(operator, query)
    if query.ndim != 4 or key.shape != value.shape or key.ndim != 4:
        raise ValueError(
            f"{operator} takes query (B, N, K, d) and key and value (B, M, K, d), "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, heads or head size")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")


@reference.serves("attention")
def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bnkd,bmkd->bknm", query.to(exact), key.to(exact)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
        # A row of nothing but -inf has no softmax; the contract gives it zeros.
        weights = torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1).masked_fill(~mask, 0.0)
    else:
        weights = scores.softmax(-1)
    return torch.einsum("bknm,bmkd->bnkd", weights, value.to(exact)).to(query.dtype)
