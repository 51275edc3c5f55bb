"""PyTorch's own fused paths, on any device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashi2v_npu_ops.backends.half_spectrum import REAL_FFT, splitter
from flashi2v_npu_ops.operators.rope import real_rope
from flashi2v_npu_ops.registry import Backend, Case

backend = Backend("torch")

# Up to so many tokens, and with as few pairs of a query and a key, the CPU's kernel takes up to eight times as long for
# gradients in bf16 or fp16 as in fp32 (torch 2.13); with more there is no such difference.
_SHORT = 256


@backend.serves("attention")
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    dtype = query.dtype
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    is_short = query.shape[2] <= _SHORT or query.shape[2] * key.shape[2] < _SHORT**2
    if is_short and query.device.type == "cpu" and dtype.itemsize == 2 and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).to(dtype)  # (B, N, K, d)


def _part_obstacle(case: Case) -> str | None:
    if case.device == "cuda":
        if case.dtype == torch.float64:
            return "PyTorch's attention for CUDA that returns the log-sum-exp takes fp32, bf16 and fp16"
        if case.head_size % 8 or case.head_size > 256:
            return f"it takes head sizes up to 256 that are divisible by 8, got {case.head_size}"
    elif case.device not in ("cpu", "meta"):
        return f"PyTorch has no attention for {case.device} that returns the log-sum-exp"
    return None


@backend.serves("attention_part", obstacle=_part_obstacle)
def _attention_part(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    aten, device = torch.ops.aten, query.device.type
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    if device != "cuda":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    elif query.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)
        lse = lse[..., : query.shape[2]]  # it comes padded
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return out.transpose(1, 2), lse


@backend.serves("attention_part_grad", obstacle=_part_obstacle)
def _attention_part_grad(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    aten, device, dtype = torch.ops.aten, query.device.type, query.dtype
    if device == "cpu" and query.shape[1] <= _SHORT and dtype.itemsize == 2:
        query, key, value, grad, out = (x.float() for x in (query, key, value, grad, out))
    query, key, value, grad, out = (x.transpose(1, 2) for x in (query, key, value, grad, out))  # (B, K, N, d)
    given = grad, query, key, value
    if device != "cuda":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = backward(*given, out, lse, 0.0, False, scale=scale)
    elif dtype == torch.float32:
        seed = torch.zeros((), dtype=torch.int64, device=query.device)  # of a dropout that there is not
        lse = F.pad(lse, (0, -lse.shape[-1] % 32))
        backward = aten._scaled_dot_product_efficient_attention_backward
        found = backward(*given, None, out, lse, seed, seed, 0.0, [True, True, True, False], scale=scale)
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        lengths = None, None, query.shape[2], key.shape[2]
        backward = aten._scaled_dot_product_flash_attention_backward
        found = backward(*given, out, lse.contiguous(), *lengths, 0.0, False, seed, seed, scale=scale)
    of_query, of_key, of_value = (x.transpose(1, 2).to(dtype) for x in found[:3])
    return of_query, of_key, of_value


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
