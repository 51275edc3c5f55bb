"""What a video file says about itself."""

import os
from typing import NamedTuple

from flashi2v_data.errors import DecodeError


class VideoInfo(NamedTuple):
    """Size in pixels, frames per second, number of frames."""

    height: int
    width: int
    fps: float
    num_frames: int


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's header; frames are counted only where it does not say how many there are.

    Raises:
        DecodeError: the file is missing, no video, or damaged.
    """
    import av

    name = os.fspath(path)
    try:
        with av.open(name) as container:
            if not container.streams.video:
                raise DecodeError(name, "has no video stream")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise DecodeError(name, "does not say its frames per second")
            num_frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            return VideoInfo(stream.height, stream.width, float(rate), num_frames)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(name, error.strerror or str(error)) from error
