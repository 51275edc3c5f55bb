import dataclasses
import json
import re

import numpy as np
import pytest

from flashi2v_data.shapes import pictures
from flashi2v_data.shapes.pictures import (
    BACKGROUNDS,
    KINDS,
    UNSEEN,
    UNSEEN_BACKGROUNDS,
    Background,
    Sprite,
    Thing,
    colour_name,
    paint,
)
from flashi2v_data.shapes.sentences import DIRECTIONS, Motion, Teller, phrases
from flashi2v_data.shapes.stories import PACES, Stage, is_unseen, name_direction, sample_story, write_stories

SIZE = 64
STORIES = [sample_story(5, i, SIZE, SIZE, looks="seen", words="seen") for i in range(300)]
RED, GREEN, WHITE = (220, 30, 30), (20, 200, 60), (245, 245, 245)


def words(text):
    return re.findall(r"\w+", text)


def test_stories_depend_on_seed_and_index_alone_and_use_everything():
    assert STORIES[7] == sample_story(5, 7, SIZE, SIZE, looks="seen", words="seen")
    assert STORIES[7] != sample_story(6, 7, SIZE, SIZE, looks="seen", words="seen")
    things = [thing for story in STORIES for thing in story.things]
    assert {thing.kind for thing in things} == set(pictures.SHAPES) | set(pictures.DRAWINGS)
    assert {story.background.kind for story in STORIES} == set(BACKGROUNDS) - set(UNSEEN_BACKGROUNDS)
    assert {len(story.things) for story in STORIES} == {1, 2, 3}
    assert {story.motion and story.motion.direction for story in STORIES} == {*DIRECTIONS, "still", None}
    assert {story.direction for story in STORIES} == {*DIRECTIONS, "still"}


def test_what_captions_say_is_what_happens():
    for story in STORIES:
        length = np.hypot(*story.way)
        if story.motion is None:
            assert story.direction == "still"
            assert len(words(story.caption)) <= 12
            continue
        if story.motion.direction is not None:
            assert story.direction == story.motion.direction
        if story.motion.pace is not None:
            low, high = PACES[story.motion.pace]
            assert low <= length <= high + 1e-9
        if story.motion.direction in DIRECTIONS:
            told = [phrase for phrase in phrases(story.direction)[0] if re.search(rf"\b{phrase}\b", story.caption)]
            assert told, story.caption


def test_looks_are_said_of_things_that_look_so_and_of_no_other():
    for story in STORIES:
        names = [thing.kind for thing in story.things]
        if len(story.movers) == 1 and len(names) > 1 and story.direction != "still":
            # Before the others come, the caption means the mover.
            first = re.split(r",| and the | and nothing| while ", story.caption)[0]
            others = set(words(first)) & set(names)
            assert others <= {names[0]}, story.caption
            colours = set(words(first)) & set(pictures.COLOURS)
            sizes = set(words(first)) & {"small", "big", "large"}
            assert names.count(names[0]) == 1 or sizes or colours, story.caption
            assert all(colour_name(story.things[0].colours[0]) == colour for colour in colours), story.caption


def test_captions_leave_looks_to_the_picture_mostly():
    silent = [
        not set(words(story.caption)) & {*KINDS, *pictures.COLOURS} for story in STORIES if len(story.things) == 1
    ]
    assert np.mean(silent) > 0.5


def test_paths_stay_in_the_frame_and_apart():
    for story in [*STORIES, *(sample_story(0, i, 48, 96) for i in range(100))]:
        moved = np.asarray([np.asarray(story.way) * (i in story.movers) for i in range(len(story.things))])
        radii = np.asarray([thing.radius for thing in story.things])[:, None]
        for moment in np.linspace(0, 1, 5):
            places = np.asarray(story.starts) + moment * moved
            assert (places > radii).all()
            for i in range(1, len(places)):
                apart = np.linalg.norm(places[:i] - places[i], axis=1)
                assert (apart > (radii[:i] + radii[i])[:, 0]).all()


def test_unseen_looks_and_words_are_those_that_seen_ones_leave_out():
    assert not any(is_unseen(thing) for story in STORIES for thing in story.things)
    known = {word for story in STORIES for word in words(story.caption)}
    new = [sample_story(5, i, SIZE, SIZE, looks="unseen", words="unseen") for i in range(150)]
    assert all(is_unseen(story.things[0]) for story in new)
    assert {story.things[0].kind for story in new} >= set(UNSEEN)
    assert any(story.things[0].kind not in UNSEEN for story in new), "pairs of shape and colour"
    assert {"sails", "upward", "swiftly"} & {word for story in new for word in words(story.caption)} - known
    # In other orders all words are known.
    assert any(set(words(story.caption)) <= known for story in new)


