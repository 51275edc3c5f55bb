"""What a video file says about itself."""

import os
from typing import NamedTuple

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
    """Read a video's header and its first frame; frames are counted only where the header does not say how many.

    The frame tells what headers do not: whether anything can be decoded, and how the picture is turned.

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
            stream.codec_context.thread_count = 1  # worker processes provide the parallelism
            frame = next(container.decode(stream), None)
            if frame is None:
                raise DecodeError(name, "holds no frame")
            height, width = frame.height, frame.width
            if frame.rotation % 180:
                height, width = width, height
            # Where a file has an index (mp4), that tells whether its end was cut off.
            if any(entry.pos + entry.size > container.size for entry in stream.index_entries):
                raise DecodeError(name, "is cut short")
            num_frames = stream.frames
            if not num_frames:
                container.seek(0, stream=stream)
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
            return VideoInfo(height, width, float(rate), num_frames)
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(name, error.strerror or str(error)) from error
