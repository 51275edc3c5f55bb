"""What can be said of any video in a number: how alike two pictures are, how much moves, how much stands still.

T frames, H W height and width.
"""

import math

import numpy as np
from numpy.typing import NDArray

_MAX_PSNR = 100.0
# A pixel that changes by no more has only been coded again.
_SAME_LEVELS = 8


def psnr(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two pictures (H, W, 3) in dB, at most 100."""
    error = float(np.square(image.astype(np.float64) - other).mean())
    return min(_MAX_PSNR, 10 * math.log10(255**2 / error)) if error else _MAX_PSNR


def motion(frames: NDArray[np.uint8]) -> float:
    """Return how much a video (T, H, W, 3) changes from frame to frame: mean over all pixels, in levels of 255."""
    if len(frames) < 2:
        return 0.0
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def stillness(frames: NDArray[np.uint8]) -> float:
    """Return the share of pixels of a video (T, H, W, 3) that stay as they are in the first frame, to the end."""
    change = np.abs(frames.astype(np.int16) - frames[:1]).max(axis=(0, 3))  # (H, W)
    return float((change <= _SAME_LEVELS).mean())
