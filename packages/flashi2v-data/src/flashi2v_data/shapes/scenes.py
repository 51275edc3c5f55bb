"""The moving-shapes set: small synthetic videos whose captions say exactly what happens in them."""

import math
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flashi2v_data.errors import InputError
from flashi2v_data.randomness import generator
from flashi2v_data.shapes.writing import Clip, write_set

T = TypeVar("T")
Pairs: TypeAlias = Literal["all", "seen", "unseen"]

SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS = {
    "red": (215, 35, 40),
    "green": (40, 175, 65),
    "blue": (45, 95, 235),
    "yellow": (245, 220, 45),
    "orange": (245, 135, 25),
    "purple": (145, 55, 190),
    "cyan": (55, 210, 225),
    "pink": (250, 140, 195),
}
BACKGROUNDS = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "grey": (120, 120, 120),
    "dark blue": (20, 28, 85),
    "dark green": (12, 65, 40),
    "brown": (95, 62, 35),
}
# Radius as a fraction of the frame's shorter side.
RADII = {"small": 0.1, "medium": 0.15, "large": 0.2}
# Way covered in a clip of about a second, as a fraction of the frame's shorter side.
DISTANCES = {"slowly": 0.2, "quickly": 0.45}
# Unit vectors (right, down), as pixels are counted.
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "upper right": (_DIAGONAL, -_DIAGONAL),
    "upper left": (-_DIAGONAL, -_DIAGONAL),
    "lower right": (_DIAGONAL, _DIAGONAL),
    "lower left": (-_DIAGONAL, _DIAGONAL),
    "still": (0.0, 0.0),
}


@dataclass(frozen=True)
class Scene:
    """One shape that moves in a straight line, or stands still, before a flat background.

    `speed` is in fractions of the frame's shorter side per second; `start` (right, down) runs from 0 to 1 within
    the room that keeps the whole path inside the frame.
    """

    shape: str
    colour: str
    size: str
    background: str
    direction: str
    pace: str
    speed: float
    start: tuple[float, float]

    @property
    def caption(self) -> str:
        """Describe the scene, for example "a small red circle moves slowly to the left on a black background"."""
        thing, place = f"a {self.size} {self.colour} {self.shape}", f"on a {self.background} background"
        if self.direction == "still":
            return f"{thing} stands still {place}"
        where = self.direction if self.direction in ("up", "down") else f"to the {self.direction}"
        return f"{thing} moves {self.pace} {where} {place}"


def sample_scene(seed: int, index: int, *, seconds: float = 1.0, pairs: Pairs = "all") -> Scene:
    """Draw scene number `index` of the set named by `seed`.

    In clips of more than a second the shapes move slower, so that "quickly" crosses the same part of the frame.

    Args:
        seed: of the set.
        index: of the scene.
        seconds: length of the clip.
        pairs: of shape and colour: "seen" leaves out one colour of every shape, so that a model can be trained on the
            others and tried on those, "unseen".
    """
    random = generator(seed, "scene", 0, index)
    shape = _choice(SHAPES, random)
    colour = _choice(_colours(shape, pairs), random)
    size = _choice(tuple(RADII), random)
    # No blue shape on dark blue: the caption's words should tell the two apart.
    background = _choice(tuple(name for name in BACKGROUNDS if colour not in name), random)
    direction = _choice(tuple(DIRECTIONS), random)
    pace = _choice(tuple(DISTANCES), random)
    across, down = torch.rand(2, generator=random).tolist()
    speed = 0.0 if direction == "still" else DISTANCES[pace] / max(1.0, seconds)
    return Scene(shape, colour, size, background, direction, pace, speed, (across, down))


def _colours(shape: str, pairs: Pairs) -> tuple[str, ...]:
    colours = tuple(COLOURS)
    left_out = colours[(SHAPES.index(shape) + 2) % len(colours)]
    return {"all": colours, "seen": tuple(name for name in colours if name != left_out), "unseen": (left_out,)}[pairs]


def _choice(options: tuple[T, ...], random: torch.Generator) -> T:
    return options[int(torch.randint(len(options), (), generator=random))]


def radius(scene: Scene, height: int, width: int) -> float:
    """Return the shape's outer radius in pixels."""
    return RADII[scene.size] * min(height, width)


def velocity(scene: Scene, height: int, width: int, fps: float) -> tuple[float, float]:
    """Return (right, down) in pixels per frame."""
    step = scene.speed * min(height, width) / fps
    right, down = DIRECTIONS[scene.direction]
    return step * right, step * down


