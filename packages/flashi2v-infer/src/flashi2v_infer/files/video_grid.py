"""Many videos in one. T frames, H W height and width."""

import math
from collections.abc import Iterable

import numpy as np

from flashi2v_data.loading.transforms import center_crop_resize
from flashi2v_data.video.strips import film_strip as film_strip  # one video in one picture
from flashi2v_infer.files.export import Frames


def video_grid(videos: Iterable[Frames | None], num_videos: int, max_width: int = 1920) -> Frames:
    """Lay videos out in one, row by row, shrunk where the grid would be wider than `max_width`.

    Args:
        videos: (T, H, W, 3) each, of one shape; taken one by one, so that only one is held in full size. None leaves
            its place black.
        num_videos: how many there are.
        max_width: of the grid in pixels.

    Returns:
        (T, rows * h, columns * w, 3), black where there is no video; no frames where there is none at all.
    """
    columns = math.ceil(math.sqrt(num_videos))
    rows = math.ceil(num_videos / columns)
    grid = np.zeros((0, 0, 0, 3), np.uint8)
    for number, frames in enumerate(videos):
        if frames is None:
            continue
        num_frames, height, width, _ = frames.shape
        if width * columns > max_width:
            # yuv420p wants even sides.
            height, width = (max(2, round(side * max_width / (columns * width) / 2) * 2) for side in (height, width))
            frames = center_crop_resize(frames, height, width)
        if not grid.size:
            grid = np.zeros((num_frames, rows * height, columns * width, 3), np.uint8)
        top, left = number // columns * height, number % columns * width
        grid[:, top : top + height, left : left + width] = frames
    return grid
