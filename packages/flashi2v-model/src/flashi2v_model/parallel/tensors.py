"""The matrices of a transformer shared among processes (tensor parallelism).

Each process has a share of the heads and of the MLP's hidden channels, and all tokens; what they add up is summed over
the processes behind each attention and each MLP.

P processes, B batch, N tokens of the video, D width.

Source: Megatron-LM, arXiv 1909.08053.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from flashi2v_model.layers import Attention, RMSNorm
from flashi2v_model.parallel.degrees import check_heads
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
    check_heads(mesh.size(), transformer.config.num_attention_heads)
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
