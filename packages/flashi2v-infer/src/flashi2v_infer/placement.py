"""Where the parts of a pipeline are while it runs: on the device, offloaded (as diffusers does), or gone after use."""

import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from flashi2v_infer.execution import Execution
from flashi2v_infer.pipeline import FlashI2VPipeline
from flashi2v_model.parallel import ContextGroups, parallelise_context, parallelise_samples, parallelise_tiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """The processes that share each video, of which this is one.

    Attributes:
        all: all of them, which share the VAE's tiles.
        context: those that share the tokens of a branch.
        branches: those at the same place of both branches.
    """

    all: dist.ProcessGroup
    context: ContextGroups
    branches: dist.ProcessGroup


_CPU = torch.device("cpu")
# Only CUDA's copies beside the computation are known to work with diffusers' prefetching.
_STREAMING = ("cuda",)


def streams(device_type: str) -> bool:
    """Tell whether the next block's weights are fetched while a block computes."""
    return device_type in _STREAMING


def home(execution: Execution, device: torch.device) -> torch.device:
    """Return where weights are loaded to: the device itself, or the CPU where they are offloaded."""
    return device if execution.offloading == "none" else _CPU


def home_of_transformer(execution: Execution, device: torch.device) -> torch.device:
    """Return where the transformer is loaded to: weights that will be smaller may not fit the device as they are."""
    return home(execution, device) if execution.quantize is None else _CPU


def place(
    pipeline: FlashI2VPipeline, execution: Execution, device: torch.device, sharing: Sharing | None = None
) -> None:
    """Set a loaded pipeline up for an execution: sharing, offloading, compilation, ways of decoding.

    With "model" a part comes to the device when it is called and leaves when the next one is. With "group" the text
    encoder comes layer by layer and the transformer block by block, on CUDA the next block while one computes; the VAE,
    a hundredth of their size, stays on the device.

    Args:
        pipeline: its parts in the `home` of this execution.
        execution: how to compute.
        device: where to compute.
        sharing: the processes that share each video; None: this one has them alone.
    """
    pipeline.execution = execution
    if sharing is not None:
        if sharing.context.all.size() > 1:
            parallelise_context(pipeline.transformer, sharing.context)
        if sharing.branches.size() > 1:
            parallelise_samples(pipeline.transformer, sharing.branches)
        parallelise_tiles(pipeline.vae, sharing.all)
    if execution.offloading == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif execution.offloading == "group":
        pipeline.vae.to(device)
        if pipeline.text_encoder is not None:
            # A leaf at a time: the embedding alone is 2 GB, which would else stay beside the blocks.
            apply_group_offloading(pipeline.text_encoder, onload_device=device, offload_type="leaf_level")
        pipeline.transformer.enable_group_offload(
            onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams(device.type)
        )
    if execution.compile:
        # For all sizes at once: a second size would else be compiled anew, in the middle of somebody's work.
        pipeline.transformer.compile_repeated_blocks(dynamic=True)


@torch.no_grad()
def encode_prompts(
    pipeline: FlashI2VPipeline,
    prompts: Iterable[str],
    execution: Execution,
    device: torch.device,
    max_sequence_length: int | None = None,
) -> dict[str, Tensor]:
    """Encode all prompts of a run ahead, each distinct one once and by itself.

    Args:
        pipeline: its text encoder may have been put away by `put_away_text_encoder` with keep_text_encoder.
        prompts: negative ones too.
        execution: as of `place`.
        device: where to compute.
        max_sequence_length: L; None is the transformer's own.

    Returns:
        for each prompt its states (1, L, text_dim), on the CPU, where thousands of them are no burden.
    """
    if execution.offloading == "none":
        pipeline.text_encoder.to(device)
    texts = {}
    for prompt in dict.fromkeys(prompts):
        text, _ = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        texts[prompt] = text.to(_CPU)
    return texts


def put_away_text_encoder(pipeline: FlashI2VPipeline, execution: Execution, device: torch.device) -> None:
    """Free the device of the text encoder once all prompts are encoded.

    With keep_text_encoder it waits in the main memory for more prompts; otherwise it is released, the pipeline's
    `text_encoder` is None, and its memory is free everywhere.
    """
    if execution.keep_text_encoder:
        if execution.offloading == "none":
            pipeline.text_encoder.to(_CPU)
        elif execution.offloading == "model":
            pipeline.maybe_free_model_hooks()
    else:
        pipeline.register_modules(text_encoder=None)
        if execution.offloading == "model":
            pipeline.enable_model_cpu_offload(device=device)  # anew, as each part's hook knows of the one before
        logger.debug("the text encoder is released: all prompts are encoded")
    gc.collect()  # hooks and modules refer to each other
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
