"""A transformer shared among processes, from outside: its tokens (context parallelism) or its matrices (tensor).

Context parallelism: each process runs the blocks on its own tokens. Only self attention needs all of them: there the
processes exchange, so that each attends with all tokens for its share of the heads, and exchange back.

Tensor parallelism: each process has a share of the heads and of the MLP's hidden channels, and all tokens; what they
add up is summed over the processes behind each attention and each MLP.

P processes, B batch, N tokens of the video, n of this process, K heads, d head size, D width, C channels.

Sources: DeepSpeed Ulysses, arXiv 2309.14509; Megatron-LM, arXiv 1909.08053.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from flashi2v_model.errors import InputError
from flashi2v_model.layers import Attention, RMSNorm
from flashi2v_model.transformer import FlashI2VTransformer3DModel


def parallelise_tensors(transformer: FlashI2VTransformer3DModel, mesh: DeviceMesh) -> None:
    """Let the processes of a mesh share the matrices of each block; all of them give and get the whole latent.

    Sharded parameters become `DTensor`s; the others stay as they are, the same on every process, and so do their
    gradients.

    Args:
        transformer: whole, or a pipeline stage's part.
        mesh: one dimension.

    Raises:
        InputError: the processes do not divide the number of heads.
    """
    check_degree(mesh.size(), transformer.config.num_attention_heads, "tensor")
    for block in transformer.blocks.children():
        plan: dict[str, Any] = {**_by_rows(block, "ffn.net.0.proj"), **_by_columns(block, "ffn.net.2")}
        texts: dict[str, Placement] = {"encoder_hidden_states": Replicate()}
        for name, inputs in (("attn1", None), ("attn2", texts)):
            plan |= {
                # Converted once for the three projections, so that their gradients are summed in one go.
                name: PrepareModuleInput(
                    input_layouts=Replicate(),
                    desired_input_layouts=Replicate(),
                    input_kwarg_layouts=inputs,
                    desired_input_kwarg_layouts=inputs,
                ),
                **_by_rows(block, f"{name}.to_q"),
                **_by_rows(block, f"{name}.to_k"),
                **_by_rows(block, f"{name}.to_v"),
                **_by_columns(block, f"{name}.to_out.0"),
            }
        parallelize_module(block, mesh, plan)
        for name in ("attn1", "attn2"):
            attention = block.get_submodule(name)
            assert isinstance(attention, Attention)
            attention.num_heads //= mesh.size()
            for norm in (attention.norm_q, attention.norm_k):
                if isinstance(norm, RMSNorm):
                    _share_norm(norm, mesh)


def _by_rows(block: nn.Module, name: str) -> dict[str, Any]:
    """Give each process rows of a matrix; of its adapters all of A, and rows of B."""
    if (downs := getattr(block.get_submodule(name), "lora_A", None)) is None:
        return {name: ColwiseParallel()}
    for down in downs.values():
        down.register_forward_pre_hook(_as_local)
    return {f"{name}.base_layer": ColwiseParallel()} | {f"{name}.lora_B.{key}": ColwiseParallel() for key in downs}


def _by_columns(block: nn.Module, name: str) -> dict[str, Any]:
    """Give each process columns of a matrix; of its adapters columns of A, and all of B."""
    if (downs := getattr(block.get_submodule(name), "lora_A", None)) is None:
        return {name: RowwiseParallel()}
    return {f"{name}.base_layer": RowwiseParallel()} | {f"{name}.lora_A.{key}": RowwiseParallel() for key in downs}


def _as_local(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in args)


def _share_norm(norm: RMSNorm, mesh: DeviceMesh) -> None:
    """Normalise (B, N, D / P) by the mean square over the full width D, which all processes have a part of."""
    norm.weight = nn.Parameter(
        distribute_tensor(norm.weight.detach(), mesh, [Shard(0)]), requires_grad=norm.weight.requires_grad
    )
    group = mesh.get_group()

    def normalise(x: Tensor) -> Tensor:
        weight = norm.weight.to_local() if isinstance(norm.weight, DTensor) else norm.weight
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = _Sum.apply(exact.square().mean(-1, keepdim=True), group) / group.size()
        return (exact * torch.rsqrt(mean_square + norm.eps) * weight.to(exact.dtype)).to(x.dtype)

    norm.forward = normalise  # type: ignore[method-assign]


class _Sum(torch.autograd.Function):
    """The sum over the processes of a group; backwards the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def check_degree(size: int, num_heads: int, kind: str = "context") -> None:
    """Refuse a number of processes among which heads cannot be shared out evenly.

    Raises:
        InputError: with the numbers that can be used.
    """
    if size < 1 or num_heads % size:
        divisors = [str(number) for number in range(1, num_heads + 1) if num_heads % number == 0]
        raise InputError(
            f"a {kind} parallel size of {size} does not divide the {num_heads} heads: use one of {', '.join(divisors)}"
        )


