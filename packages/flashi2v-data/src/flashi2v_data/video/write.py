"""Writing video files."""

import os
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.atomic import atomic_file
from flashi2v_data.errors import InputError

SUFFIXES = (".mp4", ".mov", ".mkv")


def file_url(path: str | os.PathLike[str]) -> str:
    """Return the name of a file for FFmpeg, which reads other names with colons as addresses: `12:30.mp4`, `concat:a`.

    Raises:
        OSError: the path is relative, and the working directory is gone.
    """
    # Not `abspath`, which would follow `..` by the letters rather than through links.
    return "file:" + os.path.join(os.getcwd(), path) if not os.path.isabs(path) else f"file:{os.fspath(path)}"


def write_video(
    path: str | os.PathLike[str],
    frames: NDArray[np.uint8],
    fps: float,
    metadata: Mapping[str, str] | None = None,
    *,
    crf: int = 12,
) -> None:
    """Write frames as H.264 (yuv420p, plays everywhere); the file appears under `path` only when whole.

    The same frames give the same file on one machine with one version of PyAV.

    Args:
        path: ends in .mp4, .mov or .mkv.
        frames: (T, H, W, 3), uint8 RGB; H and W even, as yuv420p halves the colour planes.
        fps: frames per second.
        metadata: tags of the container, read back by players and by `ffprobe`.
        crf: x264's quality, 0 lossless to 51; 12 keeps flat colours within a few levels.

    Raises:
        InputError: shape, dtype, fps or file suffix is not as above.
    """
    import av

    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise InputError(f"{path}: frames must be uint8 (T, H, W, 3), got {frames.dtype} {frames.shape}")
    num_frames, height, width, _ = frames.shape
    if num_frames == 0 or height % 2 or width % 2 or height == 0 or width == 0:
        raise InputError(f"{path}: needs at least one frame of even height and width, got {frames.shape}")
    if fps <= 0:
        raise InputError(f"{path}: fps must be positive, got {fps}")
    if not str(path).endswith(SUFFIXES):
        raise InputError(f"{path}: the name of a video must end in one of {', '.join(SUFFIXES)}")

    # use_metadata_tags lets mp4 keep tags other than its few standard ones.
    container_options = {"movflags": "use_metadata_tags+faststart"}
    with (
        atomic_file(path) as temporary,
        av.open(file_url(temporary), "w", container_options=container_options) as container,
    ):
        container.metadata.update(metadata or {})
        # The denominator 1001 is that of the NTSC rates (30000/1001).
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # On a busy machine the vector code of x264's macroblock tree gave other bits for the same frames now and then.
        stream.options = {"crf": str(crf), "mbtree": "0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
