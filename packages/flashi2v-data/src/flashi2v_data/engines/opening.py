"""Which engine a command runs on."""

import os
from typing import Literal

from flashi2v_data.engines.protocol import Engine
from flashi2v_data.errors import InputError

EngineName = Literal["local", "ray"]


def num_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_engine(name: EngineName, address: str | None = None, jobs: int | None = None) -> Engine:
    """Return an engine, which is closed by its user.

    Args:
        name: local, the processes of this machine; or ray.
        address: of a Ray cluster; by default RAY_ADDRESS, or one that is started here.
        jobs: processes; by default one for each processor of the machine or the cluster.

    Raises:
        InputError: Ray is missing or of another version, or there is no cluster at this address.
    """
    if name == "ray":
        from flashi2v_data.engines.ray import RayEngine

        return RayEngine(address, jobs)
    if address is not None:
        raise InputError("--address is of a Ray cluster: add --engine ray, or leave it out")
    from flashi2v_data.engines.local import LocalEngine

    return LocalEngine(jobs or num_processors())
