"""How much moves: what the camera does, and what is left of the motion without it.

Dense optical flow between frames, by OpenCV's DIS (Kroeger et al., arXiv:1603.03590). The camera's part of it is the
affine map that most of the picture follows, found by RANSAC. Where the picture is plain, nothing is seen to move, and
flow leaks in from elsewhere: such points count as following the camera. T frames, H W height and width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.signals.clip import Clip, Frames
from flashi2v_data.signals.libraries import versions
from flashi2v_data.signals.protocol import Column

# Frames often enough that little moves farther than the flow can follow, at a size where it takes a few milliseconds.
SMALL = Frames(fps=8, most=65, size=144)
# Every so many pixels a point that the camera's map is fitted to.
_GRID = 6
# Pixels by which a point may miss the map and still follow it.
_TOLERANCE = 0.7
# Mean gradient, in levels per pixel, below which the surroundings of a point are plain.
_PLAIN, _SURROUNDINGS = 2.0, 7
# Where less of the picture is not plain, it is a thing before a plain background, and tells nothing of the camera.
_LEAST_SEEN = 0.3


def measure_motion(frames: NDArray[np.uint8], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Return how fast things and the camera move, in percent of the picture's shorter side per second.

    Both are means over all pixels and frames, so a thing that moves counts by its area.

    Args:
        frames: (T, H, W, 3), RGB.
        seconds: (T,), when they are shown.

    Returns:
        Of what moves otherwise than the camera makes the picture move; and of that.
    """
    import cv2

    height, width = frames.shape[1:3]
    if len(frames) < 2 or min(height, width) < 32:  # the flow's patches have 8 pixels, on several levels
        return 0.0, 0.0
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    rows, columns = np.mgrid[_GRID // 2 : height : _GRID, _GRID // 2 : width : _GRID]
    points = np.stack([columns.ravel(), rows.ravel()], 1).astype(np.float32)  # (N, 2)
    own = camera = 0.0
    before = cv2.cvtColor(frames[0], cv2.COLOR_RGB2GRAY)
    for frame in frames[1:]:
        after = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        moved = flow.calc(before, after, None)[rows.ravel(), columns.ravel()]  # (N, 2)
        is_seen = _texture(before)[rows.ravel(), columns.ravel()] >= _PLAIN
        by_camera = _camera(points, moved, is_seen)
        own += float((np.linalg.norm(moved - by_camera, axis=1) * is_seen).mean())
        camera += float(np.linalg.norm(by_camera, axis=1).mean())
        before = after
    scale = 100 / (min(height, width) * max(float(seconds[-1] - seconds[0]), 1e-3))
    return own * scale, camera * scale


def _texture(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean gradient around each pixel of a grey picture, (H, W)."""
    import cv2

    along, down = cv2.spatialGradient(picture)  # of Sobel's kernel, whose weights add up to 8
    steps = (np.abs(along) + np.abs(down)).astype(np.float32) / 8
    return np.asarray(cv2.blur(steps, (_SURROUNDINGS, _SURROUNDINGS)))


def _camera(points: NDArray[np.float32], moved: NDArray[np.float32], is_seen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how far the map that most points follow, of those that are seen to move or not, moves each, (N, 2)."""
    import cv2

    if is_seen.mean() < _LEAST_SEEN:
        return np.zeros_like(moved)
    begin = points[is_seen]
    end = begin + moved[is_seen]
    found, _ = cv2.estimateAffine2D(begin, end, method=cv2.RANSAC, ransacReprojThreshold=_TOLERANCE)
    if found is None:  # the points follow no map at all
        return np.zeros_like(moved)
    return np.asarray(points @ found[:, :2].T + found[:, 2] - points, np.float32)


class Motion:
    """The signal `motion`."""

    name = "motion"
    licence = "Apache-2.0"
    columns: Mapping[str, Column] = {"object_motion": float, "camera_motion": float}
    frames: Sequence[Frames] = (SMALL,)

    def __init__(self) -> None:
        self.version = f"1, {versions(self.name, cv2=('opencv-python-headless', 'opencv-python'))}"

    def __call__(self, clip: Clip) -> Mapping[str, Any]:
        """Measure the motion of a clip."""
        import cv2

        cv2.setNumThreads(1)  # processes provide the parallelism
        own, camera = measure_motion(clip.frames(SMALL), clip.seconds[clip.indices(SMALL)])
        return {"object_motion": round(own, 3), "camera_motion": round(camera, 3)}
