"""PyTorch's own fused paths, on any device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashi2v_npu_ops.backends.half_spectrum import REAL_FFT, splitter
from flashi2v_npu_ops.operators.rope import real_rope
from flashi2v_npu_ops.registry import Backend, Case

backend = Backend("torch")

# Up to so many tokens the CPU's kernel takes up to five times as long for gradients in bf16 or fp16 as in fp32
# (torch 2.13); with more there is no such difference.
_SHORT = 256


@backend.serves("attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype = query.dtype
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    if query.device.type == "cpu" and query.shape[2] <= _SHORT and dtype.itemsize == 2 and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(dtype)  # (B, N, K, d)


@backend.serves("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype == weight.dtype:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # Given two dtypes, F.rms_norm would round to the input's before it multiplies by the weight.
    exact = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(exact), x.shape[-1:], weight.to(exact), eps).to(x.dtype)


@backend.serves("layer_norm_modulate")
def folded_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Let the norm's own weight and bias carry the modulation where all tokens share it: one kernel."""
    dtype, width = x.dtype, x.shape[-1:]
    exact = torch.promote_types(dtype, torch.float32)
    x, weight, bias = x.to(exact), 1 + scale.to(exact), shift.to(exact)
    if scale.shape[0] == scale.shape[1] == 1:
        return F.layer_norm(x, width, weight.flatten(), bias.flatten(), eps).to(dtype)
    return torch.addcmul(bias, F.layer_norm(x, width, eps=eps), weight).to(dtype)


@backend.serves("gated_residual")
def fused_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Multiply and add in one kernel."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(exact), update.to(exact), gate.to(exact)).to(x.dtype)


def _complex_obstacle(case: Case) -> str | None:
    return "complex numbers are slow on NPUs" if case.device == "npu" else None


@backend.serves("apply_rope", obstacle=_complex_obstacle)
def _apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a compiler fuses the real arithmetic into one kernel, and has no complex ones
        return real_rope(x, cos, sin)
    exact = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(exact).unflatten(-1, (-1, 2)).contiguous())  # (B, N, K, d/2)
    turned = pairs * torch.complex(cos.to(exact), sin.to(exact))[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@backend.serves("gelu_tanh")
def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _conv3d_obstacle(case: Case) -> str | None:
    fails = case.device == "npu" and case.dtype == torch.bfloat16
    return "3-D convolutions in bf16 fail on some NPUs" if fails else None


@backend.serves("conv3d", obstacle=_conv3d_obstacle)
def _conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    return F.conv3d(x, weight, bias, *settings)


def _fft_obstacle(case: Case) -> str | None:
    return "some NPUs have no FFT, and complex numbers are slow on all" if case.device == "npu" else None


backend.serves("split_frequencies", obstacle=_fft_obstacle)(splitter("fft", REAL_FFT))
