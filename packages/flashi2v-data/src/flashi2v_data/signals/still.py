"""What is wrong with a clip at first sight: it stands still, is black, has bars at its sides, or repeats itself.

T frames, H W height and width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.signals.clip import Clip, Frames
from flashi2v_data.signals.cuts import TINY
from flashi2v_data.signals.motion import SMALL
from flashi2v_data.signals.protocol import Column
from flashi2v_data.video.measures import stillness

# Levels of 255 up to which a pixel is black: a tenth, as FFmpeg's blackdetect has it.
_BLACK = 25
_WHOLLY = 0.98  # of a black frame, or of a row in a bar
# Where the picture begins behind a bar, so much of its edge is not black; a bright thing in the dark has no such edge.
_EDGE = 0.5
_SOFT = 4  # rows that an edge takes, where it was coded
# Squared levels by which frames differ that show the same, and by which they do not.
_SAME, _OTHER = 1.0, 8.0
_LEAST_PERIOD = 4  # frames


def black_share(frames: NDArray[np.uint8]) -> float:
    """Return the share of frames (T, H, W, 3) that are black."""
    return float(((frames.max(3) <= _BLACK).mean((1, 2)) >= _WHOLLY).mean())


def bar_share(frames: NDArray[np.uint8]) -> float:
    """Return the share of the picture that black bars take, at top and bottom or left and right, in (T, H, W, 3)."""
    is_dark = frames.max(3).mean(0) <= _BLACK  # (H, W)
    top, bottom = _bars(is_dark)
    left, right = _bars(is_dark[top : len(is_dark) - bottom].T)
    height, width = is_dark.shape
    return 1.0 - (height - top - bottom) * (width - left - right) / (height * width)


def _bars(is_dark: NDArray[np.bool_]) -> tuple[int, int]:
    """Return how many rows bars take at the beginning and the end; none where the picture has no straight edge."""
    darkness = is_dark.mean(1)
    is_bar = darkness >= _WHOLLY
    if is_bar.all() or not (is_bar[0] and is_bar[-1]):
        return 0, 0
    first, last = int(np.argmin(is_bar)), int(np.argmin(is_bar[::-1]))
    edges = darkness[first : first + _SOFT], darkness[::-1][last : last + _SOFT]
    return (first, last) if all(1 - edge.min() >= _EDGE for edge in edges) else (0, 0)


def num_loops(frames: NDArray[np.uint8]) -> float:
    """Return how often the shortest part is shown that a clip repeats; 1 where it repeats none twice.

    Args:
        frames: (T, 27, 48, 3), all of the clip.
    """
    num_frames = len(frames)
    if num_frames < 2 * _LEAST_PERIOD:
        return 1.0
    values = frames.reshape(num_frames, 9, 3, 16, 3, 3).mean((2, 4), dtype=np.float32).reshape(num_frames, -1)
    values -= values.mean(0)
    # The mean squared difference of frames that lie p apart, for every p, by the correlation theorem.
    spectrum = np.fft.rfft(values, 2 * num_frames, axis=0)
    products = np.fft.irfft((spectrum * spectrum.conj()).real.sum(1))[:num_frames]
    energy = np.concatenate([[0.0], np.cumsum(np.square(values, dtype=np.float64).sum(1))])
    lags = np.arange(num_frames)
    both = energy[num_frames - lags] + energy[-1] - energy[lags]
    difference = (both - 2 * products) / ((num_frames - lags) * values.shape[1])
    farthest = np.maximum.accumulate(difference)
    repeats = (difference <= _SAME + 0.02 * farthest) & (farthest >= _OTHER) & (lags >= _LEAST_PERIOD)
    periods = lags[repeats & (2 * lags <= num_frames)]
    return num_frames / int(periods[0]) if len(periods) else 1.0


class Still:
    """The signal `still`; NumPy alone."""

    name = "still"
    version = "1"
    licence = "Apache-2.0"
    columns: Mapping[str, Column] = {"stillness": float, "black_share": float, "bar_share": float, "num_loops": float}
    frames: Sequence[Frames] = (SMALL, TINY)

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Look at a clip."""
        small = clip.frames(SMALL)
        found = {
            "stillness": stillness(small),
            "black_share": black_share(small),
            "bar_share": bar_share(small),
            "num_loops": num_loops(clip.frames(TINY)),
        }
        return {name: round(value, 4) for name, value in found.items()}
