"""NVIDIA GPUs: the only file with CUDA extensions.

Attention by flash-attn where it is installed, else by cuDNN. For the other operators PyTorch's own CUDA kernels (the
`torch` backend) are the fast ones.
"""

import importlib
import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashi2v_npu_ops.registry import register

_CUDNN_CAPABILITY = (9, 0)  # PyTorch itself prefers cuDNN's attention from Hopper on, and not before


@cache
def flash_attn_fault() -> str | None:
    """Return why flash-attn cannot be used, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"flash-attn does not load ({error})"
    return None


def _obstacle(
    device: str, dtype: torch.dtype, few_heads: bool, head_size: int | None, aligned: bool, masked: bool
) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn and cuDNN take fp16 and bf16, got {dtype}"
    if masked:
        return "masks are served by PyTorch's own attention"
    capability = torch.cuda.get_device_capability()
    fault = flash_attn_fault()
    if fault is None:
        if capability < (8, 0):
            return f"flash-attn needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        return None if head_size in (128, 256) else "flash-attn takes head sizes up to 256"
    if capability < _CUDNN_CAPABILITY:
        return (
            f"{fault}, and cuDNN's attention is used from compute capability 9.0 on, "
            f"this GPU has {capability[0]}.{capability[1]}"
        )
    if not torch.backends.cudnn.is_available():
        return f"{fault}, and this build of PyTorch has no cuDNN"
    if head_size != 128 or not aligned:
        return f"{fault}, and cuDNN takes head sizes up to 128 that are divisible by 8"
    return None


@register("attention", "cuda", obstacle=_obstacle)
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: None, scale: float) -> Tensor:
    if flash_attn_fault() is None:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(query, key, value, softmax_scale=scale)  # (B, N, K, d)
        return out
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
