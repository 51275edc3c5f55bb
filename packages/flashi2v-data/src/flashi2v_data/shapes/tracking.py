"""What happens in a video of moving shapes, measured: where the shape goes, and what it looks like on the way.

Made for generated videos, whose first frame and prompt say what should be there. T frames, H W height and width in
pixels; places are (right, down) in pixels from the upper left corner.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flashi2v_data.shapes.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, DISTANCES, SHAPES, Scene, coverage, radius

# Less than half the way of a slow shape counts as standing still.
_STILL = 0.5 * min(DISTANCES.values())
# Pixels around a shape, for its soft edge and some blur, that do not count as background.
_MARGIN = 3


@dataclass(frozen=True)
class Motion:
    """How a shape moves.

    Attributes:
        path: (T, 2), its centre in every frame.
        way: (right, down) in pixels from the first frame to the last, of the straight line that fits the path best.
        direction: the nearest one of `shapes.DIRECTIONS`.
        pace: the nearest one of `shapes.DISTANCES`, or "still".
    """

    path: NDArray[np.float64]
    way: tuple[float, float]
    direction: str
    pace: str


def track(frames: NDArray[np.uint8], scene: Scene) -> Motion:
    """Follow the scene's shape by template matching, and name its motion.

    In every frame the shape is put where that explains the pixels best in the least-squares sense. Nothing is assumed
    about its way: a shape that jumps is found where it jumps to.

    Args:
        frames: (T, H, W, 3), RGB.
        scene: what should be there; its motion is not looked at.
    """
    num_frames, height, width, _ = frames.shape
    contrast = _rgb(COLOURS, scene.colour) - _rgb(BACKGROUNDS, scene.background)
    # What the place decides of the squared error |p - b - m c|^2: pixels p, background b, coverage m, contrast c.
    likeness = (frames - _rgb(BACKGROUNDS, scene.background)) @ contrast  # (T, H, W)
    reach = math.ceil(radius(scene, height, width)) + 1
    side = 2 * reach + 1
    mask = torch.from_numpy(coverage(scene.shape, radius(scene, height, width), (side / 2, side / 2), side, side))
    kernel = mask.float()[None, None]
    matched = F.conv2d(torch.from_numpy(likeness).float()[:, None], kernel, padding=reach)  # (T, 1, H, W)
    inside = F.conv2d(torch.ones(1, 1, height, width), kernel.square(), padding=reach)
    gain = (2 * matched - float(contrast @ contrast) * inside)[:, 0].double().numpy()  # (T, H, W)
    path = np.stack([peak(frame) for frame in gain]) + 0.5
    time = np.arange(num_frames) - (num_frames - 1) / 2
    way = (time @ path) / max(1.0, time @ time) * (num_frames - 1)
    return Motion(path, (float(way[0]), float(way[1])), *name_motion((way[0], way[1]), min(height, width)))


def peak(gain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (right, down) of the largest value, between pixels by a parabola through it and its neighbours."""
    down, right = np.unravel_index(int(gain.argmax()), gain.shape)

    def vertex(line: NDArray[np.float64], at: int) -> float:
        if not 0 < at < len(line) - 1:
            return float(at)
        before, here, after = line[at - 1 : at + 2]
        curve = before - 2 * here + after
        return float(at + (0.5 * (before - after) / curve if curve else 0.0))

    return np.asarray([vertex(gain[down], int(right)), vertex(gain[:, right], int(down))])


def name_motion(way: tuple[float, float], side: int) -> tuple[str, str]:
    """Return direction and pace of a shape that goes `way` in a frame whose shorter side is `side`."""
    distance = math.hypot(*way) / side
    if distance < _STILL:
        return "still", "still"
    moving = {name: unit for name, unit in DIRECTIONS.items() if any(unit)}
    direction = max(moving, key=lambda name: float(np.dot(way, moving[name])))
    return direction, min(DISTANCES, key=lambda name: abs(DISTANCES[name] - distance))


def look(frame: NDArray[np.uint8], scene: Scene, centre: NDArray[np.float64]) -> tuple[str, str]:
    """Name the shape and the colour at a place: all are drawn there, and the drawing nearest to the pixels wins.

    Args:
        frame: (H, W, 3), RGB.
        scene: says size and background; neither its shape nor its colour is looked at.
        centre: where, as `track` found it, give or take a pixel.
    """
    height, width, _ = frame.shape
    background, size = _rgb(BACKGROUNDS, scene.background), radius(scene, height, width)
    near = surroundings(scene, centre, height, width)
    pixels = frame[near] - background  # (N, 3)
    contrasts = {colour: _rgb(COLOURS, colour) - background for colour in COLOURS}
    errors = {}
    for shape, right, down in itertools.product(SHAPES, (-1, 0, 1), (-1, 0, 1)):
        drawn = coverage(shape, size, (centre[0] + right, centre[1] + down), height, width)[near][:, None]
        for colour, contrast in contrasts.items():
            errors[shape, colour, right, down] = float(np.square(pixels - drawn * contrast).sum())
    shape, colour, *_ = min(errors, key=lambda drawing: errors[drawing])
    return shape, colour


def surroundings(scene: Scene, centre: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Return the pixels that the scene's shape may touch at a place: (H, W)."""
    right, down = np.arange(width) + 0.5 - centre[0], np.arange(height)[:, None] + 0.5 - centre[1]
    return np.asarray(np.hypot(right, down) <= radius(scene, height, width) + _MARGIN)


def _rgb(palette: dict[str, tuple[int, int, int]], name: str) -> NDArray[np.float64]:
    return np.asarray(palette[name], dtype=np.float64)
