import json

import av
import numpy as np
import pytest

from flashi2v_data import read_frames
from flashi2v_infer.export import check_directory, check_output, film_strip, video_grid, write_mp4
from flashi2v_infer.settings import InputError

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]], np.uint8)


def video(colour: int, num_frames: int = 3, height: int = 32, width: int = 48) -> np.ndarray:
    """One colour, darker in every frame."""
    frames = np.broadcast_to(COLOURS[colour], (num_frames, height, width, 3)).copy()
    return (frames * np.linspace(1, 0.5, num_frames)[:, None, None, None]).astype(np.uint8)


def test_a_video_carries_its_record(tmp_path):
    record = {"prompt": "a “red” circle", "seed": 3, "settings": {"height": 32}}
    write_mp4(tmp_path / "video.mp4", video(0), 8, record)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == record
        assert container.streams.video[0].average_rate == 8
    decoded = read_frames(tmp_path / "video.mp4", [0, 1, 2])
    assert np.abs(decoded.astype(int) - video(0)).max() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


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


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "directory.mp4").mkdir()
    check_output(tmp_path / "new" / "deeper" / "video.mp4", ".mp4", "--output")
    assert not (tmp_path / "new").exists()
    for path, message in (
        (tmp_path / "video.avi", r"--output: .*video.avi must end in .mp4"),
        (tmp_path / "directory.mp4", r"--output: .* is a directory"),
        (tmp_path / "file" / "video.mp4", r"--output: cannot write below .*file"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(path, ".mp4", "--output")
    with pytest.raises(InputError, match="save_path: cannot write below"):
        check_directory(tmp_path / "file", "save_path")
