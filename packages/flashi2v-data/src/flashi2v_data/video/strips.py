"""Film strips: frames of a video in a row. T frames, H W height and width."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flashi2v_data.errors import InputError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def film_strip(
    image: NDArray[np.uint8],
    frames: NDArray[np.uint8],
    ground_truth: NDArray[np.uint8] | None = None,
    *,
    caption: str = "",
    num_columns: int = 6,
    tile_height: int = 160,
) -> Image.Image:
    """Draw evenly chosen frames of a video in a row, the image that it should start with at their left.

    Args:
        image: (H, W, 3), the condition.
        frames: (T, H, W, 3), the generated video.
        ground_truth: (T, H, W, 3), a second row: how the real video went on.
        caption: written below, in as many lines as it takes.
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
    return _labelled_table(cells, caption, tile_height)


def stack(strips: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other, as wide as the widest."""
    sheet = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _labelled_table(
    rows: Sequence[Sequence[tuple[str, NDArray[np.uint8]]]], caption: str, tile_height: int
) -> Image.Image:
    height, width = rows[0][0][1].shape[:2]
    tile = max(1, round(tile_height * width / height)), tile_height
    gap = max(4, tile_height // 40)
    font = ImageFont.load_default(max(10, tile_height // 12))
    label_height = int(font.getbbox("Ag")[3]) + gap
    pitch = tile[0] + gap, tile[1] + label_height + gap
    table_width, caption_top = pitch[0] * len(rows[0]) + gap, pitch[1] * len(rows) + gap
    lines = [*_wrap(caption, font, table_width - 2 * gap)]
    table = Image.new("RGB", (table_width, caption_top + label_height * len(lines)), "white")
    draw = ImageDraw.Draw(table)
    for row, cells in enumerate(rows):
        for column, (label, pixels) in enumerate(cells):
            left, top = gap + column * pitch[0], gap + row * pitch[1]
            draw.text((left, top), label, fill="black", font=font)
            picture = Image.fromarray(pixels).resize(tile, Image.Resampling.LANCZOS)
            table.paste(picture, (left, top + label_height))
    for number, line in enumerate(lines):
        draw.text((gap, caption_top + number * label_height), line, fill="black", font=font)
    return table


def _wrap(text: str, font: Font, width: int) -> Iterator[str]:
    """Break a text into lines that are not wider than `width` pixels, unless a single word is."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if line and font.getlength(longer) > width:
            yield line
            line = word
        else:
            line = longer
    if line:
        yield line
