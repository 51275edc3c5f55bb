"""A batch is a dict of named tensors, whose first dimension counts samples: B.

Its way: a record's video, caption and columns are encoded (`features`), the recipe draws what is random about each
sample, and makes of both what the network is given and what its velocity is compared with (`recipe`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def join(batches: Sequence[Batch]) -> Batch:
    """Put batches of the same names one behind the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def rows(batch: Batch, begin: int, end: int) -> Batch:
    """Return some samples of a batch."""
    return {name: tensor[begin:end] for name, tensor in batch.items()}


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
