"""Attention over some of the keys at a time: parts that are merged by their log-sum-exp, and the gradients of a part.

B batch, N queries, M keys of this part, K heads, d head size.

Where keys are shared out among processes, each part is attended to where, or when, its keys are at hand. The merged
result is that of all keys at once.

Sources: Liu et al., Ring attention, arXiv 2310.01889; Dao et al., FlashAttention, arXiv 2205.14135, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashi2v_npu_ops.operators.attention import check_attention
from flashi2v_npu_ops.registry import dispatch, reference


@torch.no_grad()
def attention_part(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return attention over some of the keys, and what it takes to merge it with that over others.

    It has no gradients of its own: `attention_part_grad` returns them, once all parts are merged.

    Args:
        query: (B, N, K, d), any floating dtype.
        key: (B, M, K, d), same dtype.
        value: (B, M, K, d), same dtype.
        scale: None means 1 / sqrt(d).
        backend: "auto" or one of `backends("attention_part")`.

    Returns:
        (B, N, K, d) in the dtype of `query`, and (B, K, N) in fp32 or better: the logarithm of the sum over the keys of
        exp(scale * query key^T).

    Raises:
        ValueError: shapes or dtypes do not match.
        UnsupportedError: the named backend cannot serve this call.
    """
    check_attention("attention_part", query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_heads, head_size = query.shape[2:]
    out, lse = dispatch(
        *("attention_part", backend, query, key, value, scale), num_heads=num_heads, head_size=head_size
    )
    return out, lse


@torch.no_grad()
def attention_part_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one part: of its keys and values, and the part of that of the queries.

    Args:
        query: as of `attention_part`, and `key`, `value`, `scale` likewise.
        grad: (B, N, K, d), the gradient of the merged result.
        out: (B, N, K, d), the merged result of all parts.
        lse: (B, K, N), its log-sum-exp.
        backend: "auto" or one of `backends("attention_part_grad")`.

    Returns:
        of query, (B, N, K, d), to be added up over all parts, of key and of value, (B, M, K, d), in their dtype.

    Raises:
        ValueError: shapes or dtypes do not match.
        UnsupportedError: the named backend cannot serve this call.
    """
    check_attention("attention_part_grad", query, key, value)
    rows = (query.shape[0], query.shape[2], query.shape[1])
    if not query.shape == grad.shape == out.shape or tuple(lse.shape) != rows:
        raise ValueError(
            f"attention_part_grad takes grad and out {tuple(query.shape)} and lse {rows} beside this query, "
            f"got {tuple(grad.shape)}, {tuple(out.shape)} and {tuple(lse.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_heads, head_size = query.shape[2:]
    of_query, of_key, of_value = dispatch(
        *("attention_part_grad", backend, query, key, value, grad, out, lse, scale),
        num_heads=num_heads,
        head_size=head_size,
    )
    return of_query, of_key, of_value


def merge_parts(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return two parts as one.

    Args:
        out: (B, N, K, d), what is merged so far; in fp32 or better, as it is rounded with each part.
        lse: (B, K, N), its log-sum-exp.
        part: (B, N, K, d), one more.
        part_lse: (B, K, N), its log-sum-exp.

    Returns:
        both, in the dtypes of `out` and `lse`.
    """
    share = torch.sigmoid(part_lse - lse).transpose(1, 2)[..., None]  # of the one more, (B, N, K, 1)
    return torch.lerp(out, part.to(out.dtype), share.to(out.dtype)), lse - F.logsigmoid(lse - part_lse)


@reference.serves("attention_part")
def _reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bnkd,bmkd->bknm", query.to(exact), key.to(exact)) * scale
    out = torch.einsum("bknm,bmkd->bnkd", scores.softmax(-1), value.to(exact))
    return out.to(query.dtype), scores.logsumexp(-1)


@reference.serves("attention_part_grad")
def _reference_grad(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(query.dtype, torch.float32)
    q, k, v, g, o = (x.to(exact) for x in (query, key, value, grad, out))
    weights = (torch.einsum("bnkd,bmkd->bknm", q, k) * scale - lse.to(exact)[..., None]).exp()
    rows = (g * o).sum(-1).transpose(1, 2)[..., None]  # (B, K, N, 1)
    scores = weights * (torch.einsum("bnkd,bmkd->bknm", g, v) - rows) * scale
    of_query = torch.einsum("bknm,bmkd->bnkd", scores, k)
    of_key = torch.einsum("bknm,bnkd->bmkd", scores, q)
    of_value = torch.einsum("bknm,bnkd->bmkd", weights, g)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
