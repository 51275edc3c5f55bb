"""Films of either set, one scene or several behind each other, without files: to measure what looks at videos."""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.shapes.scenes import render, sample_scene
from flashi2v_data.shapes.stories import Stage, sample_story

Captions: TypeAlias = Literal["looks", "motion"]


def draw_film(
    captions: Captions, seed: int, index: int, num_frames: int, height: int, width: int, fps: float = 16
) -> NDArray[np.uint8]:
    """Draw clip number `index` of the set that `flashi2v-data shapes` writes with these captions: (T, H, W, 3)."""
    if captions == "looks":
        scene = sample_scene(seed, index, seconds=num_frames / fps)
        return render(scene, num_frames, height, width, fps)
    return Stage(sample_story(seed, index, height, width), height, width).film(num_frames)


def join_films(
    captions: Captions, seed: int, num: int, height: int, width: int, lengths: tuple[int, int] = (17, 57)
) -> tuple[NDArray[np.uint8], list[int]]:
    """Draw the first `num` clips of a set as one film.

    Args:
        captions: which set.
        seed: of the set, and of the lengths.
        num: of clips.
        height: in pixels.
        width: in pixels.
        lengths: least and most frames of a clip.

    Returns:
        (T, H, W, 3), and the first frame of each clip but the first.
    """
    drawn = np.random.default_rng(seed).integers(lengths[0], lengths[1], num, endpoint=True).tolist()
    films = [draw_film(captions, seed, index, length, height, width) for index, length in enumerate(drawn)]
    return np.concatenate(films), np.cumsum(drawn)[:-1].tolist()