def test_sentences_in_the_plural_and_of_things_that_stay():
    told = {Teller(np.random.default_rng(i), "seen").tell(Motion("left"), "both", many=True) for i in range(60)}
    assert "both move to the left" in told
    assert not any("moves" in sentence for sentence in told)
    ends = {Teller(np.random.default_rng(i)).with_rest("the star moves", ["the ring"], 2) for i in range(200)}
    assert {"the star moves", "the star moves, the ring stays", "the star moves and nothing else moves"} <= ends


def test_a_moving_picture_keeps_its_size_its_colours_and_its_place_between_pixels():
    sprite = Sprite(Thing("star", (RED, GREEN, WHITE), 0.15), SIZE)
    whole = None
    for right in np.linspace(30, 31, 9):
        _, patch = sprite.patch((right, 30.25), SIZE, SIZE)
        (rows, columns), covered = sprite.patch((right, 30.25), SIZE, SIZE)[0], patch[..., 3]
        whole = whole or covered.sum()
        assert covered.sum() == pytest.approx(whole, rel=1e-5)
        centre = (covered.sum(0) * (np.arange(columns.start, columns.stop) + 0.5)).sum() / covered.sum()
        assert centre == pytest.approx(right, abs=0.03)
        assert patch[..., :3].sum((0, 1)) / covered.sum() == pytest.approx(RED, rel=0.01)
        assert rows.stop - rows.start >= 2 * sprite.radius


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_within_its_square_and_fills_a_part_of_it(kind):
    for seed in range(3):
        frame = np.zeros((SIZE, SIZE, 3), np.float32)
        Sprite(Thing(kind, (RED, GREEN, WHITE), 0.25, seed=seed), SIZE).put(frame, (32.3, 31.6))
        drawn = frame.max(-1) > 20
        rows, columns = np.nonzero(drawn)
        assert min(rows.min(), columns.min()) >= 15
        assert max(rows.max(), columns.max()) <= 48
        assert 0.06 < drawn.mean() / 0.25 < 1
        assert frame.min() >= 0
        assert frame.max() <= 255


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_backgrounds_mix_their_two_colours(kind):
    painted = paint(Background(kind, (RED, GREEN), period=0.25, angle=0.4, seed=3), 48, 64)
    share = (painted[..., 1] - RED[1]) / (GREEN[1] - RED[1])
    assert painted.shape == (48, 64, 3)
    assert share.min() >= -1e-5
    assert share.max() <= 1 + 1e-5
    if kind == "plain":
        assert share.max() == 0
    else:
        assert share.min() < 0.01
        assert share.max() > 0.99


def test_colours_have_the_names_that_people_give_them():
    assert [colour_name(colour) for colour in (RED, GREEN, WHITE, (20, 20, 25), (240, 220, 30))] == [
        "red",
        "green",
        "white",
        "black",
        "yellow",
    ]
    assert colour_name((140, 60, 70)) is None
    assert colour_name((200, 230, 20)) is None, "between yellow and green"


def test_a_film_moves_what_the_story_says_and_nothing_else():
    story = next(story for story in STORIES if len(story.things) == 2 and story.movers == (0,) and any(story.way))
    stage = Stage(story, SIZE, SIZE)
    film = stage.film(5).astype(int)
    touched = np.zeros((SIZE, SIZE), bool)
    for moment in np.linspace(0, 1, 5):
        touched[stage.sprites[0].patch(stage.centre(0, moment), SIZE, SIZE)[0]] = True
    assert (film[:, ~touched] == film[0, ~touched]).all()
    way = np.subtract(stage.centre(0, 1), stage.centre(0, 0)) / SIZE
    assert name_direction(tuple(way)) == story.direction
    assert (film[0] != film[-1]).any()


def test_written_stories_say_what_is_true(tmp_path):
    write_stories(tmp_path / "set", 3, 5, 48, 64, 5, part="seen")
    truths = json.loads((tmp_path / "set" / "scenes.json").read_text())
    captions = [record["cap"] for record in json.loads((tmp_path / "set" / "videos.json").read_text())]
    for number, (truth, caption) in enumerate(zip(truths, captions)):
        story = sample_story(5, number, 48, 64, looks="seen", words="seen")
        assert caption == truth["caption"] == story.caption
        assert truth["direction"] == story.direction
        told = json.loads(json.dumps(dataclasses.asdict(story)))
        assert {key: truth[key] for key in told} == told
