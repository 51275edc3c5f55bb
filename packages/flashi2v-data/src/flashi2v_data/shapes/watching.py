"""What happens in a video that should show a story: where things go, what they look like then, what else changes.

Made for generated videos. T frames, H W height and width in pixels; places are (right, down) in pixels from the upper
left corner; changes are in levels of 255.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashi2v_data.shapes.pictures import KINDS, SHAPES, Sprite, Thing
from flashi2v_data.shapes.stories import PACES, Stage, Story, name_direction

# Pixels around a thing, for its soft edge and some blur, that do not count as background.
_MARGIN = 3
_SAME_COLOUR = 45.0  # distance of colours that nobody would call different
_STAYS = 2.0  # pixels
_OUTLINES = (*SHAPES, "heart", "diamond")


@dataclass(frozen=True)
class Verdict:
    """What was seen in a video.

    Attributes:
        direction: of the mover, or "still".
        pace: "slowly", "quickly", or "" for neither.
        way_error: distance between the mover's way and that of the story.
        background_jump: mean change of the background from frame 0 to frame 1.
        background_change: the largest of all frames' mean change of the background from the true one.
        colour_kept: the mover has its colour in the last frame.
        shape_kept: no other kind of thing explains the last frame better.
        stay: all that should stay where it is does, and looks as it did.
    """

    direction: str
    pace: str
    way_error: float
    background_jump: float
    background_change: float
    colour_kept: bool
    shape_kept: bool
    stay: bool


def watch(frames: NDArray[np.uint8], story: Story) -> Verdict:
    """Judge a video: (T, H, W, 3), RGB. Of several movers, the first one is followed."""
    num_frames, height, width, _ = frames.shape
    stage, side = Stage(story, height, width), min(height, width)
    mover = story.movers[0]
    moments = np.linspace(0, 1, num_frames)
    others = np.stack([stage.without({mover}, moment) for moment in moments])  # (T, H, W, 3)
    path = follow(frames, others, stage.sprites[mover])
    way = fit_way(path) / side
    behind = np.ones((num_frames, height, width), bool)
    for number, sprite in enumerate(stage.sprites):
        for i, moment in enumerate(moments):
            behind[i] &= ~_near(stage.centre(number, moment), sprite.radius, height, width)
    for i, place in enumerate(path):
        behind[i] &= ~_near(place, stage.sprites[mover].radius, height, width)
    change = np.abs(frames - stage.scenery).mean(-1)  # (T, H, W)
    step = np.abs(frames[1].astype(np.float32) - frames[0]).mean(-1)
    thing, centre = story.things[mover], (float(path[-1, 0]), float(path[-1, 1]))
    length = float(np.linalg.norm(way))
    paces = [name for name, (low, high) in PACES.items() if 0.8 * low <= length <= 1.2 * high]
    return Verdict(
        direction=name_direction((float(way[0]), float(way[1]))),
        pace=paces[0] if paces else "",
        way_error=float(np.linalg.norm(way - np.asarray(story.way)) * side),
        background_jump=_mean(step, behind[0] & behind[1]),
        background_change=max(_mean(change[i], behind[i]) for i in range(num_frames)),
        colour_kept=_colour_kept(frames[-1], stage, stage.sprites[mover], centre),
        shape_kept=_shape_kept(frames[-1], stage, thing, centre),
        stay=all(
            _stays(frames[-1:], stage, number) for number in range(len(story.things)) if number not in story.movers
        ),
    )


def _mean(values: NDArray[np.float32], where: NDArray[np.bool_]) -> float:
    return float(values[where].mean()) if where.any() else 0.0


def _near(
    centre: tuple[float, float] | NDArray[np.float64], radius: float, height: int, width: int
) -> NDArray[np.bool_]:
    right, down = np.arange(width) + 0.5 - centre[0], np.arange(height)[:, None] + 0.5 - centre[1]
    return np.asarray((np.abs(right) <= radius + _MARGIN) & (np.abs(down) <= radius + _MARGIN))


def follow(frames: NDArray[np.uint8], scenery: NDArray[np.float32], sprite: Sprite) -> NDArray[np.float64]:
    """Return where a thing is in every frame: (T, 2).

    It is put where that explains the pixels best in the least-squares sense, before the scenery (T, H, W, 3). Nothing
    is assumed about its way: what jumps is found where it jumps to.
    """
    height, width = scenery.shape[1:3]
    reach = math.ceil(sprite.radius) + 1
    template = np.zeros((2 * reach + 1, 2 * reach + 1, 4), np.float32)
    where, patch = sprite.patch((reach + 0.5, reach + 0.5), *template.shape[:2])
    template[where] = patch
    drawn, covered = torch.from_numpy(template).split((3, 1), dim=-1)  # colour times coverage, and coverage
    behind = torch.from_numpy(scenery)
    seen = torch.from_numpy(frames).float() - behind  # (T, H, W, 3)

    # With the thing there, a pixel differs from the scenery by drawn - covered * behind. What this explains of the
    # squared difference that is seen: 2 seen (drawn - covered behind) - (drawn - covered behind)^2.
    explained = 2 * (_correlate(seen, drawn) - _correlate((seen * behind).sum(-1, keepdim=True), covered))
    size = _correlate(torch.ones(1, height, width, 1), drawn.square().sum(-1, keepdim=True))
    size = size - 2 * _correlate(behind, drawn * covered)
    size = size + _correlate(behind.square().sum(-1, keepdim=True), covered.square())
    return np.stack([_peak(gain) for gain in (explained - size).double().numpy()]) + 0.5


def _peak(gain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (right, down) of the largest value, between pixels by a parabola through it and its neighbours."""
    down, right = np.unravel_index(int(gain.argmax()), gain.shape)

    def vertex(line: NDArray[np.float64], at: int) -> float:
        if not 0 < at < len(line) - 1:
            return float(at)
        before, here, after = line[at - 1 : at + 2]
        curve = before - 2 * here + after
        return float(at + (0.5 * (before - after) / curve if curve else 0.0))

    return np.asarray([vertex(gain[down], int(right)), vertex(gain[:, right], int(down))])


