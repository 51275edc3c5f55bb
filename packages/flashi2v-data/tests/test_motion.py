"""The signal motion: what things do, apart from what the camera does."""

import numpy as np
import pytest
from PIL import Image

from flashi2v_data.shapes.scenes import Scene, render
from flashi2v_data.signals.motion import measure_motion

pytest.importorskip("cv2")

HEIGHT, WIDTH, NUM_FRAMES = 144, 256, 9
SECONDS = np.arange(NUM_FRAMES) / 8


@pytest.fixture(scope="module")
def texture() -> np.ndarray:
    """Soft blots of all colours, larger than a frame."""
    blots = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    return np.asarray(Image.fromarray(blots).resize((600, 400), Image.Resampling.BICUBIC))


def filmed(texture: np.ndarray, right: int = 0, down: int = 0, thing: int = 0) -> np.ndarray:
    """A camera that goes so many pixels a frame over the texture, and a thing of 50x50 pixels that goes right."""
    frames = []
    for time in range(NUM_FRAMES):
        top, left = 50 + down * time, 100 + right * time
        frame = texture[top : top + HEIGHT, left : left + WIDTH].copy()
        if thing:
            frame[40:90, 20 + thing * time : 70 + thing * time] = texture[300:350, 10:60]
        frames.append(frame)
    return np.stack(frames)


def percent(pixels: float) -> float:
    """Percent of the shorter side per second, of pixels per frame."""
    return 100 * pixels * 8 / HEIGHT


def test_a_still_picture_does_not_move(texture):
    assert measure_motion(filmed(texture), SECONDS) == (0.0, 0.0)
    assert measure_motion(filmed(texture)[:1], SECONDS[:1]) == (0.0, 0.0)


def test_a_camera_that_pans_is_told_from_things_that_move(texture):
    things, camera = measure_motion(filmed(texture, 5, 3), SECONDS)
    assert camera == pytest.approx(percent(np.hypot(5, 3)), rel=0.05)
    assert things < 0.03 * camera


def test_a_camera_that_zooms_is_no_thing_that_moves(texture):
    boxes = [(100 + 3 * time, 50 + 2 * time, 400 - 3 * time, 250 - 2 * time) for time in range(NUM_FRAMES)]
    zoomed = [Image.fromarray(texture).crop(box).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for box in boxes]
    things, camera = measure_motion(np.stack([np.asarray(picture) for picture in zoomed]), SECONDS)
    assert camera > 5
    assert things < 0.1 * camera


@pytest.mark.parametrize(("right", "down"), [(0, 0), (6, 0), (-3, 2)])
def test_a_thing_moves_by_its_speed_and_area_whatever_the_camera_does(texture, right, down):
    things, camera = measure_motion(filmed(texture, right, down, thing=6), SECONDS)
    # The thing goes 6 pixels right in the frame, the rest goes against the camera.
    own = percent(np.hypot(6 + right, down)) * 50 * 50 / (HEIGHT * WIDTH)
    assert things == pytest.approx(own, rel=0.35, abs=0.1)
    assert camera == pytest.approx(percent(np.hypot(right, down)), rel=0.05, abs=0.5)


def test_a_thing_before_a_plain_background_is_no_camera():
    def moved(direction: str, speed: float) -> tuple[float, float]:
        scene = Scene("circle", "red", "large", "black", direction, "", speed, (0.5, 0.5))
        return measure_motion(render(scene, 2 * NUM_FRAMES - 1, HEIGHT, WIDTH, 16)[::2], SECONDS)

    slowly, quickly = moved("right", 0.2), moved("right", 0.45)
    assert moved("still", 0.0) == (0.0, 0.0)
    assert slowly[1] == quickly[1] == 0
    assert quickly[0] == pytest.approx(slowly[0] * 0.45 / 0.2, rel=0.15)


def test_speed_goes_by_time_and_size_not_by_frames(texture, measured):
    from flashi2v_data.signals.motion import Motion

    fine = np.stack([texture[60:348, 2 * time : 2 * time + 320] for time in range(33)])
    coarse = fine[:, ::2, ::2]
    once = measured(Motion(), fine)["camera_motion"]
    # 2 pixels of 288 at 16 frames a second.
    assert once == pytest.approx(100 * 2 / 288 * 16, rel=0.05)
    assert measured(Motion(), coarse)["camera_motion"] == pytest.approx(once, rel=0.05)