def centres(scene: Scene, num_frames: int, height: int, width: int, fps: float) -> NDArray[np.float64]:
    """Return the shape's centre in every frame: (T, 2), (right, down) in pixels from the upper left corner.

    Raises:
        InputError: the path is longer than the frame has room for.
    """
    path = np.asarray(velocity(scene, height, width, fps)) * (num_frames - 1)
    margin = radius(scene, height, width) + 1.0  # one pixel for the soft edge
    lowest = margin + np.maximum(0.0, -path)
    highest = np.asarray([width, height]) - margin - np.maximum(0.0, path)
    if (lowest > highest).any():
        raise InputError(
            f"a {scene.size} shape at speed {scene.speed:.2f} leaves a {height}x{width} frame within {num_frames} "
            f"frames at {fps} fps: use fewer frames, or draw the scene for {num_frames / fps:.1f} seconds"
        )
    first = lowest + np.asarray(scene.start) * (highest - lowest)
    return first + np.linspace(0.0, 1.0, num_frames)[:, None] * path  # (T, 2)


def render(scene: Scene, num_frames: int, height: int, width: int, fps: float) -> NDArray[np.uint8]:
    """Draw the scene with soft (antialiased) edges: (T, H, W, 3), uint8 RGB.

    Raises:
        InputError: the path is longer than the frame has room for.
    """
    background = np.asarray(BACKGROUNDS[scene.background], dtype=np.float64)
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float64)
    size = radius(scene, height, width)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for frame, (x, y) in zip(frames, centres(scene, num_frames, height, width, fps)):
        covered = coverage(scene.shape, size, (x, y), height, width)[..., None]
        frame[...] = np.rint(background + covered * (colour - background))
    return frames


def coverage(shape: str, size: float, centre: tuple[float, float], height: int, width: int) -> NDArray[np.float64]:
    """Return how much of every pixel a shape of outer radius `size` covers: (H, W), 0 to 1, soft at the edge.

    Raises:
        InputError: there is no such shape.
    """
    right = np.arange(0.5, width) - centre[0]
    down = np.arange(0.5, height)[:, None] - centre[1]
    return np.clip(0.5 - _distance(shape, right, down, size), 0.0, 1.0)


def _distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64], size: float) -> NDArray[np.float64]:
    """Signed distance in pixels to the outline of a shape of outer radius `size`, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - size
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75 * size) - 0.25 * size
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * size
    if shape == "triangle":  # the largest of the distances to its three sides
        slanted = math.sqrt(0.75) * abs(x) - 0.5 * y
        return np.maximum(slanted, y) - 0.5 * size
    if shape == "cross":
        across = np.maximum(abs(x) - size, abs(y) - 0.3 * size)
        return np.minimum(across, np.maximum(abs(x) - 0.3 * size, abs(y) - size))
    if shape == "star":
        # Fold the plane into one half of one of the five points; its edge is then a single line.
        sector = 2.0 * math.pi / 5.0
        angle = np.arctan2(x, -y)
        angle = abs(angle - sector * np.rint(angle / sector))
        along, aside = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
        valley = 0.42 * size * np.asarray([math.cos(sector / 2.0), math.sin(sector / 2.0)])
        edge = valley - np.asarray([size, 0.0])
        normal = np.asarray([edge[1], -edge[0]]) / np.hypot(*edge)
        return (along - size) * normal[0] + aside * normal[1]
    raise InputError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")


def write_shapes(
    directory: str | os.PathLike[str],
    num: int,
    seed: int,
    height: int,
    width: int,
    frames: int,
    fps: float = 16,
    pairs: Pairs = "all",
) -> None:
    """Write `num` videos of one shape each, whose captions say how it looks and moves; see `write_set`.

    Raises:
        InputError: the directory exists and is not empty, or cannot be made, or a number is out of range.
    """

    def make(index: int) -> Clip:
        scene = sample_scene(seed, index, seconds=frames / fps, pairs=pairs)
        right, down = velocity(scene, height, width, fps)
        truth = {
            "shape": scene.shape,
            "colour": scene.colour,
            "colour_rgb": COLOURS[scene.colour],
            "size": scene.size,
            "radius_pixels": radius(scene, height, width),
            "background": scene.background,
            "background_rgb": BACKGROUNDS[scene.background],
            "direction": scene.direction,
            "pace": "still" if scene.direction == "still" else scene.pace,
            "velocity_pixels_per_frame": {"right": right, "down": down},
            "first_centre_pixels": centres(scene, frames, height, width, fps)[0].tolist(),
        }
        return Clip(render(scene, frames, height, width, fps), scene.caption, truth)

    write_set(directory, num, height, width, frames, fps, make)
