"""Which frames of a clip there are at the training rate."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Rates closer than this (29.97 and 30, 15.95 and 16) count as equal.
FPS_TOLERANCE = 0.1

# In frames: how far one may be shown from where even steps would have it.
_UNEVEN = 0.4
# Seconds: the steps in which containers round their times.
_TICK = 1e-3


class Moments(NamedTuple):
    """When the frames of a sample are shown, for files in which this does not follow from their numbers.

    Attributes:
        start: the clip's first frame.
        end: the frame after its last.
        seconds: from the clip's first frame on, ascending, one for each frame of the sample.
    """

    start: int
    end: int
    seconds: list[float]


def is_irregular(times: NDArray[np.float64]) -> bool:
    """Tell whether frames, shown at these times, come in uneven steps, so that an index does not measure time."""
    if len(times) < 3:
        return False
    even = np.linspace(times[0], times[-1], len(times))
    return bool(np.abs(times - even).max() > _UNEVEN * (times[-1] - times[0]) / (len(times) - 1))


def frames_at(moments: Moments, times: NDArray[np.float64]) -> list[int] | None:
    """Return the frames that are on screen at certain moments, or None where the clip is not as long.

    Moments beyond the clip's end (its frames were counted at the mean rate of the file, and its own is higher) are all
    moved to earlier ones.
    """
    clip = times[moments.start : moments.end]
    if len(clip) == 0:
        return None
    # The last frame stays for as long as the mean one.
    last = clip[-1] + (times[-1] - times[0]) / (len(times) - 1) - _TICK
    seconds = clip[0] + np.array(moments.seconds)
    seconds -= max(0.0, seconds[-1] - last)
    if seconds[0] < clip[0] - _TICK:
        return None
    places = np.searchsorted(clip, seconds + _TICK, "right") - 1
    return (moments.start + np.maximum(places, 0)).tolist()


def frame_interval(fps: float, train_fps: float | None, sample_stride: int | None) -> float:
    """Return how many frames of the video pass for one frame of the sample; exactly one of the two is given."""
    if sample_stride is not None:
        return float(sample_stride)
    assert train_fps is not None
    return 1.0 if abs(fps - train_fps) < FPS_TOLERANCE else fps / train_fps


def frame_indices(start: int, num_frames: int, interval: float) -> NDArray[np.int64]:
    """Return the frames of the clip `start ... start + num_frames - 1` at the training rate, rounded down."""
    indices = np.arange(start, start + num_frames, interval).astype(np.int64)
    return indices[indices < start + num_frames]


def check_rate(train_fps: float | None, sample_stride: int | None) -> None:
    """Refuse a configuration that gives both ways to take frames, or neither."""
    if (train_fps is None) == (sample_stride is None):
        raise ValueError("set one of train_fps and sample_stride and leave the other out")
