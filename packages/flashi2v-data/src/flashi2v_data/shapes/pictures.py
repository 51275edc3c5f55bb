"""What is seen in a scene: shapes and small drawings as sprites, backgrounds behind them, and the names of colours.

A sprite is drawn once, finer than the frame, and put anywhere between pixels: every pixel gets the exact share of it
that it covers, so that nothing wobbles on the way. Lengths of drawings are in units of half their side, (right, down)
from their middle.
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RGB: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]

_FINER = 6  # sprite pixels to a pixel, each way
_BLACK, _WHITE = (20, 20, 20), (245, 245, 245)
_ALPHABET = "ABCDEFGHKLMNPRSTUVXYZ234579"

# Hue in degrees, between which nobody doubts the name; the colour is bright and saturated then.
_HUES = {
    "red": (-10, 10),
    "orange": (22, 36),
    "yellow": (48, 62),
    "green": (95, 150),
    "cyan": (174, 192),
    "blue": (212, 240),
    "purple": (265, 288),
    "pink": (310, 338),
}
_GREYS = {"black": (0.0, 0.15), "grey": (0.4, 0.65), "white": (0.9, 1.0)}
COLOURS = (*_HUES, *_GREYS)


def colour_name(colour: RGB) -> str | None:
    """Return what everybody would call a colour, one of `COLOURS`; None where people would disagree."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    if saturation < 0.1 or value < 0.12:
        return next((name for name, (low, high) in _GREYS.items() if low <= value <= high), None)
    if saturation < 0.5 or value < 0.6:
        return None
    degrees = hue * 360
    return next((name for name, (low, high) in _HUES.items() if low <= degrees <= high or low <= degrees - 360), None)


def draw_colour(random: np.random.Generator) -> RGB:
    """Draw any colour; four in five have a name."""
    choice = random.random()
    if choice < 0.2:
        red, green, blue = random.integers(256, size=3).tolist()
        return red, green, blue
    if choice < 0.35:
        low, high = list(_GREYS.values())[random.integers(len(_GREYS))]
        level = round(255 * random.uniform(low, high))
        return level, level, level
    low, high = list(_HUES.values())[random.integers(len(_HUES))]
    hue, saturation, value = random.uniform(low, high) / 360 % 1, random.uniform(0.55, 1), random.uniform(0.65, 1)
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


class _Pen:
    """Draws on a transparent square of `side` pixels whose corners are (-1, -1) and (1, 1)."""

    def __init__(self, side: int) -> None:
        self._half = side / 2
        self.image = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self.image)

    def _place(self, points: Sequence[Point]) -> list[Point]:
        return [((x + 1) * self._half, (y + 1) * self._half) for x, y in points]

    def polygon(self, points: Sequence[Point], colour: RGB) -> None:
        self._draw.polygon(self._place(points), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def ellipse(self, x: float, y: float, across: float, down: float, colour: RGB | None) -> None:
        """Fill an ellipse of these radii; None makes a hole."""
        # Pillow counts an ellipse's corners from the middle of pixels, a polygon's from their edges.
        corners = self._place([(x - across, y - down), (x + across, y + down)])
        self._draw.ellipse(
            [(right - 0.5, bottom - 0.5) for right, bottom in corners], fill=(0, 0, 0, 0) if colour is None else colour
        )

    def line(self, points: Sequence[Point], width: float, colour: RGB) -> None:
        """Draw a line with round ends."""
        self._draw.line(self._place(points), fill=colour, width=max(1, round(width * self._half)), joint="curve")
        for x, y in (points[0], points[-1]):
            self.ellipse(x, y, width / 2, width / 2, colour)

    def letter(self, letter: str, colour: RGB) -> None:
        font = ImageFont.load_default(2.2 * self._half)
        self._draw.text((self._half, self._half), letter, fill=colour, font=font, anchor="mm", stroke_width=1)


Colours: TypeAlias = tuple[RGB, RGB, RGB]
Drawing: TypeAlias = Callable[[_Pen, Colours, np.random.Generator], None]


def _around(radii: Sequence[float], turn: float = 0.0) -> list[Point]:
    """Return corners at these distances from the middle, by equal angles, the first one straight up."""
    angles = [2 * math.pi * i / len(radii) + turn for i in range(len(radii))]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles)]


