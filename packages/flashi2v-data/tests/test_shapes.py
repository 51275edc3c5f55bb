import dataclasses
import itertools
import json

import numpy as np
import pytest

from flashi2v_data.curation.meta import read_entries
from flashi2v_data.errors import InputError
from flashi2v_data.records import Annotation, read_annotations
from flashi2v_data.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    DISTANCES,
    RADII,
    SHAPES,
    Scene,
    centres,
    radius,
    render,
    sample_scene,
    velocity,
    write_shapes,
)
from flashi2v_data.video.decode import read_frames

SCENE = Scene("circle", "red", "small", "dark blue", "upper left", "slowly", 0.2, (0.5, 0.5))


def test_captions_say_what_happens():
    assert SCENE.caption == "a small red circle moves slowly to the upper left on a dark blue background"
    up = dataclasses.replace(SCENE, direction="up", pace="quickly")
    assert up.caption == "a small red circle moves quickly up on a dark blue background"
    still = dataclasses.replace(SCENE, direction="still", speed=0.0)
    assert still.caption == "a small red circle stands still on a dark blue background"


def test_scenes_depend_on_seed_and_index_alone_and_use_every_value():
    scenes = [sample_scene(3, index) for index in range(600)]
    assert scenes[17] == sample_scene(3, 17)
    assert scenes[17] != sample_scene(4, 17)
    for name, values in (
        ("shape", SHAPES),
        ("colour", COLOURS),
        ("size", RADII),
        ("background", BACKGROUNDS),
        ("direction", DIRECTIONS),
        ("pace", DISTANCES),
    ):
        assert {getattr(scene, name) for scene in scenes} == set(values)
    assert not any(scene.colour in scene.background for scene in scenes)


def test_colours_are_far_apart():
    assert min(np.linalg.norm(np.subtract(*pair)) for pair in itertools.combinations(COLOURS.values(), 2)) > 80
    pairs = itertools.product(COLOURS.values(), BACKGROUNDS.values())
    assert min(np.linalg.norm(np.subtract(*pair)) for pair in pairs) > 90


@pytest.mark.parametrize(("num_frames", "height", "width"), [(1, 32, 32), (17, 64, 96), (49, 480, 832), (121, 96, 64)])
def test_the_whole_path_stays_within_the_frame(num_frames, height, width):
    for index in range(200):
        scene = sample_scene(0, index, seconds=num_frames / 16)
        path = centres(scene, num_frames, height, width, 16)
        size = radius(scene, height, width)
        assert path.min() >= size
        assert (path <= np.asarray([width, height]) - size).all()


def test_a_path_that_is_too_long_says_so():
    fast = dataclasses.replace(SCENE, speed=0.45)
    with pytest.raises(InputError, match="leaves a 64x64 frame within 81 frames"):
        render(fast, 81, 64, 64, 16)


def test_quick_and_slow_cross_their_part_of_the_frame_in_a_clip():
    for pace, distance in DISTANCES.items():
        scene = next(
            scene
            for scene in (sample_scene(0, index, seconds=3) for index in range(100))
            if scene.pace == pace and scene.direction != "still"
        )
        path = centres(scene, 49, 60, 80, 16)
        assert np.hypot(*(path[-1] - path[0])) == pytest.approx(distance * 60)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_soft_edges_and_the_stated_size(shape):
    scene = Scene(shape, "red", "large", "black", "still", "slowly", 0.0, (0.511, 0.523))
    (frame,) = render(scene, 1, 100, 120, 16)
    coverage = (frame[..., 0] - 15.0) / (215.0 - 15.0)
    assert coverage.min() == 0.0
    assert coverage.max() == 1.0
    assert ((coverage > 0.1) & (coverage < 0.9)).any()
    rows, columns = np.nonzero(coverage > 0.5)
    y, x = centres(scene, 1, 100, 120, 16)[0][::-1]
    furthest = np.hypot(rows + 0.5 - y, columns + 0.5 - x).max()
    # The tips of a star are thinner than a pixel; a square's corners reach beyond its nominal radius.
    assert 16 <= furthest <= 25
    assert 0.2 < coverage.sum() / (np.pi * 20**2) <= 1.01


def test_shapes_look_different():
    pictures = [
        render(dataclasses.replace(SCENE, shape=shape, direction="still"), 1, 96, 96, 16)[0].astype(int)
        for shape in SHAPES
    ]
    for one, other in itertools.combinations(pictures, 2):
        assert (abs(one - other).max(axis=-1) > 60).sum() > 20


