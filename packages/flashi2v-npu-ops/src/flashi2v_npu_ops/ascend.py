"""Ascend NPUs: the only file that imports torch_npu, and the `ascend` backend of every operator.

torch_npu is an optional extra. It needs CANN, and imports of it fail without, so it is imported only when an NPU is
asked for. Its operators are reached as `torch.ops.npu.*`; limits and meanings are those of Ascend's operator pages
(op-plugin, torch_npu APIs) for Atlas A2, and argument names those that all torch_npu since 2.6 share.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from flashi2v_npu_ops.fourier import REAL_DFT, splitter
from flashi2v_npu_ops.modulation import folded_modulate, fused_residual
from flashi2v_npu_ops.optimizer import fused, fused_obstacle
from flashi2v_npu_ops.registry import register

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def missing() -> str | None:
    """Return why this process cannot use an NPU, with what mends it, or None."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed: pip install 'flashi2v-npu-ops[npu]' on the Ascend machine"
    autoload = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD")
    try:
        import torch_npu
    except Exception as error:  # anything: it patches torch, and one that does not fit fails in ways of its own
        reason = f"{type(error).__name__}: {error}"
        return f"torch_npu does not load ({reason}): install CANN and source its set_env.sh in this shell"
    finally:  # torch_npu switches this off, and leaves it so where its import fails
        if autoload is None:
            os.environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        else:
            os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = autoload
    if not torch_npu.npu.is_available():
        return "torch_npu sees no NPU: check npu-smi info and ASCEND_RT_VISIBLE_DEVICES"
    return None


def _dtype_obstacle(device: str, dtype: torch.dtype, *facts: object) -> str | None:
    return None if dtype in _DTYPES else f"Ascend kernels take fp32, bf16 and fp16, got {dtype}"


def _attention_obstacle(
    device: str, dtype: torch.dtype, few_heads: bool, head_size: int | None, aligned: bool, masked: bool
) -> str | None:
    if not few_heads:
        return "npu_fusion_attention takes up to 256 heads"
    if head_size is None:
        return "npu_fusion_attention takes head sizes up to 768"
    return _dtype_obstacle(device, dtype)


@register("attention", "ascend", obstacle=_attention_obstacle)
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
    out: Tensor = torch.ops.npu.npu_fusion_attention(
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


@register("rms_norm", "ascend", obstacle=_dtype_obstacle)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Half-precision input with fp32 weight is served as it is; other mixtures are not.
    if weight.dtype != x.dtype:
        weight = weight.float()
    # The first argument has had two names.
    normed: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return normed.to(x.dtype)


@register("gelu_tanh", "ascend", obstacle=_dtype_obstacle)
def _gelu_tanh(x: Tensor) -> Tensor:
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="tanh")
    return out


# CANN has no operator for these. Layer norm with weight and bias, and multiply-add, are single kernels there.
register("layer_norm_modulate", "ascend", obstacle=_dtype_obstacle)(folded_modulate)
register("gated_residual", "ascend", obstacle=_dtype_obstacle)(fused_residual)


def _rope_obstacle(device: str, dtype: torch.dtype, few_rows: bool, narrow: bool) -> str | None:
    if not few_rows:
        return "npu_rotary_mul with interleaved pairs takes fewer than 1000 batch * heads"
    if not narrow:
        return "npu_rotary_mul takes head sizes below 896"
    return _dtype_obstacle(device, dtype)


@register("apply_rope", "ascend", obstacle=_rope_obstacle)
def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # With half-precision input the kernel would round the tables to that precision, too.
    cos, sin = (part.float().repeat_interleave(2, -1)[None, :, None] for part in (cos, sin))  # (1, N, 1, d)
    turned: Tensor = torch.ops.npu.npu_rotary_mul(x.float(), cos, sin, rotary_mode="interleave")
    return turned.to(x.dtype)


# FFT kernels are missing or slow on some chips and CANN versions; matrix products are what the hardware is best at.
register("split_frequencies", "ascend", obstacle=_dtype_obstacle)(splitter("dft", REAL_DFT))

# PyTorch's own fused AdamW is one kernel per parameter on an NPU. torch_npu's NpuFusedAdamW is not used: it moves all
# parameters into one flat buffer, which sharded parameters (FSDP2) do not survive, and refuses bf16.
register("fused_adamw", "ascend", obstacle=fused_obstacle)(fused)
