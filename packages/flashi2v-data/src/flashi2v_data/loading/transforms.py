"""From decoded frames to the model's input. T frames, H W height and width of the file, h w of the sample."""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from flashi2v_data.errors import InputError
from flashi2v_data.loading.config import TransformPipeline

Interpolation = Literal["bilinear", "bicubic"]


def center_crop_resize(
    frames: NDArray[np.uint8],
    height: int,
    width: int,
    interpolation: Interpolation = "bilinear",
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
    result = np.empty((len(frames), height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        # One by one: a frame and its resized copy fit the processor's cache, a clip does not.
        resized = _crop_resize(frame, (height, width), interpolation, antialias, align_corners)
        result[number] = resized.permute(1, 2, 0).numpy()
    return result


def _crop_resize(
    frame: NDArray[np.uint8], size: tuple[int, int], interpolation: Interpolation, antialias: bool, align_corners: bool
) -> Tensor:
    """(H, W, 3) to (3, h, w), both uint8."""
    (height, width), (old_height, old_width) = size, frame.shape[:2]
    # Whole numbers: a scale in floats can round a side that fits exactly up by one pixel.
    if height * old_width >= width * old_height:
        cover = height, math.ceil(old_width * height / old_height)
    else:
        cover = math.ceil(old_height * width / old_width), width
    # Torch has vectorised kernels for uint8 pictures whose colours lie side by side.
    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    if cover != (old_height, old_width):
        picture = interpolate(picture, cover, mode=interpolation, align_corners=align_corners, antialias=antialias)
    top, left = round((cover[0] - height) / 2), round((cover[1] - width) / 2)
    return picture[0, :, top : top + height, left : left + width]


def to_tensor(frames: NDArray[np.uint8]) -> Tensor:
    """Turn (T, H, W, 3) uint8 into (3, T, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).float() / 255.0


def normalise(video: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Return (video - mean) / std; the defaults map [0, 1] to [-1, 1]."""
    return (video - mean) / std


class VideoTransform:
    """What a `transform_pipeline` describes, in two steps that a worker and its trainer may share.

    Attributes:
        size: h and w.
        flip_probability: how often a clip is to be mirrored.
    """

    def __init__(self, pipeline: TransformPipeline) -> None:
        self.size = pipeline.size
        self.flip_probability = pipeline.flip_probability
        self._resize = pipeline.crop_resize
        self._mean, self._std = pipeline.mean_and_std

    def __call__(self, frames: NDArray[np.uint8], *, flip: bool = False) -> Tensor:
        """(T, H, W, 3) uint8 to (3, T, h, w) float32."""
        pictures = np.empty((len(frames), 3, *self.size), np.uint8)
        for frame, picture in zip(frames, pictures):
            self.put_picture(frame, picture, flip=flip)
        return self.normalise(torch.from_numpy(pictures))

    def put_picture(self, frame: NDArray[np.uint8], out: NDArray[np.uint8], *, flip: bool = False) -> None:
        """Bring one frame to the size of `out`: (H, W, 3) to (3, h, w), both uint8."""
        resize, size = self._resize, (out.shape[1], out.shape[2])
        picture = _crop_resize(frame, size, resize.interpolation_mode, resize.antialias, resize.align_corners)
        torch.from_numpy(out).copy_(picture.flip(-1) if flip else picture)

    def normalise(self, pictures: Tensor, out: Tensor | None = None) -> Tensor:
        """Normalise: (T, 3, h, w) uint8 to (3, T, h, w) float32, on the device where the pictures are."""
        num_frames, _, height, width = pictures.shape
        if out is None:
            shape = (3, num_frames, height, width)
            out = empty_video(shape) if pictures.device.type == "cpu" else torch.empty(shape, device=pictures.device)
        # On the CPU one plane after the other, while it is in the cache.
        step = 1 if pictures.device.type == "cpu" else num_frames
        for colour, (mean, std) in enumerate(zip(self._mean, self._std)):
            # (x / 255 - mean) / std, and for the usual halves bit for bit what `normalise(to_tensor(...))` gives.
            scale, shift = 255 * std, mean / std
            for source, target in zip(pictures[:, colour].split(step), out[colour].split(step)):
                target.copy_(source).div_(scale).sub_(shift)
        return out


def empty_video(shape: tuple[int, ...]) -> Tensor:
    """Reserve float32 memory through NumPy, which asks for huge pages: 4 times as fast at first use as torch."""
    return torch.from_numpy(np.empty(shape, np.float32))


def build_transform(pipeline: TransformPipeline) -> VideoTransform:
    """Make the function that a `transform_pipeline` describes: (T, H, W, 3) uint8 to (3, T, h, w) float32.

    It can be pickled, so loader workers may be given it.
    """
    return VideoTransform(pipeline)
