import dataclasses

import numpy as np
import pytest

from flashi2v_data.shapes.scenes import COLOURS, DIRECTIONS, SHAPES, Scene, centres, render, sample_scene
from flashi2v_data.shapes.tracking import look, name_motion, surroundings, track

SIZE, FRAMES, FPS = 64, 17, 16
SCENE = Scene("star", "red", "small", "grey", "upper left", "slowly", 0.2, (0.5, 0.5))


def video(scene, *, noise=0.0):
    frames = render(scene, FRAMES, SIZE, SIZE, FPS)
    if not noise:
        return frames
    return np.clip(frames + np.random.default_rng(0).normal(0, noise, frames.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_every_motion_of_the_set_is_named_right(noise):
    scenes = [sample_scene(11, index, seconds=FRAMES / FPS) for index in range(120)]
    assert {scene.direction for scene in scenes} == set(DIRECTIONS)
    for scene in scenes:
        motion = track(video(scene, noise=noise), scene)
        assert motion.direction == scene.direction
        assert motion.pace == ("still" if scene.direction == "still" else scene.pace)
        off = motion.path - centres(scene, FRAMES, SIZE, SIZE, FPS)
        assert np.abs(off).max() < (0.5 if not noise else 1.0)


def test_the_way_is_that_of_the_frames_and_not_of_the_scene():
    elsewhere = dataclasses.replace(SCENE, direction="right", pace="quickly", speed=0.45)
    motion = track(video(elsewhere), SCENE)
    assert (motion.direction, motion.pace) == ("right", "quickly")
    assert motion.way == pytest.approx((0.45 * SIZE, 0.0), abs=0.3)


def test_a_shape_that_jumps_is_found_where_it_jumps_to():
    frames = video(dataclasses.replace(SCENE, direction="still", speed=0.0))
    frames[8:] = np.roll(frames[8:], 15, axis=2)
    path = track(frames, SCENE).path
    assert path[8:, 0].mean() - path[:8, 0].mean() == pytest.approx(15, abs=0.2)


def test_a_shape_at_the_edge_is_found_though_some_of_it_is_outside():
    frames = video(dataclasses.replace(SCENE, direction="still", speed=0.0))
    centre = track(frames, SCENE).path[0]
    cut = frames[:, :, round(centre[0]) - 2 :]  # its left side is gone
    assert track(cut, SCENE).path[0][0] == pytest.approx(2, abs=1.0)


@pytest.mark.parametrize(
    ("way", "motion"),
    [
        ((0.0, 0.0), ("still", "still")),
        ((6.0, 0.0), ("still", "still")),
        ((7.0, 0.0), ("right", "slowly")),
        ((0.0, -20.0), ("up", "slowly")),
        ((0.0, -21.5), ("up", "quickly")),
        ((-20.0, 18.0), ("lower left", "quickly")),
    ],
)
def test_motions_are_named_by_the_nearest_one(way, motion):
    assert name_motion(way, SIZE) == motion


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_shape_and_colour_are_told_from_the_pixels(shape, colour):
    scene = dataclasses.replace(SCENE, shape=shape, colour=colour)
    frames = video(scene, noise=10)
    for asked in (scene, dataclasses.replace(scene, shape="circle", colour="red")):
        assert look(frames[-1], asked, track(frames, scene).path[-1]) == (shape, colour)


def test_surroundings_leave_background_alone():
    frame = video(SCENE)[0]
    near = surroundings(SCENE, track(frame[None], SCENE).path[0], SIZE, SIZE)
    assert (frame[~near] == frame[0, 0]).all()
    assert not (frame[near] == frame[0, 0]).all()
