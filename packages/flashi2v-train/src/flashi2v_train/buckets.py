"""Clips of several shapes in one run: what a clip of each costs, and how many of them make a micro batch.

The cost is the operations of its forward and backward pass, as the counter counts them on the real modules. Beside the
tokens of a sample, S, it is about S^p: attention compares all tokens with each other (S^2), the matrices take each by
itself (S), and p tells how the two mix. Over the lengths of 480x832 from 1 to 81 frames p is 1.36 for 1.3B and 1.21 for
14B.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flashi2v_data.loading.buckets import BucketTable, build_table
from flashi2v_data.loading.composer import Composer, deal
from flashi2v_data.store.reader import open_store
from flashi2v_train.config import RunConfig
from flashi2v_train.cost import num_tokens, operations_of_kinds
from flashi2v_train.parallel_dims import ParallelDims


class Cost(NamedTuple):
    """What clips of a bucket cost.

    Attributes:
        tokens: of a clip.
        operations: of its forward and backward pass.
        clips: in a micro batch, at most.
    """

    tokens: int
    operations: float
    clips: int


def costs_of(config: RunConfig) -> list[Cost]:
    """Return what clips of every bucket cost.

    A micro batch costs at most what `--micro-batch-size` clips of the dearest bucket cost, and has at most as many
    tokens as so many of the longest, those of captions included, so that it fits into memory where these do.
    """
    size, tokens = config.options.micro_batch_size, [num_tokens(kind) for kind in config.kinds]
    operations = [operations.training for operations in operations_of_kinds(config.kinds)]
    text, dearest = config.model.predictor.text_len, max(operations)
    most = max(tokens) + text
    return [
        Cost(n, ops, int(size * min(most / (n + text), dearest / ops) + 1e-9)) for n, ops in zip(tokens, operations)
    ]


def exponent(costs: list[Cost]) -> float | None:
    """Return p, by least squares over logarithms; None where all clips have equally many tokens."""
    tokens, operations = (np.log([getattr(cost, name) for cost in costs]) for name in ("tokens", "operations"))
    return None if np.ptp(tokens) == 0 else float(np.polyfit(tokens, operations, 1)[0])


def compose(config: RunConfig, table: BucketTable, indices: Sequence[int], num_packs: int) -> Composer:
    """Compose the global batches of a run.

    Args:
        config: of the run.
        table: of its buckets.
        indices: of the clips to take.
        num_packs: micro batches of a step, over all data parallel ranks.

    Raises:
        InputError: there are fewer than one step takes.
    """
    costs, bucket_of = config.costs, np.full_like(table.number_of, -1)
    bucket_of[[*indices]] = table.number_of[[*indices]]
    return Composer(
        bucket_of,
        [cost.clips for cost in costs],
        [cost.operations for cost in costs],
        num_packs,
        seed=config.options.seed,
        shuffle=config.data.dataloader_param.shuffle,
    )


def waits(composer: Composer, num_ranks: int, num_batches: int) -> list[float]:
    """Return the share of every step that a rank waits for the dearest one, on average over ranks: 1 - mean / most."""
    shares = []
    for number in range(num_batches):
        packs = composer.batch(number)
        costs = [sum(map(composer.cost, deal(packs, rank, num_ranks))) for rank in range(num_ranks)]
        shares.append(1 - sum(costs) / num_ranks / max(costs))
    return shares


def describe_buckets(config: RunConfig, dims: ParallelDims) -> list[str]:
    """Return what `--dry-run` says of buckets."""
    param = config.data.dataset_param
    if param.buckets == "auto":
        return ["buckets      auto: there is no store yet to find them for; what follows is for the sample's shape"]
    table = (
        build_table(open_store(param.metafile_or_dir_path), param)
        if os.path.exists(param.metafile_or_dir_path)
        else None
    )
    lines = [f"buckets      {'clips':>10}{'tokens':>10}{'TFLOPs':>10}{'in a micro batch':>18}"]
    for number, (kind, cost) in enumerate(zip(config.kinds, config.costs)):
        clips = "?" if table is None else table.counts[number]
        size = f"  {kind.data.dataset_param.main_bucket}"
        lines.append(f"{size:<13}{clips:>10}{cost.tokens:>10}{cost.operations / 1e12:>10.4g}{cost.clips:>18}")
    if (power := exponent(config.costs)) is not None:
        lines.append(f"  a clip costs about its tokens to the power of {power:.3f}")
    if table is not None:
        composer = compose(config, table, range(len(table.number_of)), config.micro_batches(dims) * dims.data)
        shares = waits(composer, dims.data, min(1000, max(1, composer.packs_per_epoch // composer.num_packs)))
        lines.append(
            f"  clips too short for each: {table.num_left_out}; a rank waits {np.mean(shares):.1%} of a step for others"
        )
    return lines
