"""Operators of torch_npu as Ascend's pages describe them, in plain PyTorch: what they compute, and what they refuse.

Sources: op-plugin, custom APIs of torch_npu, for Atlas A2; facts that only the adapter's source tells are marked. Names
and defaults of arguments are those that all torch_npu since 2.6 share. Each runs on any device that has PyTorch's own
operators, so autograd sees through it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HIDDEN = -40000.0  # the score of what a mask hides: a row that is hidden as a whole attends to all
_ALL = 2147483647


class RefusedError(RuntimeError):
    """An Ascend device would not compute this."""


def _require(fact: bool, limit: str) -> None:
    if not fact:
        raise RefusedError(f"Ascend refuses this call: {limit}")


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _ALL,
    next_tockens: int = _ALL,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attend, in layouts BSND and BNSD without dropout; a mask's True is masked OUT.

    Returns:
        the result, the maximum and the sum of each row's softmax (B, N, S, 8), nothing, and a random state of zeros.
    """
    plain = pse is None and padding_mask is None and (keep_prob, sparse_mode) == (1.0, 0) and inner_precise == 0
    plain = plain and prefix is None and actual_seq_qlen is None and actual_seq_kvlen is None
    _require(plain and input_layout in ("BSND", "BNSD"), "the emulation knows plain attention in BSND and BNSD only")
    if input_layout == "BSND":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    batch, num_heads, num_queries, head_size = query.shape
    _require(head_num == num_heads <= 256, f"head_num is {head_num}, the query has {num_heads} heads, the limit is 256")
    _require(head_size <= 768, f"a head size of {head_size}, the limit is 768")
    _require(query.dtype == key.dtype == value.dtype and query.dtype in _DTYPES, f"query, key or value {query.dtype}")
    scores = query.float() @ key.float().transpose(-1, -2) * scale  # (B, N, S, T)
    if atten_mask is not None:
        full = (batch, num_heads, num_queries, key.shape[2])
        _require(atten_mask.dtype in (torch.bool, torch.uint8), f"a mask of {atten_mask.dtype}")
        allowed = {full, (batch, 1, *full[2:]), (1, 1, *full[2:]), full[2:]}
        _require(tuple(atten_mask.shape) in allowed, f"a mask of shape {tuple(atten_mask.shape)}")
        scores = scores.masked_fill(atten_mask.bool(), _HIDDEN)
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    largest = scores.detach().amax(-1, keepdim=True)
    total = (scores.detach() - largest).exp().sum(-1, keepdim=True)
    largest, total = (part.expand(-1, -1, -1, 8).contiguous() for part in (largest, total))
    return out.transpose(1, 2) if input_layout == "BSND" else out, largest, total, out.new_empty(0), 0, 0, 0


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    softmax_lse_flag: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Attend without gradients, in half precision; a mask's True is masked OUT.

    Returns:
        the result, and the log-sum-exp of its rows (B, N, S, 1), or nothing.
    """
    _require(not more and num_key_value_heads in (0, num_heads), "the emulation knows plain attention only")
    _require(query.dtype != torch.float32, "inference in fp32: fp16 and bf16")
    head_size = query.shape[-1]
    _require(head_size <= 512 and head_size % 16 == 0, f"a head size of {head_size}: up to 512, divisible by 16")
    _require(atten_mask is None or atten_mask.dim() < 4 or atten_mask.shape[1] == 1, "a mask for each head")
    out, largest, total, *_ = npu_fusion_attention(
        query, key, value, num_heads, input_layout, atten_mask=atten_mask, scale=scale
    )
    return out, (largest + total.log())[..., :1] if softmax_lse_flag else out.new_empty(0)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalise in fp32; the weight has the input's dtype, or is fp32. Returns the result and 1 / rms (..., 1)."""
    _require(input.dtype in _DTYPES, f"an input of {input.dtype}")
    _require(gamma.dtype in (input.dtype, torch.float32), f"a weight of {gamma.dtype} beside an input of {input.dtype}")
    exact = input.float()
    reciprocal = torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilon)
    return (exact * reciprocal * gamma.float()).to(input.dtype), reciprocal


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    """Turn adjacent pairs (interleave), or the two halves of the head against each other; layout BSND."""
    batch, length, num_heads, head_size = input.shape
    _require(rotary_mode in ("half", "interleave"), f"rotary_mode {rotary_mode!r}")
    _require(batch * num_heads < 1000, f"{batch} samples of {num_heads} heads: fewer than 1000 in all")
    _require(head_size < 896 and head_size % 2 == 0, f"a head size of {head_size}: even and below 896")
    _require(r1.shape == r2.shape == (1, length, 1, head_size), f"tables of shape {tuple(r1.shape)}")
    _require(input.dtype in _DTYPES, f"an input of {input.dtype}")
    r1, r2 = r1.to(input.dtype), r2.to(input.dtype)  # the adapter rounds the tables
    if rotary_mode == "interleave":
        turned = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = input.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return input * r1 + turned * r2


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Apply GELU, exact or by tanh."""
    _require(input.dtype in _DTYPES, f"an input of {input.dtype}")
    return torch.nn.functional.gelu(input, approximate=approximate)


# What the adapter itself calls for the gradients, in the order of the schemas' results.
def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, **more: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, and nothing for what plain attention lacks.

    The softmax's weights are those that its maximum and sum make, of this call's keys or of more.
    """
    mask, scale, dtype = more.get("atten_mask"), more.get("scale_value", 1.0), query.dtype
    largest, total, out = (more[name] for name in ("softmax_max", "softmax_sum", "attention_in"))
    flat = input_layout == "BSND"
    q, k, v, g, o = (x.float().transpose(1, 2) if flat else x.float() for x in (query, key, value, dy, out))
    _require(largest.shape == total.shape == (*q.shape[:3], 8), f"sums of the softmax of shape {tuple(largest.shape)}")
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(mask.bool(), _HIDDEN)
    weights = (scores - largest[..., :1]).exp() / total[..., :1]
    of_scores = weights * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
    if mask is not None:
        of_scores = of_scores.masked_fill(mask.bool(), 0)
    found = of_scores @ k, of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g
    of_query, of_key, of_value = ((x.transpose(1, 2) if flat else x).to(dtype) for x in found)
    nothing = query.new_empty(0)
    return of_query, of_key, of_value, nothing, nothing


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight; the latter is fp32."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        # With the reciprocal as given epsilon is not needed: rstd^-2 is the mean square and epsilon together.
        exact = x.float()
        mean = exact.square().mean(-1, keepdim=True)
        return exact * torch.rsqrt(mean + (rstd.pow(-2) - mean).detach()) * weight

    of_input, of_weight = gradients(norm, (input, gamma.float()), dy.float())
    return of_input, of_weight


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input and of both tables."""
    turn = partial(npu_rotary_mul, rotary_mode=rotary_mode)
    of_input, of_first, of_second = gradients(turn, (input, r1, r2), grad)
    return of_input, of_first, of_second


def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    """Return the input's gradient."""
    return gradients(lambda x: npu_gelu(x, approximate=approximate), (input,), grad_output)[0]


def cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert to another dtype: `_npu_dtype_cast`, and its gradient."""
    return input.to(dtype)


def matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `torch.matmul`, for which torch_npu has an operator of its own, of those asked for."""
    found = gradients(torch.matmul, (self, other), grad)
    return found[0] if mask[0] else None, found[1] if mask[1] else None


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
    """Convolve; half precision is summed up in fp32, as an Ascend device does, and many times faster than a CPU's."""
    exact = (None if part is None else part.float() for part in (input, weight, bias))
    return torch.ops.aten.convolution(*exact, *settings).to(input.dtype)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `function(*inputs)` for `grad`, also within a kernel, where autograd is switched off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradOther, DispatchKey.AutogradNestedTensor, DispatchKey.AutogradCPU):
        excluded = excluded - torch._C.DispatchKeySet(key)
    with (
        torch.inference_mode(False),
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.enable_grad(),
    ):
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        return torch.autograd.grad(function(*leaves), leaves, grad)


# The operators npu:: that have a kernel here, by name.
FUSED: dict[str, Callable[..., Any]] = {
    "npu_fusion_attention": npu_fusion_attention,
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_fusion_attention_grad": npu_fusion_attention_grad,
    "npu_rms_norm": npu_rms_norm,
    "npu_rms_norm_backward": npu_rms_norm_backward,
    "npu_rotary_mul": npu_rotary_mul,
    "npu_rotary_mul_backward": npu_rotary_mul_backward,
    "npu_gelu": npu_gelu,
    "npu_gelu_backward": npu_gelu_backward,
    "_npu_dtype_cast": cast,
    "_npu_dtype_cast_backward": cast,
}
