"""The processes that torchrun starts: some share each video, the others share out the list of videos.

Ranks that follow each other share a video (context parallelism); such a group is a replica, and replicas take turns in
the list. What is sampled does not depend on either number.
"""

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flashi2v_data.errors import InputError
from flashi2v_infer.execution import Execution
from flashi2v_infer.load import find_device
from flashi2v_infer.placement import Sharing
from flashi2v_model.parallel import ContextDegrees, ContextGroups
from flashi2v_npu_ops.device import collective_backend

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all of the run.

    Attributes:
        device: of this process.
        rank: of this process.
        size: number of all processes.
        branches: how many share each video by the branches of its guidance.
        context: how many share each branch by its tokens.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    branches: int = 1
    context: int = 1

    @property
    def per_video(self) -> int:
        """How many share each video."""
        return self.branches * self.context

    @property
    def replica(self) -> int:
        """Which share of the list this process samples."""
        return self.rank // self.per_video

    @property
    def num_replicas(self) -> int:
        """How many shares there are."""
        return self.size // self.per_video

    @property
    def is_first(self) -> bool:
        """Whether this process does what is done once."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this process writes the videos of its replica."""
        return self.rank % self.per_video == 0

    def share(self, jobs: Sequence[T]) -> Sequence[T]:
        """Return what this replica samples."""
        return jobs[self.replica :: self.num_replicas]

    def sharing(self, degrees: ContextDegrees) -> Sharing | None:
        """Return the groups of those that share this process's videos, None where it has them alone; all call this."""
        return None if self.per_video == 1 else _sharing(self, degrees)

    def barrier(self) -> None:
        """Wait for all processes."""
        if dist.is_initialized():
            dist.barrier()


@cache  # of groups that are there; models change, groups stay
def _sharing(processes: Processes, degrees: ContextDegrees) -> Sharing:
    names = ("replica", "branch", "ring", "ulysses")
    sizes = (processes.num_replicas, processes.branches, degrees.ring, degrees.ulysses)
    mesh = init_device_mesh(processes.device.type, sizes, mesh_dim_names=names)
    together = mesh["branch", "ring", "ulysses"]._flatten("video").get_group()
    return Sharing(together, ContextGroups.of(mesh), mesh.get_group("branch"))


@contextmanager
def join_processes(device_name: str, execution: Execution) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device_name: as of `flashi2v_npu_ops.device.resolve_device`; each process takes the one of its local rank.
        execution: says how many processes share a video; that must divide their number.

    Raises:
        InputError: the number of processes does not fit, or there is no such device.
    """
    size, per_video = int(os.environ.get("WORLD_SIZE", 1)), execution.processes_per_video
    if size % per_video:
        words = f"--context-parallel-size {execution.context_parallel_size}"
        if execution.guidance_parallel_size > 1:
            words += f" x --guidance-parallel-size {execution.guidance_parallel_size}"
        raise InputError(
            f"{words} does not divide the {size} processes of this run: start as many by --devices {per_video}, or by "
            "torchrun"
        )
    device = find_device(device_name, claim=True)
    if size == 1:
        yield Processes(device)
        return
    # Replicas may end hours apart; a process that dies is torchrun's to notice.
    dist.init_process_group(collective_backend(device), timeout=timedelta(days=7))
    try:
        yield Processes(
            device, int(os.environ["RANK"]), size, execution.guidance_parallel_size, execution.context_parallel_size
        )
    finally:
        _sharing.cache_clear()
        dist.destroy_process_group()


def is_started() -> bool:
    """Whether torchrun, or `start`, has made this process one of several."""
    return "RANK" in os.environ


def start(arguments: Sequence[str], number: int) -> NoReturn:
    """Run this command in several processes of this machine, by PyTorch's own launcher, and exit as the first to fail.

    Args:
        arguments: of the command line, in every process.
        number: of processes.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What a process says of its end is enough.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-c", "from flashi2v_infer.cli import main; main()", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    sys.exit(0)
