"""The processes that torchrun starts: some share each video, the others share out the list of videos.

Ranks that follow each other share a video (context parallelism); such a group is a replica, and replicas take turns in
the list. What is sampled does not depend on either number.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from flashi2v_data.errors import InputError
from flashi2v_infer.load import find_device
from flashi2v_npu_ops.device import collective_backend

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all of the run.

    Attributes:
        device: of this process.
        rank: of this process.
        replica: which share of the list it samples.
        num_replicas: how many shares there are.
        context: the processes that share its videos; None where it has them alone.
    """

    device: torch.device
    rank: int = 0
    replica: int = 0
    num_replicas: int = 1
    context: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the videos of its replica."""
        return self.context is None or self.context.rank() == 0

    def share(self, jobs: Sequence[T]) -> Sequence[T]:
        """Return what this replica samples."""
        return jobs[self.replica :: self.num_replicas]

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier()


@contextmanager
def join_processes(device_name: str, context_parallel_size: int = 1) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device_name: as of `flashi2v_npu_ops.device.resolve_device`; each process takes the one of its local rank.
        context_parallel_size: processes that share a video; it must divide their number.

    Raises:
        InputError: the number of processes does not fit, or there is no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if context_parallel_size < 1 or size % context_parallel_size:
        raise InputError(
            f"--context-parallel-size {context_parallel_size} does not divide the {size} processes of this run: "
            f"start as many by torchrun --nproc-per-node {context_parallel_size} --no-python flashi2v-infer ..."
        )
    device = find_device(device_name, claim=True)
    if size == 1:
        yield Processes(device)
        return
    rank = int(os.environ["RANK"])
    # Replicas may end hours apart; a process that dies is torchrun's to notice.
    dist.init_process_group(collective_backend(device), timeout=timedelta(days=7))
    try:
        context = None
        if context_parallel_size > 1:
            # Every process takes part in making every group.
            firsts = range(0, size, context_parallel_size)
            groups = [dist.new_group([*range(first, first + context_parallel_size)]) for first in firsts]
            context = groups[rank // context_parallel_size]
        yield Processes(device, rank, rank // context_parallel_size, size // context_parallel_size, context)
    finally:
        dist.destroy_process_group()
