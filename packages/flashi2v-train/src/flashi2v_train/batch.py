"""A batch is a dict of named tensors, whose first dimension counts samples: B. A step takes a series of them.

Its way: a record's video, caption and columns are encoded (`features`), the recipe draws what is random about each
sample, and makes of both what the network is given and what its velocity is compared with (`recipe`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors by name, `(B, ...)` each: the first dimension counts samples."""


@dataclass(frozen=True)
class Series:
    """The micro batches of an optimizer step, of one data parallel rank; clips of one are of one shape.

    Attributes:
        batches: in order.
        buckets: the number of every one's shape, as of `RunConfig.kinds`.
        counts: samples of the global batch, on all ranks, of every shape.
    """

    batches: Sequence[Batch]
    buckets: Sequence[int]
    counts: Sequence[int]


def join(batches: Sequence[Batch]) -> Batch:
    """Put batches of the same names one behind the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def chunk(batch: Batch, number: int) -> list[Batch]:
    """Return equal parts of a batch."""
    parts = {name: tensor.chunk(number) for name, tensor in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(number)]


def to(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pick(batch: Batch, names: Iterable[str]) -> tuple[Tensor, ...]:
    """Return the tensors of some names, in their order."""
    return tuple(batch[name] for name in names)
