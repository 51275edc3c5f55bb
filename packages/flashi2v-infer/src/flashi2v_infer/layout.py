"""Pictures of many frames: film strips and grids. T frames, H W height and width."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashi2v_data.errors import InputError
from flashi2v_data.transforms import center_crop_resize
from flashi2v_infer.export import Frames
from flashi2v_infer.inputs import Pixels


def film_strip(
    image: Pixels,
    frames: Frames,
    ground_truth: Frames | None = None,
    *,
    num_columns: int = 6,
    tile_height: int = 160,
) -> Image.Image:
    """Draw evenly chosen frames of a video in a row, the image that it should start with at their left.

    Args:
        image: (H, W, 3), the condition.
        frames: (T, H, W, 3), the generated video.
        ground_truth: (T, H, W, 3), a second row: how the real video went on.
        num_columns: frames shown, first and last among them.
        tile_height: of a frame in pixels.

    Raises:
        InputError: sizes differ, or there are fewer than two columns.
    """
    rows = {"generated": frames} if ground_truth is None else {"generated": frames, "ground truth": ground_truth}
    if num_columns < 2:
        raise InputError(f"num_columns must be at least 2, got {num_columns}")
    if any(video.shape != frames.shape for video in rows.values()) or image.shape != frames.shape[1:]:
        sizes = [video.shape for video in rows.values()]
        raise InputError(f"image and videos must be of one size, got {image.shape} and {sizes}")
    times = np.unique(np.linspace(0, len(frames) - 1, num_columns).round().astype(int))
    cells = [
        [("condition", image), *((f"{label if time == 0 else 'frame'} {time}", video[time]) for time in times)]
        for label, video in rows.items()
    ]
    return _labelled_table(cells, tile_height)


def _labelled_table(rows: Sequence[Sequence[tuple[str, Pixels]]], tile_height: int) -> Image.Image:
    height, width = rows[0][0][1].shape[:2]
    tile = max(1, round(tile_height * width / height)), tile_height
    gap = max(4, tile_height // 40)
    font = ImageFont.load_default(max(10, tile_height // 12))
    label_height = font.getbbox("Ag")[3] + gap
    pitch = tile[0] + gap, tile[1] + label_height + gap
    table = Image.new("RGB", (int(pitch[0] * len(rows[0]) + gap), int(pitch[1] * len(rows) + gap)), "white")
    draw = ImageDraw.Draw(table)
    for row, cells in enumerate(rows):
        for column, (label, pixels) in enumerate(cells):
            left, top = gap + column * pitch[0], gap + row * pitch[1]
            draw.text((left, top), label, fill="black", font=font)
            picture = Image.fromarray(pixels).resize(tile, Image.Resampling.LANCZOS)
            table.paste(picture, (int(left), int(top + label_height)))
    return table


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
