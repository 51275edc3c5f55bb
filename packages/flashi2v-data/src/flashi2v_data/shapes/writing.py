"""A set of drawn videos on disk, with captions, and with what truly happens in them."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flashi2v_data.atomic import atomic_directory
from flashi2v_data.errors import InputError
from flashi2v_data.video.write import write_video


class Clip(NamedTuple):
    """A drawn video: its frames (T, H, W, 3) in RGB, its caption, and what is true of it, as JSON takes it."""

    film: NDArray[np.uint8]
    caption: str
    truth: dict[str, Any]


def write_set(
    directory: str | os.PathLike[str],
    num: int,
    height: int,
    width: int,
    frames: int,
    fps: float,
    make: Callable[[int], Clip],
) -> None:
    """Write `num` videos with captions; the directory appears whole or not at all.

    Beside the videos (`videos/000000.mp4`, ...) it holds `videos.json` (the meta JSON), `videos.txt` (the annotation
    file, for the filter's `ann_txt_path`) and `scenes.json` (what truly happens in each video, for evaluation).

    Args:
        directory: a new one.
        num: of videos.
        height: in pixels.
        width: in pixels.
        frames: of each video.
        fps: frames per second.
        make: draws a video by its number.

    Raises:
        InputError: the directory exists and is not empty, or cannot be made, or a number is out of range.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} exists: name a new directory, or remove it first")
    if "," in str(directory):
        raise InputError(f"{directory}: the annotation file separates paths by commas, so choose one without")
    if num < 1 or frames < 1 or fps <= 0:
        raise InputError(f"num, frames and fps must be positive, got {num}, {frames} and {fps}")
    if min(height, width) < 32 or height % 2 or width % 2:
        raise InputError(f"height and width must be even and at least 32, got {height}x{width}")

    records, truths = [], []
    with ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_directory(directory))
        except OSError as error:
            raise InputError(f"{directory}: cannot be made: {error.strerror}; choose another place") from None
        for index in tqdm(range(num), desc="shapes", unit="video", disable=None):
            clip = make(index)
            path = f"videos/{index:06d}.mp4"
            write_video(temporary / path, clip.film, fps)
            records.append(
                {
                    "path": path,
                    "cap": clip.caption,
                    "resolution": {"height": height, "width": width},
                    "fps": fps,
                    "num_frames": frames,
                    "cut": [0, frames],
                }
            )
            truths.append({"path": path, **clip.truth})
        (temporary / "videos.json").write_text(json.dumps(records, indent=1) + "\n")
        (temporary / "scenes.json").write_text(json.dumps(truths, indent=1) + "\n")
        (temporary / "videos.txt").write_text(f"{directory},{directory / 'videos.json'}\n")
