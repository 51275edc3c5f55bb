import numpy as np
import pytest

from flashi2v_infer.layout import film_strip, video_grid
from flashi2v_infer.settings import InputError

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]], np.uint8)


def video(colour: int, num_frames: int = 3, height: int = 32, width: int = 48) -> np.ndarray:
    """One colour, darker in every frame."""
    frames = np.broadcast_to(COLOURS[colour], (num_frames, height, width, 3)).copy()
    return (frames * np.linspace(1, 0.5, num_frames)[:, None, None, None]).astype(np.uint8)


def test_a_film_strip_shows_condition_and_frames_from_first_to_last(photograph):
    frames, truth = video(0, 9), video(1, 9)
    strip = np.asarray(film_strip(COLOURS[4] + np.zeros_like(frames[0]), frames, truth, num_columns=3, tile_height=64))
    tile_width, gap = 96, 4
    assert strip.shape[1] == 4 * (tile_width + gap) + gap
    rows = strip.shape[0] // 2
    for row, expected in enumerate((frames, truth)):
        for column, colour in enumerate((COLOURS[4], expected[0, 0, 0], expected[4, 0, 0], expected[8, 0, 0])):
            # The middle of a tile, below its label.
            pixel = strip[row * rows + rows - 30, gap + column * (tile_width + gap) + tile_width // 2]
            assert np.abs(pixel.astype(int) - colour).max() <= 1, (row, column)
    assert (strip[:15] < 128).all(-1).any(), "labels are drawn above the tiles"


def test_a_film_strip_of_few_frames_shows_each_once():
    strip = film_strip(video(0)[0], video(0, 2), num_columns=6, tile_height=64)
    assert strip.width == 3 * (96 + 4) + 4


def test_a_film_strip_of_different_sizes_is_refused():
    with pytest.raises(InputError, match=r"one size, got \(32, 48, 3\) and \[\(3, 16, 16, 3\)\]"):
        film_strip(video(0)[0], video(0, height=16, width=16))
    with pytest.raises(InputError, match="num_columns must be at least 2"):
        film_strip(video(0)[0], video(0), num_columns=1)


def test_a_grid_lays_videos_out_row_by_row():
    grid = video_grid((video(number) for number in range(5)), 5)
    assert grid.shape == (3, 64, 144, 3)
    for number in range(5):
        top, left = number // 3 * 32, number % 3 * 48
        assert np.array_equal(grid[:, top : top + 32, left : left + 48], video(number))
    assert not grid[:, 32:, 96:].any()


def test_a_wide_grid_is_shrunk_to_even_sides():
    grid = video_grid((video(number, height=64, width=96) for number in range(3)), 3, max_width=100)
    assert grid.shape == (3, 2 * 34, 2 * 50, 3)
    assert np.array_equal(grid[0, 10, 60], COLOURS[1])
    assert np.array_equal(grid[0, 50, 10], COLOURS[2])


def test_a_video_that_is_missing_leaves_its_place_black():
    grid = video_grid([None, video(1), None], 3)
    assert grid.shape == (3, 64, 96, 3)
    assert np.array_equal(grid[:, :32, 48:], video(1))
    assert not grid[:, :, :48].any()
    assert video_grid([None, None], 2).size == 0