def _correlate(images: Tensor, template: Tensor) -> Tensor:
    """Sum over channels of images (T, H, W, C) times a template (h, w, C) with its middle at every pixel: (T, H, W)."""
    height, width = images.shape[1:3]
    size = (height + template.shape[0], width + template.shape[1])
    product = torch.fft.rfft2(images, size, dim=(1, 2)) * torch.fft.rfft2(template, size, dim=(0, 1)).conj()
    found = torch.fft.irfft2(product.sum(-1), size, dim=(1, 2))  # by the template's upper left corner
    return found.roll((template.shape[0] // 2, template.shape[1] // 2), dims=(1, 2))[:, :height, :width]


def fit_way(path: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (right, down) from the first frame to the last, of the straight line that fits a path (T, 2) best."""
    time = np.arange(len(path)) - (len(path) - 1) / 2
    return np.asarray((time @ path) / max(1.0, float(time @ time)) * (len(path) - 1))


def _colour_kept(frame: NDArray[np.uint8], stage: Stage, sprite: Sprite, centre: tuple[float, float]) -> bool:
    """Compare the mean of all that is surely the thing with what it should be."""
    where, patch = sprite.patch(centre, *frame.shape[:2])
    inside = patch[..., 3] > 0.95
    if not inside.any():  # thinner than a pixel everywhere
        inside = patch[..., 3] >= patch[..., 3].max() * 0.8
    true = patch[..., :3] + (1 - patch[..., 3:]) * stage.scenery[where]
    return bool(np.linalg.norm((frame[where] - true)[inside].mean(0)) <= _SAME_COLOUR)


def _shape_kept(frame: NDArray[np.uint8], stage: Stage, thing: Thing, centre: tuple[float, float]) -> bool:
    """Draw every kind of thing there; the right one must be nearest to the pixels."""
    others = _OUTLINES if thing.kind in _OUTLINES else tuple(KINDS)
    side = min(frame.shape[:2])
    where = _near(centre, thing.radius * side, *frame.shape[:2])
    errors: dict[str, float] = {}
    for kind in others:
        sprite = Sprite(dataclasses.replace(thing, kind=kind), side)
        for right in (-1, 0, 1):
            for down in (-1, 0, 1):
                drawn = stage.scenery.copy()
                sprite.put(drawn, (centre[0] + right, centre[1] + down))
                error = float(np.square(frame - drawn)[where].sum())
                errors[kind] = min(error, errors.get(kind, math.inf))
    return min(errors, key=lambda kind: errors[kind]) == thing.kind


def _stays(last: NDArray[np.uint8], stage: Stage, number: int) -> bool:
    """Whether a thing that should stay is where it was, and as it was, in the last frame (1, H, W, 3)."""
    true = stage.centre(number, 1.0)
    (place,) = follow(last, stage.without({number}, 1.0)[None], stage.sprites[number])
    is_there = np.linalg.norm(place - np.asarray(true)) <= _STAYS
    return bool(is_there and _colour_kept(last[0], stage, stage.sprites[number], true))
