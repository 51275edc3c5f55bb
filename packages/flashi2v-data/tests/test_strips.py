"""Film strips, looked at pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from flashi2v_data.errors import InputError
from flashi2v_data.video.strips import film_strip, stack

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 200, 200]], np.uint8)
CONDITION = 2


def video(colour: int, num_frames: int = 3, height: int = 32, width: int = 48) -> np.ndarray:
    """One colour, darker in every frame."""
    frames = np.broadcast_to(COLOURS[colour], (num_frames, height, width, 3)).copy()
    return (frames * np.linspace(1, 0.5, num_frames)[:, None, None, None]).astype(np.uint8)


def test_a_film_strip_shows_condition_and_frames_from_first_to_last():
    frames, truth = video(0, 9), video(1, 9)
    strip = np.asarray(film_strip(video(CONDITION)[0], frames, truth, num_columns=3, tile_height=64))
    tile_width, gap = 96, 4
    assert strip.shape[1] == 4 * (tile_width + gap) + gap
    rows = strip.shape[0] // 2
    for row, expected in enumerate((frames, truth)):
        for column, colour in enumerate((COLOURS[CONDITION], expected[0, 0, 0], expected[4, 0, 0], expected[8, 0, 0])):
            # The middle of a tile, below its label.
            pixel = strip[row * rows + rows - 30, gap + column * (tile_width + gap) + tile_width // 2]
            assert np.abs(pixel.astype(int) - colour).max() <= 1, (row, column)
    assert (strip[:15] < 128).all(-1).any(), "labels are drawn above the tiles"


def test_a_film_strip_of_few_frames_shows_each_once():
    strip = film_strip(video(0)[0], video(0, 2), num_columns=6, tile_height=64)
    assert strip.width == 3 * (96 + 4) + 4


def test_a_caption_is_written_below_in_as_many_lines_as_it_takes():
    def strip(caption: str) -> np.ndarray:
        return np.asarray(film_strip(video(0)[0], video(0), caption=caption, tile_height=64))

    bare, short, long = strip(""), strip("a circle"), strip("a circle moves to the left " * 9)
    assert np.array_equal(short[: len(bare)], bare)
    assert (short[len(bare) :] < 128).any()
    assert short.shape[1] == long.shape[1]
    assert len(long) - len(bare) > 2 * (len(short) - len(bare))
    assert (long[:, -4:] == 255).all(), "no line reaches the margin"


def test_a_film_strip_of_different_sizes_is_refused():
    with pytest.raises(InputError, match=r"one size, got \(32, 48, 3\) and \[\(3, 16, 16, 3\)\]"):
        film_strip(video(0)[0], video(0, height=16, width=16))
    with pytest.raises(InputError, match="num_columns must be at least 2"):
        film_strip(video(0)[0], video(0), num_columns=1)


def test_strips_are_stacked_below_each_other():
    wide, high = Image.new("RGB", (8, 2), "red"), Image.new("RGB", (4, 6), "blue")
    sheet = np.asarray(stack([wide, high]))
    assert sheet.shape == (8, 8, 3)
    assert (sheet[:2] == (255, 0, 0)).all()
    assert (sheet[2:, :4] == (0, 0, 255)).all()
    assert (sheet[2:, 4:] == 255).all()
