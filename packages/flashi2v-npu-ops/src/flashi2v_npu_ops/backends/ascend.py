"""Ascend NPUs, by torch_npu's operators `torch.ops.npu.*`.

Limits and meanings are those of Ascend's operator pages (op-plugin, torch_npu APIs) for Atlas A2, and argument names
those that all torch_npu since 2.6 share. `device` is what imports torch_npu.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashi2v_npu_ops.backends.flat import by_patches, by_taps, is_patches
from flashi2v_npu_ops.backends.half_spectrum import REAL_DFT, splitter
from flashi2v_npu_ops.backends.torch import folded_modulate, fused_residual
from flashi2v_npu_ops.registry import Backend, Case

backend = Backend("ascend", device="npu")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _dtype_obstacle(case: Case) -> str | None:
    return None if case.dtype in _DTYPES else f"Ascend kernels take fp32, bf16 and fp16, got {case.dtype}"


def _needs(name: str, obstacle: Callable[[Case], str | None] = _dtype_obstacle) -> Callable[[Case], str | None]:
    """Return an obstacle that also names a kernel which the torch_npu that is loaded lacks."""

    def obstacle_or_lack(case: Case) -> str | None:
        if "torch_npu" in sys.modules and not hasattr(torch.ops.npu, name):
            return f"this torch_npu has no {name}: install a newer one"
        return obstacle(case)

    return obstacle_or_lack


def _attention_obstacle(case: Case) -> str | None:
    if case.num_heads > 256:
        return f"npu_fusion_attention takes up to 256 heads, got {case.num_heads}"
    if case.head_size > 768:
        return f"npu_fusion_attention takes head sizes up to 768, got {case.head_size}"
    return _dtype_obstacle(case)


@backend.serves("attention", obstacle=_needs("npu_fusion_attention", _attention_obstacle))
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, num_queries, num_heads, _ = query.shape  # BSND
    masked_out, dead = None, None
    if mask is not None:
        # Here True means masked OUT. The kernel says nothing of a query that attends to nothing, so let such a query
        # attend to all and set its result to zero afterwards, which also stops its gradients.
        dead = ~mask.any(-1, keepdim=True)  # (B, K, N, 1) or broadcast to it
        masked_out = ~(mask | dead)
        per_sample, per_head = (batch, num_heads) if mask.shape[1] > 1 else (mask.shape[0], 1)
        masked_out = masked_out.expand(per_sample, per_head, num_queries, key.shape[1])
    if _only_infers(query, key, value, mask):
        out: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
            query, key, value, atten_mask=masked_out, num_heads=num_heads, scale=scale, input_layout="BSND"
        )[0]
        return out if dead is None else out.masked_fill(dead.transpose(1, 2), 0.0)
    out = torch.ops.npu.npu_fusion_attention(
        query,
        key,
        value,
        head_num=num_heads,
        input_layout="BSND",
        atten_mask=masked_out,
        scale=scale,  # its default is 1
        keep_prob=1.0,
        inner_precise=0,
        sparse_mode=0,
    )[0]
    return out if dead is None else out.masked_fill(dead.transpose(1, 2), 0.0)


@backend.serves("attention_part", obstacle=_needs("npu_fusion_attention", _attention_obstacle))
def _attention_part(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num_heads = query.shape[2]
    if _only_infers(query, key, value, None):
        out, lse = torch.ops.npu.npu_fused_infer_attention_score(
            query, key, value, num_heads=num_heads, scale=scale, input_layout="BSND", softmax_lse_flag=True
        )
        return out, lse[..., 0]  # (B, K, N, 1)
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(
        query, key, value, head_num=num_heads, input_layout="BSND", scale=scale
    )
    return out, (largest + total.log())[..., 0]  # eight times the same, (B, K, N, 8)


@backend.serves("attention_part_grad", obstacle=_needs("npu_fusion_attention_grad", _attention_obstacle))
def _attention_part_grad(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel takes weights for exp(score - maximum) / sum: with the log-sum-exp and 1 they are those of all parts.
    largest = lse.float()[..., None].expand(*lse.shape, 8).contiguous()
    found = torch.ops.npu.npu_fusion_attention_grad(
        query,
        key,
        value,
        grad,
        head_num=query.shape[2],
        input_layout="BSND",
        softmax_max=largest,
        softmax_sum=torch.ones_like(largest),
        attention_in=out,
        scale_value=scale,
    )
    of_query, of_key, of_value = found[:3]  # newer versions return more behind them
    return of_query, of_key, of_value


def _only_infers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Say whether the kernel without gradients, which keeps no statistics of the rows, serves a call."""
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    fits = query.dtype != torch.float32 and query.shape[-1] <= 512 and query.shape[-1] % 16 == 0
    return not differentiates and fits and (mask is None or mask.shape[1] == 1)


@backend.serves("rms_norm", obstacle=_needs("npu_rms_norm"))
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Half-precision input with fp32 weight is served as it is; other mixtures are not.
    if weight.dtype != x.dtype:
        weight = weight.float()
    # The first argument has had two names.
    normed: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return normed.to(x.dtype)


@backend.serves("gelu_tanh", obstacle=_needs("npu_gelu"))
def _gelu_tanh(x: Tensor) -> Tensor:
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="tanh")
    return out


# CANN has no operator for these. Layer norm with weight and bias, and multiply-add, are single kernels there.
backend.serves("layer_norm_modulate", obstacle=_dtype_obstacle)(folded_modulate)
backend.serves("gated_residual", obstacle=_dtype_obstacle)(fused_residual)


_ROTARY_ROWS = 999  # batch * heads that one call of the interleaved kernel takes


def _rope_obstacle(case: Case) -> str | None:
    if case.num_heads > _ROTARY_ROWS:
        return f"npu_rotary_mul with interleaved pairs takes fewer than 1000 heads, got {case.num_heads}"
    if case.head_size >= 896:
        return f"npu_rotary_mul takes head sizes below 896, got {case.head_size}"
    return _dtype_obstacle(case)


@backend.serves("apply_rope", obstacle=_needs("npu_rotary_mul", _rope_obstacle))
def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # With half-precision input the kernel would round the tables to that precision, too.
    cos, sin = (part.float().repeat_interleave(2, -1)[None, :, None] for part in (cos, sin))  # (1, N, 1, d)
    exact = x.float()
    if x.shape[0] * x.shape[2] <= _ROTARY_ROWS:
        return _rotate(exact, cos, sin).to(x.dtype)
    parts = exact.split(_ROTARY_ROWS // x.shape[2])  # samples
    return torch.cat([_rotate(part, cos, sin) for part in parts]).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned: Tensor = torch.ops.npu.npu_rotary_mul(x, cos, sin, rotary_mode="interleave")
    return turned


@backend.serves("conv3d", obstacle=_dtype_obstacle)
def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    # 3-D convolutions fail in bf16 on some chips, and in fp32 most of their time goes into changing formats.
    if is_patches(weight, *settings):
        return by_patches(x, weight, bias)
    return by_taps(x, weight, bias, *settings)


# FFT kernels are missing or slow on some chips and CANN versions; matrix products are what the hardware is best at.
backend.serves("split_frequencies", obstacle=_dtype_obstacle)(splitter("dft", REAL_DFT))
