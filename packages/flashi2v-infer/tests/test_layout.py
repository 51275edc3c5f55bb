import numpy as np

from flashi2v_infer.files.video_grid import video_grid

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [30, 200, 200]], np.uint8)


def video(colour: int, num_frames: int = 3, height: int = 32, width: int = 48) -> np.ndarray:
    """One colour, darker in every frame."""
    frames = np.broadcast_to(COLOURS[colour], (num_frames, height, width, 3)).copy()
    return (frames * np.linspace(1, 0.5, num_frames)[:, None, None, None]).astype(np.uint8)


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
