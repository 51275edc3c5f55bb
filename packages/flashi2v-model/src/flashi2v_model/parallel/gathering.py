"""What processes have parts of, whole on each of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def gather(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup, dim: int) -> Tensor:
    """Return the parts of all processes, one behind the other.

    Args:
        x: of this process.
        lengths: of every process's part along `dim`, which need not be equal.
        group: of the processes.
        dim: along which they are parts.

    Returns:
        the whole; backwards, each process's gradient is the sum of all that is asked of its part.
    """
    whole: Tensor = _Gather.apply(x, [*lengths], group, dim)
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.lengths, ctx.group, ctx.dim = lengths, group, dim
        most = max(lengths)  # collectives of equal parts work with every backend
        padding = [0, 0] * (x.dim() - 1 - dim) + [0, most - x.shape[dim]]
        padded = F.pad(x, padding).contiguous()
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group)
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths)], dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.lengths, ctx.dim)[ctx.group.rank()], None, None, None
