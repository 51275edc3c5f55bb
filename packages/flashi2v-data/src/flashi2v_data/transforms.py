"""From decoded frames to the model's input. T frames, H W height and width."""

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from flashi2v_data.config import CropResize, CropResizeParam, Norm, NormParam, ToTensor, TransformPipeline
from flashi2v_data.errors import InputError


def center_crop_resize(
    frames: NDArray[np.uint8],
    height: int,
    width: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    antialias: bool = True,
    align_corners: bool = False,
) -> NDArray[np.uint8]:
    """Resize until height and width are covered, then crop the middle.

    Args:
        frames: (T, H, W, 3), uint8; an image is one frame.
        height: of the result.
        width: of the result.
        interpolation: the kernel; the released NPU model was trained with bilinear.
        antialias: widen the kernel where the picture shrinks.
        align_corners: of `torch.nn.functional.interpolate`.

    Returns:
        (T, height, width, 3), uint8.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise InputError(f"frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    _, old_height, old_width, _ = frames.shape
    # Whole numbers: a scale in floats can round a side that fits exactly up by one pixel.
    if height * old_width >= width * old_height:
        cover = height, math.ceil(old_width * height / old_height)
    else:
        cover = math.ceil(old_height * width / old_width), width
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (T, 3, H, W)
    video = interpolate(video, cover, mode=interpolation, align_corners=align_corners, antialias=antialias)
    top, left = round((cover[0] - height) / 2), round((cover[1] - width) / 2)
    video = video[:, :, top : top + height, left : left + width]
    return video.permute(0, 2, 3, 1).contiguous().numpy()


def to_tensor(frames: NDArray[np.uint8]) -> Tensor:
    """Turn (T, H, W, 3) uint8 into (3, T, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 255.0


def normalise(video: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Return (video - mean) / std; the defaults map [0, 1] to [-1, 1]."""
    return (video - mean) / std


def build_transform(pipeline: TransformPipeline) -> Callable[[NDArray[np.uint8]], Tensor]:
    """Make the function that a `transform_pipeline` describes: (T, H, W, 3) uint8 to (3, T, h, w) float32.

    It can be pickled, so loader workers may be given it.
    """
    resize, convert, norm = pipeline.video
    assert isinstance(resize, CropResize)
    assert isinstance(convert, ToTensor)
    assert isinstance(norm, Norm)
    return functools.partial(_transform, size=pipeline.size, resize=resize.param, norm=norm.param)


def _transform(frames: NDArray[np.uint8], *, size: tuple[int, int], resize: CropResizeParam, norm: NormParam) -> Tensor:
    frames = center_crop_resize(frames, *size, resize.interpolation_mode, resize.antialias, resize.align_corners)
    return normalise(to_tensor(frames), norm.mean, norm.std)
