"""Decoding a video within the memory that is free: whole where it fits, else sliced, else in tiles.

B videos, C latent channels, F latent frames, H W latent grid.

The VAE decodes one latent frame after the other and keeps features of earlier frames, so that its need of memory grows
with the picture, hardly with the video's length. Slices give the same numbers. Tiles do not: each sees nothing beyond
its edges, and where two overlap their pictures are blended.
"""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from flashi2v_infer.execution import LOW_MEMORY_BUDGET, Execution
from flashi2v_model.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from flashi2v_model.cost import tracing
from flashi2v_model.encoders import decode_video
from flashi2v_npu_ops.device import free_memory

logger = logging.getLogger(__name__)

# Side of a tile and distance between tiles in pixels, larger ones first, as there are fewer seams: a quarter overlaps.
TILES = ((512, 384), (384, 288), (256, 192), (128, 96))
# Of the free memory, what a prediction may take: kernels need workspace, and an allocator leaves gaps.
_SHARE = 0.8

_reported: set[tuple["Decoding | None", torch.Size]] = set()


@dataclass(frozen=True)
class Decoding:
    """A way of decoding.

    Attributes:
        sliced: one video after the other.
        tile: side of a tile and distance between tiles, in pixels; None decodes whole pictures.
    """

    sliced: bool = False
    tile: tuple[int, int] | None = None

    def __str__(self) -> str:
        tiles = f"tiles of {self.tile[0]} pixels, {self.tile[1]} apart" if self.tile else "whole pictures"
        return tiles + (", one video at a time" if self.sliced else "")


def describe(decoding: Decoding | None) -> str:
    """Put what `choose_decoding` returns in words."""
    return "the tiles that are set for the VAE" if decoding is None else str(decoding)


def decode_within_memory(vae: AutoencoderKLWan, latents: Tensor, execution: Execution) -> tuple[Tensor, str]:
    """Decode as `flashi2v_model.encoders.decode_video` does, in the way that `choose_decoding` chooses.

    Returns:
        the video, and the way in words.
    """
    if hasattr(vae, "_hf_hook"):
        # Where parts are offloaded, the VAE's call makes the transformer leave: before the memory is asked for.
        vae._hf_hook.pre_forward(vae)
    free = free_memory(latents.device)
    decoding = choose_decoding(vae, tuple(latents.shape), execution, free)
    if (decoding, latents.shape) not in _reported:
        _reported.add((decoding, latents.shape))
        known = "" if free is None else f" ({free / 2**30:.1f} GiB are free)"
        level = logging.DEBUG if decoding == Decoding() else logging.INFO
        logger.log(level, "decoding %s in %s%s", tuple(latents.shape), describe(decoding), known)
    with decoding_as(vae, decoding):
        return decode_video(vae, latents), describe(decoding)


def choose_decoding(
    vae: AutoencoderKLWan, shape: tuple[int, ...], execution: Execution, free: int | None
) -> Decoding | None:
    """Return the first way of decoding, from whole to the smallest tiles, that is predicted to fit.

    Args:
        vae: on any device, meta too; its config and dtype are looked at.
        shape: (B, C, F, H, W) of the latents.
        execution: says whether there may, or must, be tiles and slices; with low_memory a budget stands for `free`.
        free: bytes; None, where they are not known, decodes whole.

    Returns:
        the way; None leaves the VAE as it is, because its tiling is already on (`ae.enable_tiling` of a configuration
        file, `vae.enable_tiling()`) and the execution does not say otherwise.
    """
    if vae.use_tiling and execution.vae_tiling is not False:
        return None
    budget = free
    if execution.low_memory:
        budget = LOW_MEMORY_BUDGET if free is None else min(free, LOW_MEMORY_BUDGET)
    slicing = execution.vae_slicing
    if slicing is None and vae.use_slicing:  # `vae.enable_slicing()`
        slicing = True
    candidates = _candidates(shape, slicing, execution.vae_tiling)
    if budget is None or len(candidates) == 1:
        return candidates[0]
    for decoding in candidates:
        need = predicted_peak(vae, shape, decoding)
        if need <= _SHARE * budget:
            return decoding
    logger.warning(
        "decoding needs about %.1f GiB even in %s, and %.1f GiB are free: it may run out of memory",
        need / 2**30,
        decoding,
        budget / 2**30,
    )
    return decoding


def _candidates(shape: tuple[int, ...], slicing: bool | None, tiling: bool | None) -> list[Decoding]:
    slices = [False] if shape[0] == 1 else [False, True] if slicing is None else [slicing]
    longest = max(shape[-2:]) * SPATIAL_STRIDE
    tiles = [Decoding(slices[-1], tile) for tile in TILES if tile[0] < longest]
    whole = [Decoding(sliced) for sliced in slices]
    if tiling is False or not tiles:  # a picture no larger than the smallest tile is whole
        return whole
    return tiles if tiling else whole + tiles


def predicted_peak(vae: AutoencoderKLWan, shape: tuple[int, ...], decoding: Decoding) -> int:
    """Return the bytes that decoding takes beside the weights: exact for whole videos, a little too much for others.

    Whole decoding, of a video or a tile, is traced on the meta device; what slices and tiles keep is added.
    """
    batch, channels, num_frames, height, width = shape
    videos = 1 if decoding.sliced else batch  # at once
    samples = 3 * (TEMPORAL_STRIDE * (num_frames - 1) + 1) * height * width * SPATIAL_STRIDE**2  # of one
    overlap = 0.0
    if decoding.tile is not None:
        side, stride = decoding.tile
        height, width = (min(length, side // SPATIAL_STRIDE) for length in (height, width))
        overlap = (side / stride) ** 2
    piece = (videos, channels, num_frames, height, width)
    peak = _whole_peak(json.dumps(dict(vae.config), default=str), vae.dtype, piece)
    if piece == shape:
        return peak
    size = samples * vae.dtype.itemsize
    # Slices that are done, and the latents of all, brought to the VAE's scale.
    before = (batch - videos) * size + math.prod(shape) * 2 * torch.float32.itemsize
    last_piece = before + overlap * videos * size + peak
    joining = before + (overlap + 3) * videos * size  # tiles, their rows, the picture, and that clamped
    in_fp32 = batch * (size + 2 * samples * torch.float32.itemsize)  # what `decode_video` makes of it
    return int(max(last_piece, joining, in_fp32))


@lru_cache(maxsize=64)
def _whole_peak(config: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(json.loads(config))
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    latents = torch.empty(shape, device="meta")
    with tracing() as trace:
        decode_video(vae, latents)
    return trace.peak


@contextmanager
def decoding_as(vae: AutoencoderKLWan, decoding: Decoding | None) -> Iterator[None]:
    """Set up the VAE for a way of decoding within the context; None leaves it as it is.

    Encoding must not inherit the tiles: a first frame with seams would guide the whole video.
    """
    if decoding is None:
        yield
        return
    names = (
        "use_slicing",
        "use_tiling",
        "tile_sample_min_height",
        "tile_sample_min_width",
        "tile_sample_stride_height",
        "tile_sample_stride_width",
    )
    before = [getattr(vae, name) for name in names]
    vae.use_slicing, vae.use_tiling = decoding.sliced, decoding.tile is not None
    if decoding.tile is not None:
        side, stride = decoding.tile
        vae.enable_tiling(side, side, stride, stride)
    try:
        yield
    finally:
        for name, value in zip(names, before):
            setattr(vae, name, value)
