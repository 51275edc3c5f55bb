"""The signal still: what is wrong with a clip at first sight."""

import numpy as np
import pytest

from flashi2v_data.shapes.films import draw_film
from flashi2v_data.signals.still import Still

HEIGHT, WIDTH = 72, 128


@pytest.fixture
def film() -> np.ndarray:
    return draw_film("motion", 6, 1, 16, HEIGHT, WIDTH)


def test_what_is_fine_is_told_so(measured):
    for index in range(4):
        found = measured(Still(), draw_film("motion", 6, index, 33, HEIGHT, WIDTH))
        assert (found["black_share"], found["bar_share"], found["num_loops"]) == (0, 0, 1)
        assert found["stillness"] < 1


def test_a_still_clip_is_wholly_still_and_repeats_nothing(measured, film):
    found = measured(Still(), film[:1].repeat(24, 0))
    assert found["stillness"] > 0.995  # coding may change a pixel
    assert found["num_loops"] == 1
    assert measured(Still(), film)["stillness"] < 0.98


def test_black_frames_are_counted(measured, film):
    film[8:] = 6
    assert measured(Still(), film)["black_share"] == pytest.approx(0.5, abs=0.07)  # of those that are looked at
    assert measured(Still(), np.full_like(film, 6))["black_share"] == 1


@pytest.mark.parametrize("crf", [12, 30])
@pytest.mark.parametrize(("rows", "columns"), [(10, 0), (0, 16), (6, 12)])
def test_bars_are_measured_however_they_are_coded(measured, rows, columns, crf):
    film = draw_film("motion", 6, 3, 8, HEIGHT, WIDTH)
    barred = np.zeros_like(film)
    inside = slice(None), slice(rows, HEIGHT - rows), slice(columns, WIDTH - columns)
    barred[inside] = film[inside] // 2 + 100  # no row of the picture is black
    share = 1 - (HEIGHT - 2 * rows) * (WIDTH - 2 * columns) / (HEIGHT * WIDTH)
    assert measured(Still(), barred, crf=crf)["bar_share"] == pytest.approx(share, abs=0.04)


def test_a_thing_before_black_and_a_bar_at_one_side_are_no_bars(measured):
    frames = np.zeros((6, HEIGHT, WIDTH, 3), np.uint8)
    frames[:, 20:50, 40:90] = 200
    assert measured(Still(), frames)["bar_share"] == 0
    frames[:, 20:] = 200
    assert measured(Still(), frames)["bar_share"] == 0


@pytest.mark.parametrize("crf", [12, 30])
def test_a_clip_that_repeats_itself_is_told_how_often(measured, film, crf):
    for times in (2, 3):
        assert measured(Still(), np.concatenate([film] * times), crf=crf)["num_loops"] == times
    # Once and three quarters is no whole loop.
    assert measured(Still(), np.concatenate([film, film[:12]]), crf=crf)["num_loops"] == 1
