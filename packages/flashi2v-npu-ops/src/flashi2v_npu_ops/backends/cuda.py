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

from flashi2v_npu_ops.registry import Backend, Case

backend = Backend("cuda", device="cuda")

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


def _obstacle(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn and cuDNN take fp16 and bf16, got {case.dtype}"
    if case.masked:
        return "masks are served by PyTorch's own attention"
    capability = torch.cuda.get_device_capability()
    mine = f"this GPU has {capability[0]}.{capability[1]}"
    fault = flash_attn_fault()
    if fault is None:
        if capability < (8, 0):
            return f"flash-attn needs compute capability 8.0, {mine}"
        return None if case.head_size <= 256 else f"flash-attn takes head sizes up to 256, got {case.head_size}"
    if capability < _CUDNN_CAPABILITY:
        return f"{fault}, and cuDNN's attention is used from compute capability 9.0 on, {mine}"
    if not torch.backends.cudnn.is_available():
        return f"{fault}, and this build of PyTorch has no cuDNN"
    if case.head_size > 128 or case.head_size % 8:
        return f"{fault}, and cuDNN takes head sizes up to 128 that are divisible by 8, got {case.head_size}"
    return None


@backend.serves("attention", obstacle=_obstacle)
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: None, scale: float) -> Tensor:
    if flash_attn_fault() is None:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(query, key, value, softmax_scale=scale)  # (B, N, K, d)
        return out
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
