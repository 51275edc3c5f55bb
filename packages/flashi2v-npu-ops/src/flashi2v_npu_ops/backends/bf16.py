"""Attention of a model in fp32 computed in bf16, by name alone: on what a device multiplies several times as fast."""

import torch
from torch import Tensor

from flashi2v_npu_ops.registry import Backend, Case, fastest

backend = Backend("bf16")


def _obstacle(case: Case) -> str | None:
    return None if case.dtype == torch.float32 else f"it rounds fp32 to bf16, and got {case.dtype}"


@backend.serves("attention", obstacle=_obstacle)
def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Round queries, keys and values, and let the device's best kernel for bf16 attend."""
    num_heads, head_size = query.shape[2:]
    facts = query.device.type, torch.bfloat16, num_heads, head_size, mask is not None
    attend = fastest("attention", *facts)
    out: Tensor = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, scale)
    return out.to(query.dtype)