def test_an_unknown_shape_is_refused():
    with pytest.raises(InputError, match="unknown shape 'blob'"):
        render(dataclasses.replace(SCENE, shape="blob"), 1, 64, 64, 16)


def test_written_videos_show_what_scenes_json_says(shapes):
    truths = json.loads((shapes / "scenes.json").read_text())
    assert len(truths) == 12
    for truth in truths:
        frames = read_frames(shapes / truth["path"], range(13), "pyav").astype(float)
        to_colour = np.linalg.norm(frames - truth["colour_rgb"], axis=-1)
        to_background = np.linalg.norm(frames - truth["background_rgb"], axis=-1)
        weight = to_background / (to_background + to_colour) * (to_background > 40)  # (T, H, W)
        rows, columns = np.arange(32)[:, None] + 0.5, np.arange(48) + 0.5
        path = [((weight * columns).sum((1, 2)) / weight.sum((1, 2))), (weight * rows).sum((1, 2)) / weight.sum((1, 2))]
        measured = [(axis[-1] - axis[0]) / 12 for axis in path]
        stated = truth["velocity_pixels_per_frame"]
        assert measured == pytest.approx([stated["right"], stated["down"]], abs=0.06)


def test_meta_json_and_annotation_file_fit_together(shapes):
    (annotation,) = read_annotations(shapes / "videos.txt")
    assert annotation == Annotation(str(shapes), str(shapes / "videos.json"))
    first = next(read_entries(annotation))
    assert first == {
        "path": str(shapes / "videos/000000.mp4"),
        "cap": sample_scene(7, 0).caption,
        "resolution": {"height": 32, "width": 48},
        "fps": 16,
        "num_frames": 13,
        "cut": [0, 13],
    }


def test_unseen_pairs_of_shape_and_colour_are_those_that_seen_ones_leave_out(tmp_path):
    drawn = {
        pairs: {(scene.shape, scene.colour) for scene in (sample_scene(0, i, pairs=pairs) for i in range(2000))}
        for pairs in ("all", "seen", "unseen")
    }
    assert drawn["all"] == set(itertools.product(SHAPES, COLOURS)) == drawn["seen"] | drawn["unseen"]
    assert not drawn["seen"] & drawn["unseen"]
    # Every shape and every colour is seen, only not these together.
    assert {shape for shape, _ in drawn["unseen"]} == {shape for shape, _ in drawn["seen"]} == set(SHAPES)
    assert {colour for _, colour in drawn["seen"]} == set(COLOURS)
    write_shapes(tmp_path / "new", 20, 0, 32, 32, 5, pairs="unseen")
    truths = json.loads((tmp_path / "new" / "scenes.json").read_text())
    assert {(truth["shape"], truth["colour"]) for truth in truths} <= drawn["unseen"]


def test_the_same_seed_writes_the_same_files(shapes, tmp_path):
    write_shapes(tmp_path / "again", 12, 7, 32, 48, 13)
    write_shapes(tmp_path / "other", 12, 8, 32, 48, 13)
    for name in ("videos.json", *(f"videos/{number:06d}.mp4" for number in range(12))):
        assert (tmp_path / "again" / name).read_bytes() == (shapes / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (shapes / name).read_bytes()


def test_the_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    calls = []

    def fail_at_third(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("disk full")

    monkeypatch.setattr("flashi2v_data.shapes.writing.write_video", fail_at_third)
    with pytest.raises(RuntimeError, match="disk full"):
        write_shapes(tmp_path / "new", 5, 0, 32, 32, 5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num": 0}, "must be positive"),
        ({"height": 33}, "even and at least 32"),
        ({"width": 16}, "even and at least 32"),
        ({"directory": "a,b"}, "commas"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, expected):
    arguments = {"directory": "new", "num": 1, "seed": 0, "height": 32, "width": 32, "frames": 5} | changes
    arguments["directory"] = tmp_path / arguments["directory"]
    with pytest.raises(InputError, match=expected):
        write_shapes(**arguments)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="exists: name a new directory"):
        write_shapes(tmp_path / "full", 1, 0, 32, 32, 5)


def test_velocity_is_in_pixels_per_frame():
    assert velocity(SCENE, 64, 96, 16) == pytest.approx((-0.5657, -0.5657), abs=1e-3)
