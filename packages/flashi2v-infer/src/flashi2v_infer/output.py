"""What the pipeline returns: frames, and ways to keep and to see them.

B videos, C latent channels, T video frames, F latent frames, H W latent grid.
"""

import base64
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flashi2v_data.errors import InputError
from flashi2v_infer.files.export import Record, as_frames, check_output, save_video, write_mp4

AnyFrames: TypeAlias = list[list[Image.Image]] | NDArray[np.float32] | Tensor


@dataclass
class FlashI2VPipelineOutput(BaseOutput):
    """What the pipeline returns. In a notebook it plays.

    Attributes:
        frames: "pil": a list of T images for every video; "np": (B, T, 8H, 8W, 3) in [0, 1]; "pt": (B, T, 3, 8H, 8W)
            in [0, 1]; "latent": (B, C, F, H, W), normalised.
        decoding: in words, in which way the VAE decoded; None for latents.
        fps: frames per second that the model was trained for.
        calls: which calls of the network were made and skipped, and what is predicted of the error; None where none
            was skipped.
    """

    frames: AnyFrames
    decoding: str | None = None
    fps: float = 16.0
    calls: dict[str, Any] | None = None

    def save(
        self, path: str | Path, video: int | None = None, *, fps: float | None = None, record: Record | None = None
    ) -> Path:
        """Write a video.

        Args:
            path: .mp4, .gif or .webp, or a new directory for PNGs.
            video: which one, from 0; it may be left out where there is but one.
            fps: frames per second; None: `self.fps`.
            record: how the video was made, which goes into the file and beside it.

        Returns:
            where it is.

        Raises:
            InputError: the name, or what is to be written, cannot be used.
            flashi2v_data.errors.StorageError: it cannot be written whole; nothing of it stays.
        """
        frames, fps = self._video(video), self.fps if fps is None else fps
        target = check_output(str(path), fps, "save")
        save_video(target, frames, fps, record)
        return target

    def _video(self, number: int | None) -> list[Image.Image] | NDArray[np.float32] | Tensor:
        if self.decoding is None:
            raise InputError("these are latents: sample with another output_type to get a video")
        if number is None and len(self.frames) > 1:
            raise InputError(f"there are {len(self.frames)} videos: say which to save, save(path, 0) for example")
        if not 0 <= (number or 0) < len(self.frames):
            raise InputError(f"there is no video {number}: there are {len(self.frames)}, counted from 0")
        return self.frames[number or 0]

    def _repr_html_(self) -> str:
        """Return a page's part that plays the videos, which notebooks show."""
        if self.decoding is None:
            return f"<pre>latents {tuple(getattr(self.frames, 'shape', ()))}</pre>"
        return "\n".join(_player(self._video(number), self.fps) for number in range(len(self.frames)))


def _player(frames: list[Image.Image] | NDArray[np.float32] | Tensor, fps: float) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "video.mp4"
        write_mp4(path, frames, fps)
        data = base64.b64encode(path.read_bytes()).decode()
    height, width = as_frames(frames).shape[1:3]
    scale = max(1, 256 // width)  # tiny videos are shown larger, in whole pixels
    return (
        f'<video controls loop autoplay muted width="{width * scale}" height="{height * scale}" '
        f'style="image-rendering: pixelated" src="data:video/mp4;base64,{data}"></video>'
    )
