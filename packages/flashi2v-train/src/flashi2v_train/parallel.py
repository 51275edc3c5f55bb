"""Processes: who they are, how they are grouped, and how a transformer is spread over them, from outside."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.parallel import parallelise_context, parallelise_tensors
from flashi2v_npu_ops.device import claim_device, collective_backend
from flashi2v_npu_ops.registry import check_environment
from flashi2v_train.layout import Layout
from flashi2v_train.options import LayoutOptions

# What torchrun tells every process, and what holds for the only one.
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1}


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, from 0, and of all processes of this run."""
    rank, size = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
    return rank, size


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: of this process, from 0.
        device: its own.
        layout: degrees of parallelism.
        weights_mesh: dimensions pipeline, replica, weights (processes that share shards of the weights: data and
            context parallel ones) and tensor.
        tokens_mesh: the same processes as pipeline, data, context, tensor.
        peers: group of the processes that work on the same samples with the same layers (context x tensor).
        control: group for words about the run rather than its numbers: gloo on every device.
    """

    rank: int
    device: torch.device
    layout: Layout
    weights_mesh: DeviceMesh
    tokens_mesh: DeviceMesh
    peers: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.layout.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def pipeline_rank(self) -> int:
        """Place in the pipeline."""
        return self.tokens_mesh.get_local_rank("pipeline")

    @property
    def data_rank(self) -> int:
        """Place among the groups that have samples of their own."""
        return self.tokens_mesh.get_local_rank("data")

    @property
    def embeds(self) -> bool:
        """Whether the first pipeline stage is here."""
        return self.pipeline_rank == 0

    @property
    def projects(self) -> bool:
        """Whether the last pipeline stage is here."""
        return self.pipeline_rank == self.layout.pipeline - 1

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that hold the other layers of this one's model."""
        return self.tokens_mesh.get_group("pipeline")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(self.control)


@contextmanager
def join_world(device_name: str, layout: Layout, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device_name: as of `claim_device`.
        layout: of as many processes as there are.
        timeout: of the collectives, the default being that of PyTorch.
    """
    rank, size = rank_and_size()
    assert size == layout.world_size, (size, layout)
    device = claim_device(device_name)
    check_environment(device.type)
    # Sharding wants a process group even where it has nothing to share.
    store = None if size > 1 else HashStore()
    dist.init_process_group(collective_backend(device), store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield _group(rank, device, layout)
    finally:
        dist.destroy_process_group()


def _group(rank: int, device: torch.device, layout: Layout) -> World:
    """Order the processes: those that exchange most (tensor, then context) are neighbours."""

    def mesh(**sizes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    pipeline, data, context, tensor = layout.pipeline, layout.data, layout.context, layout.tensor
    shards = data // layout.replicas * context
    return World(
        rank,
        device,
        layout,
        mesh(pipeline=pipeline, replica=layout.replicas, weights=shards, tensor=tensor),
        mesh(pipeline=pipeline, data=data, context=context, tensor=tensor),
        mesh(pipeline=pipeline, data=data, peers=context * tensor).get_group("peers"),
        dist.new_group(backend="gloo"),
    )


def parallelise(transformer: FlashI2VTransformer3DModel, world: World) -> None:
    """Share the matrices of a transformer (or of a stage's part of it), and the tokens that it works on."""
    if world.layout.tensor > 1:
        parallelise_tensors(transformer, world.weights_mesh["tensor"])
    if world.layout.context > 1:
        parallelise_context(transformer, world.tokens_mesh.get_group("context"))


def shard(
    module: nn.Module, transformer: FlashI2VTransformer3DModel, world: World, options: LayoutOptions, *, bf16: bool
) -> None:
    """Shard parameters, gradients and optimizer state over the processes that share them (FSDP2), block by block.

    In bf16, parameters are gathered in bf16 and gradients reduced in fp32; the sharded master weights stay fp32.
    Where there is nothing to share, nothing to offload and no second dtype, the module is left as it is.

    Args:
        module: the whole computation of this process.
        transformer: what it holds of the transformer.
        world: this process among all.
        options: of the command line.
        bf16: compute in bf16.
    """
    mesh = world.weights_mesh["replica", "weights"]
    if mesh.size() == 1 and not bf16 and not options.fsdp_cpu_offload:
        module.to(world.device)
        return
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        # The model casts where it must: timesteps, noise and the loss stay in fp32.
        cast_forward_inputs=False,
    )
    pins = torch.accelerator.is_available()
    offload = CPUOffloadPolicy(pin_memory=pins) if options.fsdp_cpu_offload else OffloadPolicy()
    apply = partial(fully_shard, mesh=mesh, reshard_after_forward=options.reshards, offload_policy=offload)
    if bf16 and world.device.type == "cpu" and hasattr(transformer, "learnable_proj"):
        # oneDNN's bf16 gradient of a 3x3x3 convolution over two frames is wrong, often not finite (torch 2.13).
        apply(transformer.learnable_proj, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in transformer.blocks.children():
        apply(block, mp_policy=policy)
    apply(module, mp_policy=policy)
