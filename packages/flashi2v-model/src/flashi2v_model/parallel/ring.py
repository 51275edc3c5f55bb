"""Attention over keys that go around a ring of processes, forwards and backwards.

B batch, n queries of this process, m keys of one, K heads, d head size.

Each process keeps its queries, attends to the keys that it has, and passes these on while it does so. The parts are
merged by their log-sum-exp. Backwards keys and values go around once more, and their gradients with them, one step
behind, until they are home.

PyTorch's ring (torch.distributed.tensor.experimental) wants equal lengths; that of diffusers pads unequal ones and
gathers the keys of all processes in each, which a ring is there to avoid. Hence this one.

Source: Liu et al., Ring attention, arXiv 2310.01889.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashi2v_npu_ops import attention_part, attention_part_grad, merge_parts


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], group: dist.ProcessGroup, backend: str = "auto"
) -> Tensor:
    """Return attention over the keys of all processes of a group.

    Args:
        query: (B, n, K, d), of this process.
        key: (B, m, K, d), of this process.
        value: (B, m, K, d), of this process.
        lengths: m of every process.
        group: the ring, in the order of its ranks.
        backend: of `flashi2v_npu_ops.attention_part`.

    Returns:
        (B, n, K, d).
    """
    out: Tensor = _Ring.apply(query, torch.stack((key, value)), [*lengths], group, backend)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, own: Tensor, lengths: list[int], group: dist.ProcessGroup, backend: str
    ) -> Tensor:
        ring, block = _Place(group, lengths), own  # (2, B, m, K, d)
        for step in range(ring.size):
            passing = ring.pass_on(block, step) if step + 1 < ring.size else None
            part, part_lse = attention_part(query, block[0], block[1], backend=backend)
            if step == 0:
                out, lse = part.to(torch.promote_types(part.dtype, torch.float32)), part_lse
            else:
                out, lse = merge_parts(out, lse, part, part_lse)
            if passing is not None:
                block = passing.arrived()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, own, out, lse)
        ctx.lengths, ctx.group, ctx.backend = lengths, group, backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, block, out, lse = ctx.saved_tensors
        ring, exact = _Place(ctx.group, ctx.lengths), torch.promote_types(query.dtype, torch.float32)
        of_query: Tensor = torch.zeros_like(query, dtype=exact)
        gradients: _Passing | None = None
        for step in range(ring.size):
            passing = ring.pass_on(block, step) if step + 1 < ring.size else None
            part, *of_block = attention_part_grad(query, block[0], block[1], grads[0], out, lse, backend=ctx.backend)
            of_query += part
            summed = torch.stack(of_block).to(exact)
            if gradients is not None:
                summed += gradients.arrived()
            gradients = ring.pass_on(summed, step)
            if passing is not None:
                block = passing.arrived()
        assert gradients is not None
        return of_query.to(query.dtype), gradients.arrived().to(query.dtype), None, None, None


class _Place:
    """This process's place in the ring: in step s it has the block of the process s places before it."""

    def __init__(self, group: dist.ProcessGroup, lengths: Sequence[int]) -> None:
        self._group, self._lengths = group, lengths
        self.size, self._rank = group.size(), group.rank()

    def pass_on(self, block: Tensor, step: int) -> "_Passing":
        """Send a block (2, B, m, K, d) to the next process, and receive that of the step after this one."""
        shape = [*block.shape]
        shape[2] = self._lengths[(self._rank - step - 1) % self.size]
        block, incoming = block.contiguous(), block.new_empty(shape)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, group=self._group, group_peer=(self._rank + 1) % self.size),
                dist.P2POp(dist.irecv, incoming, group=self._group, group_peer=(self._rank - 1) % self.size),
            ]
        )
        return _Passing(incoming, block, works)


class _Passing:
    """A block on its way; what is sent is kept until it is gone."""

    def __init__(self, incoming: Tensor, outgoing: Tensor, works: list[dist.Work]) -> None:
        self._incoming, self._outgoing, self._works = incoming, outgoing, works

    def arrived(self) -> Tensor:
        """Wait for it."""
        for work in self._works:
            work.wait()
        return self._incoming
