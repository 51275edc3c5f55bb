"""What a video file says about itself."""

import os
from typing import Any, NamedTuple

from flashi2v_data import pyav
from flashi2v_data.errors import DecodeError


class VideoInfo(NamedTuple):
    """Size in pixels as displayed, frames per second, number of frames."""

    height: int
    width: int
    fps: float
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.fps:.6g} fps, {self.num_frames} frames"


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's header and its first frame; files other than mp4 are read through to count their frames.

    The frame tells what headers do not: whether anything can be decoded, and how the picture is turned.

    Raises:
        DecodeError: the file is missing, no video, or damaged.
    """
    import av

    name = os.fspath(path)
    pyav.check_file(name)
    try:
        container, stream = pyav.open_video(name)
        with container:
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise DecodeError(name, "does not say its frames per second")
            frame = next(container.decode(stream), None)
            if frame is None:
                raise DecodeError(name, "holds no frame")
            height, width = frame.height, frame.width
            if frame.rotation % 180:
                height, width = width, height
            return VideoInfo(height, width, float(rate), _num_frames(name, container, stream))
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(name, error.strerror or str(error)) from error


def _num_frames(path: str, container: Any, stream: Any) -> int:
    """Count as `read_frames` does: without the frames that an edit list leaves out."""
    index = pyav.full_index(container, stream)
    if index is not None:
        if any(entry.pos + entry.size > container.size for entry in index):
            raise DecodeError(path, "is cut short")
        return sum(not entry.is_discard for entry in index)
    # Headers of other files say nothing, or what cannot be trusted, and some cannot go back to their beginning.
    container, stream = pyav.open_video(path)
    with container:
        return sum(packet.size > 0 and not packet.is_discard for packet in container.demux(stream))
