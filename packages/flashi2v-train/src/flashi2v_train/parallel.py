"""Processes and sharding, applied to the model from outside."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flashi2v_npu_ops.device import claim_device, collective_backend
from flashi2v_train.step import FlowMatchingLoss

# What torchrun tells every process, and what holds for the only one.
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1}


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device_name: str) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one."""
    rank, size = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
    device = claim_device(device_name)
    # Sharding wants a process group even where it has nothing to share.
    store = None if size > 1 else HashStore()
    dist.init_process_group(collective_backend(device), store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def shard(loss: FlowMatchingLoss, world: World, *, bf16: bool) -> nn.Module:
    """Shard parameters, gradients and optimizer state over all processes (FSDP2), block by block.

    In bf16, parameters are gathered in bf16 and gradients reduced in fp32; the sharded master weights stay fp32.
    One process in fp32 has nothing to gain, and is left as it is.
    """
    if world.size == 1 and not bf16:
        return loss
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        # The model casts where it must: timesteps, noise and the loss stay in fp32.
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("data",))
    for block in loss.transformer.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(loss, mesh=mesh, mp_policy=policy)
    return loss
