"""Which frames of a clip there are at the training rate."""

import numpy as np
from numpy.typing import NDArray

# Rates closer than this (29.97 and 30, 15.95 and 16) count as equal.
FPS_TOLERANCE = 0.1


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
