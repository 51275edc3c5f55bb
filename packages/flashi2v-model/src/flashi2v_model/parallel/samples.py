"""The samples of a batch shared among processes: with guidance in one batch, a branch for each of two.

B batch, b of this process.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from flashi2v_model.parallel.degrees import share
from flashi2v_model.parallel.gathering import gather
from flashi2v_model.transformer import FlashI2VTransformer3DModel

_PER_SAMPLE = ("hidden_states", "timestep", "encoder_hidden_states", "condition", "low_freq_energy_ratio")
_ARGUMENTS = (*_PER_SAMPLE, "attention_kwargs", "return_dict", "conditioning")  # of the network, in order


def parallelise_samples(transformer: FlashI2VTransformer3DModel, group: dist.ProcessGroup) -> None:
    """Let processes share the samples of each batch; all of them give and get the whole batch.

    A sampling run with guidance then calls the network once with both branches (`acceleration.needs_one_call`), and
    each of two processes computes one of them. A batch of fewer samples than processes is computed by each.

    Args:
        transformer: the whole network.
        group: the processes; each may be one of several that share tokens, with those of the same number.
    """
    samples = _Samples(group)
    transformer.register_forward_pre_hook(samples.share_batch, with_kwargs=True)
    transformer.register_forward_hook(samples.gather_batch, with_kwargs=True)
    transformer.shares_samples = True


class _Samples:
    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._lengths: list[int] | None = None  # of every process's part of the batch

    def share_batch(
        self, transformer: FlashI2VTransformer3DModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the network this process's samples of (B, ...)."""
        given = dict(zip(_ARGUMENTS, args)) | kwargs
        batch, size = len(given["hidden_states"]), self._group.size()
        self._lengths = share(batch, size) if batch >= size else None
        if self._lengths is None:
            return args, kwargs
        names = [name for name in _PER_SAMPLE if isinstance(given.get(name), Tensor) and given[name].dim()]
        given |= {name: self._own(given[name]) for name in names}
        if given.get("conditioning"):
            given["conditioning"] = {name: self._own(tensor) for name, tensor in given["conditioning"].items()}
        return (), given

    def _own(self, tensor: Tensor) -> Tensor:
        # A view of the same memory in each step: what is computed of it is known again (`flashi2v_model.caching`).
        return tensor.tensor_split(self._group.size())[self._group.rank()]

    def gather_batch(
        self, transformer: FlashI2VTransformer3DModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Return the output of all samples."""
        if self._lengths is None:
            return output
        whole = gather(output[0], self._lengths, self._group, dim=0)
        return (whole,) if isinstance(output, tuple) else Transformer2DModelOutput(sample=whole)