def parallelise_context(transformer: FlashI2VTransformer3DModel, group: dist.ProcessGroup) -> None:
    """Let the processes of a group share the tokens of each video; all of them give and get the whole latent.

    Of a pipeline, every stage is treated so: tokens are shared out where they are embedded, gathered where the velocity
    is projected, and stay shared in between.

    Gradients are those of this process's share times the size of the group, so their mean over the group is the whole
    gradient, as it is with data parallelism.

    Raises:
        InputError: the size of the group does not divide the number of heads.
        ValueError: (when called) the video has fewer tokens than the group has processes.
    """
    check_degree(group.size(), transformer.config.num_attention_heads)
    context = _Context(group)
    blocks = [*transformer.blocks.children()]
    if hasattr(transformer, "patch_embedding"):
        blocks[0].register_forward_pre_hook(context.share_tokens)
    for block in blocks:
        block.register_forward_pre_hook(context.share_rope)
        attention = block.get_submodule("attn1")
        assert isinstance(attention, Attention)
        attention.attend = context.attending(attention.attend)
    if hasattr(transformer, "proj_out"):
        transformer.proj_out.register_forward_hook(context.gather_tokens)


class _Context:
    """What the hooks share: the group, and how many tokens each of its processes has."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = group.rank()
        self._num_tokens: list[int] = []

    def _own(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.tensor_split(self._group.size(), dim)[self._rank]

    def share_tokens(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(B, N, D) to (B, n, D), of the first block's input."""
        if args[0].shape[1] < self._group.size():
            raise ValueError(f"{args[0].shape[1]} tokens cannot be shared among {self._group.size()} processes")
        return self._own(args[0], 1), *args[1:]

    def share_rope(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """(N, d / 2) to (n, d / 2), of the tables that every block is given; they tell the number of tokens."""
        x, text, time, rope = args
        self._num_tokens = [len(part) for part in rope[0].tensor_split(self._group.size())]
        return x, text, time, tuple(self._own(table, 0) for table in rope)

    def attending(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """Wrap an attention over (B, N, K / P, d) as one over (B, n, K, d)."""

        def exchange(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = self._to_heads(torch.cat((query, key, value))).chunk(3)
            return self._to_tokens(attend(query, key, value))

        return exchange

    def _to_heads(self, x: Tensor) -> Tensor:
        """(B, n, K, d) to (B, N, K / P, d)."""
        size = self._group.size()
        send = x.unflatten(2, (size, -1)).movedim(2, 0)  # (P, B, n, K / P, d)
        _, batch, own, heads, dim = send.shape
        token = batch * heads * dim
        counts = [token * num for num in self._num_tokens]
        received = all_to_all_single_autograd(send.flatten(), counts, [token * own] * size, self._group)
        parts = zip(received.split(counts), self._num_tokens)
        return torch.cat([part.view(batch, num, heads, dim) for part, num in parts], 1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(B, N, K / P, d) to (B, n, K, d)."""
        batch, _, heads, dim = x.shape
        token, own, size = batch * heads * dim, self._num_tokens[self._rank], self._group.size()
        received = all_to_all_single_autograd(
            torch.cat([part.flatten() for part in x.split(self._num_tokens, 1)]),
            [token * own] * size,
            [token * num for num in self._num_tokens],
            self._group,
        )
        return received.view(size, batch, own, heads, dim).movedim(0, 2).flatten(2, 3)

    def gather_tokens(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """(B, n, C) to (B, N, C), behind the last projection, where a token is narrowest."""
        gathered: Tensor = _Gather.apply(out, self._num_tokens, self._group)
        return gathered


class _Gather(torch.autograd.Function):
    """Tokens of all processes, (B, n, C) to (B, N, C); backwards the sum of all their gradients for one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_tokens: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.num_tokens, ctx.group = num_tokens, group
        most = max(num_tokens)  # collectives of equal parts work with every backend
        padded = nn.functional.pad(x, (0, 0, 0, most - x.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in num_tokens]
        dist.all_gather(parts, padded, group)
        return torch.cat([part[:, :num] for part, num in zip(parts, num_tokens)], 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.num_tokens, 1)[ctx.group.rank()], None, None