def _circle(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.ellipse(0, 0, 1, 1, colours[0])


def _square(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.box(-0.85, -0.85, 0.85, 0.85, colours[0])


def _triangle(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.polygon(_around([1, 1, 1]), colours[0])


def _ring(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.ellipse(0, 0, 1, 1, colours[0])
    pen.ellipse(0, 0, 0.5, 0.5, None)


def _cross(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.box(-1, -0.3, 1, 0.3, colours[0])
    pen.box(-0.3, -1, 0.3, 1, colours[0])


def _star(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.polygon(_around([1, 0.42] * 5), colours[0])


def _heart(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    for side in (-0.48, 0.48):
        pen.ellipse(side, -0.4, 0.5, 0.5, colours[0])
    pen.polygon([(-0.9, -0.13), (0, -0.5), (0.9, -0.13), (0, 0.95)], colours[0])


def _diamond(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    pen.polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)], colours[0])


def _house(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    wall, roof, opening = colours
    pen.box(-0.75, -0.15, 0.75, 1, wall)
    pen.polygon([(-1, -0.15), (0, -1), (1, -0.15)], roof)
    door = random.uniform(-0.5, 0.1)
    pen.box(door, 0.35, door + 0.4, 1, opening)
    window = door + 0.55 if door < -0.1 else door - 0.45
    pen.box(window, 0.15, window + 0.3, 0.5, opening)


def _face(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    skin, eyes, mouth = colours
    pen.ellipse(0, 0, random.uniform(0.8, 1), 1, skin)
    for side in (-0.35, 0.35):
        pen.ellipse(side, -0.25, 0.15, 0.18, eyes)
    bend = random.uniform(-0.15, 0.25)
    pen.line([(-0.45, 0.4), (-0.2, 0.4 + bend), (0.2, 0.4 + bend), (0.45, 0.4)], 0.16, mouth)


def _letter(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    pen.letter(_ALPHABET[random.integers(len(_ALPHABET))], colours[0])


def _car(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    body, glass, wheel = colours
    pen.polygon([(-0.55, -0.1), (-0.35, -0.6), (0.35, -0.6), (0.6, -0.1)], body)
    pen.polygon([(-0.35, -0.12), (-0.23, -0.45), (0.23, -0.45), (0.4, -0.12)], glass)
    pen.box(-1, -0.1, 1, 0.4, body)
    for side in (-0.5, 0.5):
        pen.ellipse(side, 0.4, 0.26, 0.26, wheel)


def _fish(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    body, tail, eye = colours
    side = 1 if random.random() < 0.5 else -1
    pen.polygon([(-0.35 * side, 0), (-1 * side, -0.55), (-1 * side, 0.55)], tail)
    pen.ellipse(0.2 * side, 0, 0.78, 0.5, body)
    pen.ellipse(0.55 * side, -0.12, 0.12, 0.12, eye)


def _flower(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    petal, middle, stem = colours
    pen.line([(0, -0.3), (0, 0.92)], 0.16, stem)
    for x, y in _around([0.4] * int(random.integers(5, 8))):
        pen.ellipse(x, y - 0.35, 0.26, 0.26, petal)
    pen.ellipse(0, -0.35, 0.25, 0.25, middle)


def _tree(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    leaves, trunk, _fruit = colours
    pen.box(-0.16, 0.2, 0.16, 1, trunk)
    for x, y in ((-0.4, 0), (0.4, 0), (0, -0.45)):
        pen.ellipse(x, y, 0.5, 0.5, leaves)


def _boat(pen: _Pen, colours: Colours, _: np.random.Generator) -> None:
    hull, sail, mast = colours
    pen.box(-0.06, -1, 0.06, 0.4, mast)
    pen.polygon([(0.12, -0.95), (0.85, 0.25), (0.12, 0.25)], sail)
    pen.polygon([(-1, 0.35), (1, 0.35), (0.6, 0.9), (-0.6, 0.9)], hull)


def _doodle(pen: _Pen, colours: Colours, random: np.random.Generator) -> None:
    """Anything: blobs, bars and lines on one another."""
    radii = random.uniform(0.45, 0.95, random.integers(4, 9))
    pen.polygon(_around(radii.tolist(), random.uniform(0, 1)), colours[0])
    for colour in colours[1:]:
        x, y, across, down = (*random.uniform(-0.5, 0.5, 2), *random.uniform(0.12, 0.45, 2))
        choice = random.integers(3)
        if choice == 0:
            pen.ellipse(x, y, across, down, colour)
        elif choice == 1:
            pen.box(x - across, y - down, x + across, y + down, colour)
        else:
            pen.line(random.uniform(-0.8, 0.8, (3, 2)).tolist(), 0.16, colour)


SHAPES: dict[str, Drawing] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}
DRAWINGS: dict[str, Drawing] = {
    "house": _house,
    "face": _face,
    "letter": _letter,
    "car": _car,
    "fish": _fish,
    "flower": _flower,
    "doodle": _doodle,
}
# Kept from training, to see whether a model moves what it never saw.
UNSEEN: dict[str, Drawing] = {"heart": _heart, "diamond": _diamond, "tree": _tree, "boat": _boat}
KINDS = SHAPES | DRAWINGS | UNSEEN


@dataclass(frozen=True)
class Thing:
    """Something to be seen.

    Attributes:
        kind: one of `KINDS`.
        colours: the first one is what people would call it by.
        radius: half its side, as a fraction of the frame's shorter side.
        shade: how much darker its lower half is than its upper one, 0 (flat) to 0.5.
        seed: of the details.
    """

    kind: str
    colours: Colours
    radius: float
    shade: float = 0.0
    seed: int = 0


class Sprite:
    """A thing, ready to be put into frames whose shorter side has `side` pixels."""

    def __init__(self, thing: Thing, side: int) -> None:
        self.radius = thing.radius * side
        pen = _Pen(max(2, round(2 * self.radius * _FINER)))
        KINDS[thing.kind](pen, thing.colours, np.random.default_rng(thing.seed))
        drawn = np.asarray(pen.image, dtype=np.float32)
        covered = drawn[..., 3:] / 255
        light = 1 + thing.shade * np.linspace(0.5, -0.5, len(drawn), dtype=np.float32)[:, None, None]
        self._drawn = np.concatenate((np.minimum(drawn[..., :3] * light, 255) * covered, covered), axis=-1)  # (S, S, 4)

    def patch(self, centre: Point, height: int, width: int) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
        """Return which pixels it touches at a place, and of them colour times coverage, and coverage: (h, w, 4)."""
        rows, weight_down = self._shares(centre[1], height)
        columns, weight_across = self._shares(centre[0], width)
        lines = np.tensordot(weight_down, self._drawn, (1, 0))  # (h, S, 4)
        return (rows, columns), np.einsum("ws,hsc->hwc", weight_across, lines, optimize=True)

    def _shares(self, centre: float, length: int) -> tuple[slice, NDArray[np.float32]]:
        """Return which pixels of a line it reaches, and the share of each that each of its own fills: (n, S)."""
        start, fine = centre - self.radius, 2 * self.radius / len(self._drawn)
        touched = slice(max(0, math.floor(start)), max(0, min(length, math.ceil(centre + self.radius))))
        left = np.arange(touched.start, touched.stop)[:, None]
        edges = start + fine * np.arange(len(self._drawn) + 1)
        inside = np.minimum(left + 1, edges[1:]) - np.maximum(left, edges[:-1])
        return touched, np.maximum(inside, 0).astype(np.float32)

    def put(self, frame: NDArray[np.float32], centre: Point) -> None:
        """Draw it into a frame (H, W, 3)."""
        where, patch = self.patch(centre, *frame.shape[:2])
        frame[where] += patch[..., :3] - patch[..., 3:] * frame[where]


@dataclass(frozen=True)
class Background:
    """What is behind everything.

    Attributes:
        kind: one of `BACKGROUNDS`.
        colours: two, of which a plain one shows the first.
        period: of stripes or texture, as a fraction of the frame's shorter side.
        angle: of stripes or of the way from one colour to the other, in radians.
        seed: of the texture.
    """

    kind: str
    colours: tuple[RGB, RGB]
    period: float = 0.2
    angle: float = 0.0
    seed: int = 0


BACKGROUNDS = ("plain", "graded", "striped", "textured", "checked", "dotted", "landscape")
UNSEEN_BACKGROUNDS = BACKGROUNDS[-2:]  # kept from training, like the things above


def paint(background: Background, height: int, width: int) -> NDArray[np.float32]:
    """Return the background: (H, W, 3), 0 to 255."""
    first, second = (np.asarray(colour, dtype=np.float32) for colour in background.colours)
    mixture = _mixture(background, height, width)[..., None].astype(np.float32)
    return first + mixture * (second - first)


def _mixture(background: Background, height: int, width: int) -> NDArray[np.float64]:
    """Return how much of the second colour there is: (H, W), 0 to 1."""
    side = min(height, width)
    right = (np.arange(width) + 0.5) / side
    down = (np.arange(height)[:, None] + 0.5) / side
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along = right * cos + down * sin
    soft = background.period * side / (2 * math.pi)  # so steep that an edge is one pixel wide

    def wave(place: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.sin(2 * math.pi * place / background.period))

    if background.kind == "plain":
        return np.zeros((height, width))
    if background.kind == "graded":
        return np.asarray((along - along.min()) / np.ptp(along))
    if background.kind == "striped":
        return np.clip(0.5 + soft * wave(along), 0, 1)
    if background.kind == "checked":
        return np.clip(0.5 + soft * wave(right) * wave(down), 0, 1)
    if background.kind == "dotted":
        return np.clip(0.5 + soft * (wave(right) * wave(down) - 0.6), 0, 1)
    if background.kind == "landscape":
        return _hills(background, height, width)
    return _clouds(background, height, width)


def _hills(background: Background, height: int, width: int) -> NDArray[np.float64]:
    """Return a bright sky above three rows of hills, each nearer, darker and rougher than the one behind it."""
    random = np.random.default_rng(background.seed)
    down = (np.arange(height)[:, None] + 0.5) / height
    seen = np.broadcast_to(0.25 * down, (height, width)).copy()
    rough = _clouds(background, height, width) - 0.5
    across = np.arange(width) / width
    for row in range(3):
        waves = sum(
            random.uniform(-0.08, 0.08) / (i + 1) * np.sin(2 * math.pi * ((i + 1) * across + random.random()))
            for i in range(4)
        )
        inside = np.clip((down - (0.4 + 0.18 * row + waves)) * height, 0, 1)
        seen += inside * (0.45 + 0.2 * row + 0.15 * (row + 1) * rough - seen)
    return np.clip(seen, 0, 1)


def _clouds(background: Background, height: int, width: int) -> NDArray[np.float64]:
    """Return noise that is strong where it is coarse and weak where it is fine, as in photographs."""
    random = np.random.default_rng(background.seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) * min(height, width)
    strength = 1 / np.maximum(1 / background.period, frequency) ** 1.5
    noise = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) * strength, (height, width))
    return np.asarray((noise - noise.min()) / np.ptp(noise))
