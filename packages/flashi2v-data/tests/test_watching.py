import dataclasses

import numpy as np
import pytest

from flashi2v_data.shapes.stories import Stage, sample_story
from flashi2v_data.shapes.watching import follow, watch

SIZE, FRAMES = 96, 9
STORIES = [sample_story(12, i, SIZE, SIZE, looks=looks) for i in range(10) for looks in ("seen", "unseen")]
PAIR = next(story for story in STORIES if len(story.things) == 2 and story.movers == (0,) and any(story.way))


def film(story):
    return Stage(story, SIZE, SIZE).film(FRAMES)


@pytest.mark.parametrize("noise", [0, 12])
def test_what_truly_happens_is_seen(noise):
    for story in STORIES:
        frames = film(story) + np.random.default_rng(0).normal(0, noise, (FRAMES, SIZE, SIZE, 3))
        seen = watch(np.clip(frames, 0, 255).astype(np.uint8), story)
        assert seen.direction == story.direction
        assert seen.way_error < (0.3 if not noise else 1.0)
        if story.motion is not None and story.motion.pace is not None:
            assert seen.pace == story.motion.pace
        assert seen.colour_kept
        assert seen.shape_kept or noise
        assert seen.stay
        assert seen.background_change < 1.2 * noise + 1


def test_what_is_followed_is_found_where_it_jumps_to():
    stage = Stage(PAIR, SIZE, SIZE)
    frames = np.stack([stage.frame(moment) for moment in (0, 1, 0.5)])
    path = follow(frames, np.stack([stage.scenery] * 3), stage.sprites[0])
    for place, moment in zip(path, (0, 1, 0.5)):
        assert place == pytest.approx(stage.centre(0, moment), abs=0.1)


def test_another_way_is_seen():
    back = dataclasses.replace(PAIR, way=(-PAIR.way[0] / 4, -PAIR.way[1] / 4))
    seen = watch(film(back), PAIR)
    assert seen.direction != PAIR.direction
    assert seen.way_error == pytest.approx(1.25 * np.hypot(*PAIR.way) * SIZE, rel=0.02)


def test_another_background_is_seen_where_it_begins():
    frames = film(PAIR)
    frames[1:] = np.clip(frames[1:].astype(int) + 20, 0, 255)
    seen = watch(frames, PAIR)
    assert seen.background_jump > 10
    assert seen.background_change > 10
    assert watch(film(PAIR), PAIR).background_jump == 0


def test_another_colour_and_another_shape_are_seen():
    mover = PAIR.things[0]
    inverted = tuple(tuple(255 - channel for channel in colour) for colour in mover.colours)
    for change, told in (({"colours": inverted}, "colour_kept"), ({"kind": "ring"}, "shape_kept")):
        assert mover.kind != "ring"
        other = dataclasses.replace(PAIR, things=(dataclasses.replace(mover, **change), *PAIR.things[1:]))
        assert getattr(watch(film(PAIR), PAIR), told)
        assert not getattr(watch(film(other), PAIR), told)


def test_what_should_stay_and_does_not_is_seen():
    assert watch(film(PAIR), PAIR).stay
    gone = film(dataclasses.replace(PAIR, things=PAIR.things[:1], starts=PAIR.starts[:1]))
    assert not watch(gone, PAIR).stay
    shifted = dataclasses.replace(PAIR, starts=(PAIR.starts[0], tuple(np.asarray(PAIR.starts[1]) + 0.06)))
    assert not watch(film(shifted), PAIR).stay
