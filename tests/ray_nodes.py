"""Ray clusters for tests: on this machine, small, and patient where it is busy."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# Ray gives a node 30 seconds to start, which cannot be changed; a busy machine takes longer now and then.
TRIES = 4


@contextlib.contextmanager
def cluster(num_cpus: int = 2, num_nodes: int = 1, path: str = "") -> Iterator[Any]:
    """Yield a `ray.cluster_utils.Cluster`, which ends with the block.

    Args:
        num_cpus: of its first node; the others have one.
        num_nodes: nodes.
        path: added to PYTHONPATH, where the signals of tests lie.
    """
    from ray.cluster_utils import Cluster

    paths = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH", ""))))
    with mock.patch.dict(os.environ, PYTHONPATH=paths, RAY_USAGE_STATS_ENABLED="0"):
        made = Cluster()
        try:
            for number in range(num_nodes):
                add_node(made, **(NODE if number else {**NODE, "num_cpus": num_cpus, "include_dashboard": False}))
            yield made
        finally:
            made.shutdown()


def add_node(made: Any, **options: Any) -> None:
    """Add a node to a cluster, trying again where it was too slow."""
    for left in range(TRIES - 1, -1, -1):
        try:
            made.add_node(**(options or NODE))
            return
        except Exception as error:  # Ray has no class of its own for it
            if "timed out during startup" not in str(error) or not left:
                raise
