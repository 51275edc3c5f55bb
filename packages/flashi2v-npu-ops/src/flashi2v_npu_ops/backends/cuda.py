"""NVIDIA GPUs: the only file with CUDA extensions.

Attention by flash-attn where it is installed, else by cuDNN; by name alone also by cuDNN from Ampere on, and by
flash-attn 3. For the other operators PyTorch's own CUDA kernels (the `torch` backend) are the fast ones.
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
# "auto" takes neither: which of the three is the fastest was never measured.
cudnn = Backend("cudnn", device="cuda")
flash3 = Backend("flash3", device="cuda")

_CUDNN_CAPABILITY = (9, 0)  # PyTorch itself prefers cuDNN's attention from Hopper on, and not before


@cache
def flash_attn_fault(module: str = "flash_attn", name: str = "flash-attn") -> str | None:
    """Return why flash-attn, or its version 3 for Hopper, which is a module of its own, cannot be used, or None."""
    if importlib.util.find_spec(module) is None:
        return f"{name} is not installed"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
        return f"{name} does not load ({error})"
    return None


def _general_obstacle(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn and cuDNN take fp16 and bf16, got {case.dtype}"
    return "masks are served by PyTorch's own attention" if case.masked else None


def _flash_obstacle(case: Case, name: str, needed: tuple[int, int]) -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        return f"{name} needs compute capability {needed[0]}.{needed[1]}, {_mine(capability)}"
    return None if case.head_size <= 256 else f"{name} takes head sizes up to 256, got {case.head_size}"


def _cudnn_obstacle(case: Case) -> str | None:
    if not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    if case.head_size > 128 or case.head_size % 8:
        return f"cuDNN takes head sizes up to 128 that are divisible by 8, got {case.head_size}"
    return None


def _mine(capability: tuple[int, int]) -> str:
    return f"this GPU has {capability[0]}.{capability[1]}"


def _obstacle(case: Case) -> str | None:
    if (reason := _general_obstacle(case)) is not None:
        return reason
    fault = flash_attn_fault()
    if fault is None:
        return _flash_obstacle(case, "flash-attn", (8, 0))
    capability = torch.cuda.get_device_capability()
    if capability < _CUDNN_CAPABILITY:
        return f"{fault}, and cuDNN's attention is used from compute capability 9.0 on, {_mine(capability)}"
    reason = _cudnn_obstacle(case)
    return None if reason is None else f"{fault}, and {reason}"


@backend.serves("attention", obstacle=_obstacle)
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: None, scale: float) -> Tensor:
    if flash_attn_fault() is None:
        from flash_attn import flash_attn_func

        out: Tensor = flash_attn_func(query, key, value, softmax_scale=scale)  # (B, N, K, d)
        return out
    return _by_cudnn(query, key, value, mask, scale)


def _cudnn_by_name_obstacle(case: Case) -> str | None:
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"cuDNN's attention needs compute capability 8.0, {_mine(capability)}"
    return _general_obstacle(case) or _cudnn_obstacle(case)


@cudnn.serves("attention", obstacle=_cudnn_by_name_obstacle)
def _by_cudnn(query: Tensor, key: Tensor, value: Tensor, mask: None, scale: float) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, K, N, d)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def _flash3_obstacle(case: Case) -> str | None:
    fault = flash_attn_fault("flash_attn_interface", "flash-attn 3")
    return _general_obstacle(case) or fault or _flash_obstacle(case, "flash-attn 3", (9, 0))


@flash3.serves("attention", obstacle=_flash3_obstacle)
def _by_flash3(query: Tensor, key: Tensor, value: Tensor, mask: None, scale: float) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(query, key, value, softmax_scale=scale)  # (B, N, K, d), in older ones with the log-sum-exp
    return out[0] if isinstance(out, tuple) else out
