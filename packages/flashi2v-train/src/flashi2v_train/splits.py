"""How a model's layers are best shared out among the stages of a pipeline."""

import json
from collections.abc import Sequence

from flashi2v_data.errors import InputError
from flashi2v_train.config import RunConfig
from flashi2v_train.parallel_dims import ParallelDims, even_split


def bubble(num_processes: int, num_micro_batches: int, num_virtual: int = 1) -> float:
    """Return the share of a step that a pipeline's process waits, if all stages take equally long.

    Source: Narayanan et al., arXiv 2104.04473, section 2.2: (p - 1) / (v m) of the work.
    """
    idle = (num_processes - 1) / (num_virtual * num_micro_batches)
    return idle / (1 + idle)


def best_split(
    num_layers: int, num_processes: int, num_virtual: int = 1, *, layer: float, first: float, last: float
) -> tuple[int, ...]:
    """Return the layers of every stage such that the slowest process is as fast as can be.

    Args:
        num_layers: of the model.
        num_processes: of the pipeline.
        num_virtual: stages per process.
        layer: cost of a layer, in any unit.
        first: what the first stage costs beside its layers.
        last: the same of the last stage.

    Raises:
        InputError: there are more stages than layers.
    """
    even_split(num_layers, num_processes * num_virtual)  # refuses what cannot be split
    num_stages = num_processes * num_virtual
    split = [1] * num_stages
    extra = [first, *[0.0] * (num_stages - 2), last]

    def process(stage: int) -> float:
        own = range(stage % num_processes, num_stages, num_processes)
        return sum(extra[i] + split[i] * layer for i in own)

    # Layers are alike, so giving each to who is least busy then leaves the least maximum.
    for _ in range(num_layers - num_stages):
        stage = min(range(num_stages), key=lambda i: (process(i), extra[i] + split[i] * layer))
        split[stage] += 1
    return tuple(split)


def suggest_split(config: RunConfig, dims: ParallelDims) -> str:
    """Return what to write into the model file, by operations, and what it brings."""
    if dims.num_stages == 1:
        return "nothing to split: set --pipeline-model-parallel-size"
    best, work, excess = _compare_split(config, dims)
    return (
        f'"pipeline_num_layers": {best}\n'
        f"# the slowest process has {work / 1e12:.3g} TFLOPs per sample forward; now, with {list(dims.layers)}, "
        f"{excess:.1%} more"
    )


def check_split(config: RunConfig, dims: ParallelDims) -> str | None:
    """Return a line about a split whose slowest process has much more to do than it must, or None.

    Raises:
        InputError: it has more than twice as much to do.
    """
    if dims.num_stages == 1:
        return None
    best, _, excess = _compare_split(config, dims)
    words = (
        f"with {list(dims.layers)} layers per stage the slowest process has {excess:.0%} more to do than with {best}"
    )
    if excess > 1:
        raise InputError(f"{words}, and the others wait: set predictor.pipeline_num_layers to that")
    return f"{words} (predictor.pipeline_num_layers)" if excess > 0.25 else None


def _compare_split(config: RunConfig, dims: ParallelDims) -> tuple[str, float, float]:
    """Return the best split as it is written, the operations of its slowest process, and the excess of the layout's."""
    from flashi2v_train.cost import operations_of  # torch and diffusers take seconds

    operations = operations_of(config)
    processes, virtual = dims.pipeline, dims.num_stages // dims.pipeline
    layer, first, last = operations.layer, operations.embedding, operations.head
    best = best_split(operations.num_layers, processes, virtual, layer=layer, first=first, last=last)

    def slowest(split: Sequence[int]) -> float:
        costs = [n * layer for n in split]
        costs[0] += first
        costs[-1] += last
        return max(sum(costs[rank::processes]) for rank in range(processes))

    pieces = [list(best[i : i + processes]) for i in range(0, len(best), processes)]
    written = json.dumps(pieces if virtual > 1 else pieces[0])
    return written, slowest(best), slowest(dims.layers) / slowest(best) - 1
