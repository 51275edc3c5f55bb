"""Memory against time: layers computed again in the backward pass, attention kept on the host, blocks compiled.

Applied to a transformer, or to a pipeline stage's part of one, from outside; names of parameters do not change.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flashi2v_model import FlashI2VTransformer3DModel
from flashi2v_model.layers import Attention, rope_tables
from flashi2v_train.offload import HostMemory
from flashi2v_train.options import MemoryOptions

logger = logging.getLogger(__name__)

# Parts of the names of the operators that attend: those of torch, flash_attn and torch_npu.
_ATTENTION = ("scaled_dot_product", "flash_attn", "npu_fusion_attention")


def save_memory(
    transformer: FlashI2VTransformer3DModel, options: MemoryOptions, *, offload_attention: bool, device: torch.device
) -> None:
    """Let a transformer keep less for its backward pass, and compile its blocks, as the options say.

    To be called after layers and tokens are shared out, and before sharding.

    Args:
        transformer: whole, or a pipeline stage's part; numbers of layers count within it.
        options: of the command line.
        offload_attention: as of `predictor.attention_async_offload`.
        device: that the transformer will run on.
    """
    blocks = [*transformer.blocks.children()]
    attentions = [module for block in blocks for module in block.modules() if isinstance(module, Attention)]
    number = options.recompute_num_layers or 0
    whole = number if options.recompute_method == "block" else 0
    partly = options.recompute_num_layers_skip_core_attention
    # What is computed again is not kept in the meantime, so that there is nothing to move.
    keeping = [] if options.recompute_method == "uniform" else blocks[whole + partly :]
    if offload_attention and device.type == "cpu":
        logger.info("predictor.attention_async_offload has no effect on the CPU: all memory is the host's")
    elif offload_attention and not keeping:
        logger.info("predictor.attention_async_offload has no effect: all layers are computed again")
    elif offload_attention:
        memory = HostMemory(device)
        for block in keeping:
            attention = block.get_submodule("attn1")
            assert isinstance(attention, Attention)
            attention.attend = partial(memory.run, attention.attend)
    if options.recompute_granularity == "selective":
        for attention in attentions:
            attention.attend = partial(_again, attention.attend)
    for block in blocks[:whole]:
        block.forward = partial(_again, block.forward)
    for block in blocks[whole : whole + partly]:
        block.forward = partial(_again, block.forward, context_fn=_keeping_attention)
    if options.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if options.recompute_method == "uniform":
        # Each group's own blocks are called as modules, so that sharding gathers their weights both times.
        transformer.run_blocks = partial(_run_groups, transformer, number)  # type: ignore[method-assign]


def _again(function: Callable[..., Any], *args: Any, context_fn: Callable[[], Any] | None = None) -> Any:
    """Call a function that keeps its arguments only, and computes the rest again in the backward pass."""
    # Nothing in the model is random.
    if context_fn is None:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn)


def _keeping_attention() -> Any:
    return create_selective_checkpoint_contexts(_keep)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    attends = any(part in str(operator) for part in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE


def _run_groups(
    transformer: FlashI2VTransformer3DModel,
    size: int,
    x: Tensor,
    text: Tensor,
    modulation: Tensor,
    grid: tuple[int, int, int],
) -> Tensor:
    """`FlashI2VTransformer3DModel.run_blocks` that keeps the input of every `size`-th block only."""
    rope = rope_tables(grid, transformer.config.attention_head_dim, x.device)
    blocks = [*transformer.blocks.children()]

    def run(group: list[nn.Module], x: Tensor, *rest: Any) -> Tensor:
        for block in group:
            x = block(x, *rest)
        return x

    for first in range(0, len(blocks), size):
        x = _again(run, blocks[first : first + size], x, text, modulation, rope)
    return x
