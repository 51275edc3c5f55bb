"""Scenes whose captions say how things move and leave to the picture how they look.

One to three things stand before a background. The caption moves one of them, or all, or none; now and then it names
looks, always enough of them to know which thing is meant. Lengths are fractions of the frame's shorter side, places
(right, down) from the upper left corner.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from flashi2v_data.randomness import generator
from flashi2v_data.shapes import pictures
from flashi2v_data.shapes.pictures import RGB, Background, Sprite, Thing, colour_name, draw_colour, paint
from flashi2v_data.shapes.sentences import DIRECTIONS, Motion, Teller, Words
from flashi2v_data.shapes.writing import Clip, write_set

Looks: TypeAlias = Literal["all", "seen", "unseen"]

UNITS = {
    name: (("right" in name) - ("left" in name), ("down" in name or "lower" in name) - ("up" in name))
    for name in DIRECTIONS
}
# Way of a clip.
PACES = {"slowly": (0.15, 0.24), "quickly": (0.36, 0.5)}
ANY_PACE = (0.15, 0.5)
GENTLE = 0.06  # at most, where the caption speaks of no motion
_APART = 90.0  # least distance of colours that touch
_ROOM = 0.02  # between things, and between them and the frame's edge


@dataclass(frozen=True)
class Story:
    """What happens in a clip.

    Attributes:
        background: behind everything.
        things: one to three.
        starts: of each thing's middle, in the first frame.
        movers: which things move, by number.
        way: of the movers from the first frame to the last.
        motion: what the caption says of it; None where it speaks of no motion at all.
        caption: the whole sentence.
    """

    background: Background
    things: tuple[Thing, ...]
    starts: tuple[tuple[float, float], ...]
    movers: tuple[int, ...]
    way: tuple[float, float]
    motion: Motion | None
    caption: str

    @property
    def direction(self) -> str:
        """The nearest of `DIRECTIONS`, or "still"."""
        return name_direction(self.way)


def name_direction(way: tuple[float, float]) -> str:
    """Return the nearest of `DIRECTIONS`, or "still" for less than half of the way of a slow thing."""
    if math.hypot(*way) < PACES["slowly"][0] / 2:
        return "still"
    return max(UNITS, key=lambda name: np.dot(way, UNITS[name]) / math.hypot(*UNITS[name]))


def sample_story(
    seed: int, index: int, height: int, width: int, *, looks: Looks = "all", words: Words = "all"
) -> Story:
    """Draw story number `index` of the set named by `seed`, for frames of this shape.

    Args:
        seed: of the set.
        index: of the story.
        height: of the frame in pixels.
        width: of the frame in pixels.
        looks: "seen" leaves out some kinds of things and backgrounds, and one colour of every shape; in an "unseen"
            story, a thing that moves is one of these.
        words: "seen" leaves out some words and orders of words, of which an "unseen" caption has one.
    """
    key = int(torch.randint(2**62, (), generator=generator(seed, "story", 0, index)))
    return _Author(
        np.random.default_rng(key), looks, words, (width / min(height, width), height / min(height, width))
    ).write()


def is_unseen(thing: Thing) -> bool:
    """Whether looks of "seen" leave such a thing out."""
    if thing.kind not in pictures.SHAPES:
        return thing.kind in pictures.UNSEEN
    # One colour of every shape: its bright reds, say.
    left_out = pictures.COLOURS[(list(pictures.SHAPES).index(thing.kind) + 2) % 8]
    return colour_name(thing.colours[0]) == left_out


class _Author:
    def __init__(self, random: np.random.Generator, looks: Looks, words: Words, room: tuple[float, float]) -> None:
        self._random, self._looks, self._words, self._room = random, looks, words, room
        self._teller = Teller(random, words)

    def write(self) -> Story:
        pick, random = self._teller.pick, self._random
        number = pick((1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3))
        choice = random.random()
        motion: Motion | None
        if self._words == "unseen" or choice < 0.76:
            motion = Motion(pick(DIRECTIONS), pick((None, None, "slowly", "quickly")))
        elif choice < 0.85:
            motion = Motion("still")
        elif choice < 0.93:
            motion = Motion(None, pick((None, None, "slowly", "quickly")))
        else:
            motion = None
        while True:
            background = self._background()
            things = tuple(self._thing(background, first=i == 0) for i in range(number))
            movers = tuple(range(number)) if random.random() < 0.15 else (0,)
            way = self._way(motion)
            starts = self._starts(things, movers, way)
            caption = self._caption(background, things, movers, motion) if starts else None
            if starts and caption:
                return Story(background, things, starts, movers, way, motion, caption)
            # Too narrow, or no words would tell them apart.
            number = max(1, number - int(random.random() < 0.1))

    def _background(self) -> Background:
        random, pick = self._random, self._teller.pick
        seen = ("plain", "plain", "graded", "graded", "striped", "textured", "textured", "checked")
        kind = pick(seen)
        if self._looks == "unseen" and random.random() < 0.2:
            kind = pick(pictures.UNSEEN_BACKGROUNDS)
        first = draw_colour(random) if random.random() < 0.4 else _pale(draw_colour(random), random)
        # A pattern's colours are near each other, so that things stand out.
        low, high = {"plain": (0, 1), "graded": (20, 160), "textured": (40, 200)}.get(kind, (15, 90))
        step = random.standard_normal(3)
        change = step / np.linalg.norm(step) * random.uniform(low, high)
        red, green, blue = np.clip(np.asarray(first) + change, 0, 255).round().astype(int).tolist()
        period = random.uniform(0.12, 0.35)
        return Background(
            kind, (first, (red, green, blue)), period, random.uniform(0, math.pi), int(random.integers(2**31))
        )

    def _thing(self, background: Background, first: bool) -> Thing:
        while True:
            thing = self._any_thing(background)
            if self._looks == "all" or is_unseen(thing) == (first and self._looks == "unseen"):
                return thing

    def _any_thing(self, background: Background) -> Thing:
        random, pick = self._random, self._teller.pick
        choice = random.random()
        if self._looks != "seen" and choice < 0.2:
            kind = pick(tuple(pictures.UNSEEN))
        else:
            kind = pick(tuple(pictures.SHAPES if choice < 0.6 else pictures.DRAWINGS))
        is_shape = kind in pictures.SHAPES
        radius = random.uniform(0.09, 0.2) if is_shape else random.uniform(0.14, 0.28)
        main = self._colour_beside(*background.colours)
        second = self._colour_beside(*background.colours)
        third = self._colour_beside(main)
        shade = pick((0.0, 0.0, float(random.uniform(0.1, 0.5))))
        return Thing(kind, (main, second, third), radius, shade, int(random.integers(2**31)))

    def _colour_beside(self, *others: RGB) -> RGB:
        """Draw a colour that stands out from these, and from all between them."""
        mixtures = np.linspace(others[0], others[-1], 5)
        while True:
            colour = draw_colour(self._random)
            if np.linalg.norm(mixtures - np.asarray(colour), axis=1).min() > _APART:
                return colour

    def _way(self, motion: Motion | None) -> tuple[float, float]:
        random = self._random
        if motion is not None and motion.direction == "still":
            return 0.0, 0.0
        if motion is None:
            length, angle = random.uniform(0, GENTLE) * (random.random() < 0.5), random.uniform(0, 2 * math.pi)
            return length * math.cos(angle), length * math.sin(angle)
        right, down = UNITS[motion.direction or self._teller.pick(DIRECTIONS)]
        length = random.uniform(*PACES.get(motion.pace or "", ANY_PACE)) / math.hypot(right, down)
        return length * right, length * down

    def _starts(
        self, things: tuple[Thing, ...], movers: tuple[int, ...], way: tuple[float, float]
    ) -> tuple[tuple[float, float], ...] | None:
        """Find places from which nothing leaves the frame or touches another on its way; None where none is found."""
        room, moved = np.asarray(self._room), np.asarray(way)
        starts: list[NDArray[np.float64]] = []
        for number, thing in enumerate(things):
            own = moved if number in movers else np.zeros(2)
            lowest = thing.radius + _ROOM + np.maximum(0, -own)
            highest = room - thing.radius - _ROOM - np.maximum(0, own)
            if (lowest > highest).any():
                return None
            for _ in range(20):
                start = lowest + self._random.random(2) * (highest - lowest)
                if all(
                    _clearance(other - start, (moved if i in movers else np.zeros(2)) - own)
                    > thing.radius + things[i].radius + _ROOM
                    for i, other in enumerate(starts)
                ):
                    starts.append(start)
                    break
            else:
                return None
        return tuple((float(right), float(down)) for right, down in starts)

    def _caption(
        self, background: Background, things: tuple[Thing, ...], movers: tuple[int, ...], motion: Motion | None
    ) -> str | None:
        random, teller = self._random, self._teller
        if motion is None:
            names = [
                _with_article(description) for i in range(len(things)) if (description := self._description(things, i))
            ]
            return " and ".join(names) if len(names) == len(things) and random.random() < 0.8 else "a picture"
        where = self._place(background) if random.random() < 0.08 else ""
        if len(movers) > 1:
            subject = teller.pick(("everything", "both" if len(things) == 2 else "all of them"))
            return teller.tell(motion, subject, many=subject != "everything") + where
        if len(things) == 1:
            subject = teller.pick(("", "it", "the object", "the thing"))
            if random.random() < 0.35 and (description := self._description(things, 0)):
                subject = f"the {description}"
            return teller.tell(motion, subject) + where
        description = self._description(things, 0)
        if description is None:
            return None
        sentence = teller.tell(motion, f"the {description}")
        if motion.direction == "still":
            return f"everything {sentence.removeprefix(f'the {description} ')}"
        stayers = [f"the {other}" for i in range(1, len(things)) if (other := self._description(things, i))]
        return teller.with_rest(sentence, stayers, len(things))

    def _place(self, background: Background) -> str:
        if background.kind in ("striped", "checked"):
            return f" on a {background.kind} background"
        colour = colour_name(background.colours[0])
        return f" on {_with_article(colour)} background" if background.kind == "plain" and colour else ""

    def _description(self, things: tuple[Thing, ...], number: int) -> str | None:
        """Draw words that fit one of the things alone; None where there are none."""
        thing, others = things[number], [other for i, other in enumerate(things) if i != number]
        colour, noun = colour_name(thing.colours[0]), _noun(thing)
        found = []
        if noun and all(_noun(other) != noun for other in others):
            found += [noun, noun]
            if colour and _one_colour(thing):
                found.append(f"{colour} {noun}")
        if colour and _one_colour(thing) and all(_surely_other(colour, other) for other in others):
            found += [f"{colour} one"] if others else [f"{colour} thing"]
        if others and all(thing.radius < 0.7 * other.radius for other in others):
            found.append(f"small {noun or 'one'}")
        if others and all(thing.radius > 1.4 * other.radius for other in others):
            found.append(f"{self._teller.pick(('big', 'large'))} {noun or 'one'}")
        return self._teller.pick(found) if found else None


def _pale(colour: RGB, random: np.random.Generator) -> RGB:
    """Move a colour towards white, grey or black, as most backgrounds are."""
    goal, share = (245, 128, 15)[random.integers(3)], random.uniform(0.4, 1)
    red, green, blue = (round(channel + share * (goal - channel)) for channel in colour)
    return red, green, blue


def _noun(thing: Thing) -> str | None:
    # Words for what training never shows would tell nothing to a model.
    known = pictures.SHAPES.keys() | pictures.DRAWINGS.keys() - {"doodle"}
    return thing.kind if thing.kind in known else None


def _one_colour(thing: Thing) -> bool:
    return (thing.kind in pictures.SHAPES or thing.kind == "letter") and thing.shade < 0.3


def _surely_other(colour: str, thing: Thing) -> bool:
    """Whether nobody would call a thing, or a part of it, by this colour."""
    parts = thing.colours[:1] if _one_colour(thing) else thing.colours
    return all(colour_name(part) not in (colour, None) for part in parts)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _clearance(apart: NDArray[np.float64], moved: NDArray[np.float64]) -> float:
    """Return the least distance of two things that are `apart` at first, while one moves by `moved` past the other."""
    share = np.clip(-(apart @ moved) / max(float(moved @ moved), 1e-12), 0, 1)
    return float(np.linalg.norm(apart + share * moved))


class Stage:
    """A story, ready to be drawn in frames of one shape.

    Attributes:
        scenery: (H, W, 3), 0 to 255: the background and all that stays.
        sprites: of all things.
    """

    def __init__(self, story: Story, height: int, width: int) -> None:
        self._story, self._side = story, min(height, width)
        self.sprites = [Sprite(thing, self._side) for thing in story.things]
        self._backdrop = paint(story.background, height, width)
        self.scenery = self.without(set(story.movers), 0)

    def without(self, absent: set[int], moment: float) -> NDArray[np.float32]:
        """Draw everything but some of the things: (H, W, 3), 0 to 255."""
        frame = self._backdrop.copy()
        for number, sprite in enumerate(self.sprites):
            if number not in absent:
                sprite.put(frame, self.centre(number, moment))
        return frame

    def centre(self, number: int, moment: float) -> tuple[float, float]:
        """Return the middle of a thing in pixels, from the first frame (moment 0) to the last (1)."""
        share = moment if number in self._story.movers else 0.0
        right, down = np.asarray(self._story.starts[number]) + share * np.asarray(self._story.way)
        return float(right * self._side), float(down * self._side)

    def frame(self, moment: float) -> NDArray[np.uint8]:
        """Draw one frame: (H, W, 3), RGB."""
        frame = self.scenery.copy()
        for number in self._story.movers:
            self.sprites[number].put(frame, self.centre(number, moment))
        return np.rint(frame).astype(np.uint8)

    def film(self, num_frames: int) -> NDArray[np.uint8]:
        """Draw the clip: (T, H, W, 3), RGB."""
        return np.stack([self.frame(moment) for moment in np.linspace(0, 1, num_frames)])


def write_stories(
    directory: str | os.PathLike[str],
    num: int,
    seed: int,
    height: int,
    width: int,
    frames: int,
    fps: float = 16,
    part: Looks = "all",
) -> None:
    """Write `num` videos whose captions tell the motion; see `write_set`.

    Args:
        directory: a new one.
        num: of videos.
        seed: of the set.
        height: in pixels.
        width: in pixels.
        frames: of each video.
        fps: frames per second.
        part: of looks and of words, as `sample_story` takes both.

    Raises:
        InputError: the directory exists and is not empty, or cannot be made, or a number is out of range.
    """

    def make(index: int) -> Clip:
        story = sample_story(seed, index, height, width, looks=part, words=part)
        truth = {"direction": story.direction, **dataclasses.asdict(story)}
        return Clip(Stage(story, height, width).film(frames), story.caption, truth)

    write_set(directory, num, height, width, frames, fps, make)
