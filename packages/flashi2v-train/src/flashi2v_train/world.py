"""The processes of a run: which one this is, and how they are grouped."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not declared so
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashi2v_model.parallel import ContextGroups
from flashi2v_npu_ops.device import claim_device, collective_backend
from flashi2v_npu_ops.registry import check_environment
from flashi2v_train.parallel_dims import ParallelDims

# What torchrun tells every process, and what holds for the only one.
_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1}


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, from 0, and of all processes of this run."""
    rank, size = (int(os.environ.get(name, default)) for name, default in _TORCHRUN.items())
    return rank, size


class DisagreementError(RuntimeError):
    """Processes were about to reduce tensors of different dtypes or shapes: a bug."""


@dataclass(frozen=True)
class World:
    """This process among all of the run.

    Attributes:
        rank: of this process, from 0.
        device: its own.
        dims: degrees of parallelism.
        weights_mesh: dimensions pipeline, replica, weights (processes that share shards of the weights: data and
            context parallel ones) and tensor.
        tokens_mesh: the same processes as pipeline, data, ring, ulysses, tensor.
        context: groups of the processes that share the tokens of a video (ring x ulysses).
        peers: group of the processes that work on the same samples with the same layers (context x tensor).
        control: group for words about the run rather than its numbers: gloo on every device.
    """

    rank: int
    device: torch.device
    dims: ParallelDims
    weights_mesh: DeviceMesh
    tokens_mesh: DeviceMesh
    context: ContextGroups
    peers: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.dims.world_size

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
        return self.pipeline_rank == self.dims.pipeline - 1

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The processes that hold the other layers of this one's model."""
        return self.tokens_mesh.get_group("pipeline")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Add a tensor up over all processes, in place.

        Raises:
            DisagreementError: dtype or shape differ between processes: HCCL would hang, or add nonsense.
        """
        if self.size > 1:
            self._agree_on(value)
            dist.all_reduce(value)
        return value

    def _agree_on(self, value: torch.Tensor) -> None:
        """Compare what all processes are about to reduce, before any of them waits for the others."""
        own = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        everyones = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(everyones, torch.tensor([crc32(own.encode())]), self.control)
        if len({int(number) for number in everyones}) > 1:
            words: list[str] = [""] * self.size
            dist.all_gather_object(words, own, self.control)
            told = ", ".join(f"process {rank} {word}" for rank, word in enumerate(words))
            raise DisagreementError(f"the processes do not reduce the same: {told}")

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(self.control)


@contextmanager
def join_world(device_name: str, dims: ParallelDims, timeout: timedelta | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device_name: as of `claim_device`.
        dims: of as many processes as there are.
        timeout: of the collectives, the default being that of PyTorch.
    """
    rank, size = rank_and_size()
    assert size == dims.world_size, (size, dims)
    device = claim_device(device_name)
    check_environment(device.type)
    # Sharding wants a process group even where it has nothing to share.
    store = None if size > 1 else HashStore()
    dist.init_process_group(collective_backend(device), store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield _group(rank, device, dims)
    finally:
        dist.destroy_process_group()


def _group(rank: int, device: torch.device, dims: ParallelDims) -> World:
    """Order the processes: those that exchange most (tensor, then context) are neighbours."""

    def mesh(**sizes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    pipeline, data, context, tensor = dims.pipeline, dims.data, dims.context, dims.tensor
    tokens = mesh(pipeline=pipeline, data=data, ring=dims.ring, ulysses=dims.ulysses, tensor=tensor)
    shards = data // dims.replicas * context
    return World(
        rank,
        device,
        dims,
        mesh(pipeline=pipeline, replica=dims.replicas, weights=shards, tensor=tensor),
        tokens,
        ContextGroups.of(tokens),
        mesh(pipeline=pipeline, data=data, peers=context * tensor).get_group("peers"),
        dist.new_group(backend="gloo"),
    )
