"""The tokens of a video shared among processes: Ulysses within groups of neighbours, a ring over the groups.

Each process runs the blocks on its own tokens. Only self attention needs all of them: there the processes of a Ulysses
group exchange, so that each has the group's tokens for its share of the heads; keys and values of these go around the
ring; and the group exchanges back. Shares of tokens and of heads may be unequal, and nothing is padded.

P processes in all, U of a Ulysses group, B batch, N tokens of the video, n of this process, M of its Ulysses group,
K heads, k of this process, d head size, D width, C channels.

diffusers' own context parallelism pads heads that do not share out evenly, and computes on them.

Sources: DeepSpeed Ulysses, arXiv 2309.14509; Fang and Zhao, USP, arXiv 2405.07719.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from flashi2v_model.kernels import attention_kernel
from flashi2v_model.layers import Attention
from flashi2v_model.parallel.degrees import choose_degrees, share
from flashi2v_model.parallel.gathering import gather
from flashi2v_model.parallel.ring import ring_attention
from flashi2v_model.transformer import FlashI2VTransformer3DModel


@dataclass(frozen=True)
class ContextGroups:
    """The processes that share a video, of which this is one.

    Attributes:
        all: all of them; number r * U + u is number u of the Ulysses group r.
        ulysses: those that exchange tokens for heads.
        ring: those at the same place of their Ulysses groups.
    """

    all: dist.ProcessGroup
    ulysses: dist.ProcessGroup
    ring: dist.ProcessGroup

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "ContextGroups":
        """Take the groups of a mesh with dimensions ring and ulysses, in this order; every process of it calls this."""
        both = mesh["ring", "ulysses"]
        return cls(both._flatten().get_group(), both["ulysses"].get_group(), both["ring"].get_group())


def parallelise_context(transformer: FlashI2VTransformer3DModel, groups: ContextGroups) -> None:
    """Let processes share the tokens of each video; all of them give and get the whole latent.

    Of a pipeline, every stage is treated so: tokens are shared out where they are embedded, gathered where the velocity
    is projected, and stay shared in between.

    Gradients are those of this process's share times the number of processes, so their mean over the processes is the
    whole gradient, as it is with data parallelism.

    Raises:
        InputError: a Ulysses group has more processes than there are heads.
        ValueError: (when called) the video has fewer tokens than there are processes.
    """
    context = _Context(groups)
    blocks = [*transformer.blocks.children()]
    attentions = [block.attn1 for block in blocks if isinstance(block.attn1, Attention)]
    for attention in attentions:
        choose_degrees(groups.all.size(), attention.num_heads, groups.ulysses.size(), groups.ring.size())
    if hasattr(transformer, "patch_embedding"):
        blocks[0].register_forward_pre_hook(context.share_tokens)
    for block, attention in zip(blocks, attentions, strict=True):
        block.register_forward_pre_hook(context.share_rope)
        attention.attend = context.attending(attention)
    if hasattr(transformer, "proj_out"):
        transformer.proj_out.register_forward_hook(context.gather_tokens)


class _Context:
    """What the hooks share: the groups, and how many tokens each process has."""

    def __init__(self, groups: ContextGroups) -> None:
        self._groups = groups
        self._size, self._rank = groups.all.size(), groups.all.rank()
        self._num_tokens: list[int] = []  # of every process

    def _own(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.tensor_split(self._size, dim)[self._rank]

    def share_tokens(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B, N, D) to (B, n, D), of the first block's input."""
        if args[0].shape[1] < self._size:
            raise ValueError(f"{args[0].shape[1]} tokens cannot be shared among {self._size} processes")
        return self._own(args[0], 1), *args[1:]

    def share_rope(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(N, d / 2) to (n, d / 2), of the tables that every block is given; they tell the number of tokens."""
        x, text, time, rope = args
        self._num_tokens = share(len(rope[0]), self._size)
        return x, text, time, tuple(self._own(table, 0) for table in rope)

    def attending(self, attention: Attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return what attends in place of an attention's own way: over the tokens of all processes."""
        alone, ulysses, ring = attention.attend, self._groups.ulysses, self._groups.ring

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = share(attention.num_heads, ulysses.size())
            of_groups = [sum(tokens) for tokens in self._of_groups()]
            if ulysses.size() > 1:
                query, key, value = self._to_heads(torch.cat((query, key, value)), heads).chunk(3)
            if ring.size() == 1:
                out = alone(query, key, value)
            else:
                backend = attention_kernel(getattr(attention.processor, "_attention_backend", None))
                out = ring_attention(query, key, value, of_groups, ring, backend)
            return self._to_tokens(out, heads) if ulysses.size() > 1 else out

        return attend

    def _of_groups(self) -> list[list[int]]:
        """Return the numbers of tokens of every process, by Ulysses groups."""
        size = self._groups.ulysses.size()
        return [self._num_tokens[first : first + size] for first in range(0, self._size, size)]

    def _to_heads(self, x: Tensor, heads: list[int]) -> Tensor:
        """(B, n, K, d) to (B, M, k, d)."""
        return _exchange(x, 2, heads, self._of_groups()[self._groups.ring.rank()], self._groups.ulysses)

    def _to_tokens(self, x: Tensor, heads: list[int]) -> Tensor:
        """(B, M, k, d) to (B, n, K, d)."""
        return _exchange(x, 1, self._of_groups()[self._groups.ring.rank()], heads, self._groups.ulysses)

    def gather_tokens(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """(B, n, C) to (B, N, C), behind the last projection, where a token is narrowest."""
        return gather(out, self._num_tokens, self._groups.all, dim=1)


def _exchange(x: Tensor, dim: int, shares: list[int], parts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Give each process its share of the tokens (dimension 1) or heads (2), with those of the other that all had.

    Args:
        x: (B, tokens, heads, d), whole along `dim`.
        dim: along which it is shared out.
        shares: of every process along `dim`.
        parts: of the other dimension, which every process had before; afterwards all of them are here.
        group: the processes.
    """
    own, batch, size = shares[group.rank()], len(x), x.shape[-1]
    row = x.numel() // x.shape[dim]
    sends, receives = [share * row for share in shares], [own * batch * part * size for part in parts]
    received = all_to_all_single_autograd(x.movedim(dim, 0).flatten(), receives, sends, group).split(receives)
    return torch.cat([x.view(own, batch, part, size).movedim(0, dim) for x, part in zip(received, parts)], 3 - dim)
