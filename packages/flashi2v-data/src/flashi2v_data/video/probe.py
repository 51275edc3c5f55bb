"""What a video file says about itself."""

import os
from typing import NamedTuple

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.colour import is_hdr
from flashi2v_data.video.frames import is_irregular
from flashi2v_data.video.geometry import Way, geometry_of
from flashi2v_data.video.images import FPS, is_image, read_image
from flashi2v_data.video.pyav import Video


class VideoInfo(NamedTuple):
    """Size in pixels as displayed, frames per second, number of frames.

    Attributes:
        is_irregular: whether frames come in uneven steps of time; `fps` is then their mean.
        is_hdr: whether colours are those of HDR screens (PQ or HLG).
        reference_size: height and width as the reference's decoder gives them, where they differ.
    """

    height: int
    width: int
    fps: float
    num_frames: int
    is_irregular: bool = False
    is_hdr: bool = False
    reference_size: tuple[int, int] | None = None

    def size(self, way: Way) -> tuple[int, int]:
        """Return height and width of the pictures that `read_frames` gives in this way."""
        return self.reference_size if way == "reference" and self.reference_size else (self.height, self.width)

    def __str__(self) -> str:
        notes = " of uneven length" * self.is_irregular + ", HDR" * self.is_hdr
        return f"{self.width}x{self.height}, {self.fps:.6g} fps, {self.num_frames} frames{notes}"


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read a video's header and its first frame; files other than mp4 are read through to count their frames.

    An image is a clip of one frame.

    The frame tells what headers do not: whether anything can be decoded, and how the picture is turned.

    Raises:
        DecodeError: the file is missing, no video, or damaged.
    """
    if is_image(path):
        height, width, _ = read_image(os.fspath(path)).shape
        return VideoInfo(height, width, FPS, 1)
    with Video(os.fspath(path)) as video:
        frame = video.first_frame()
        if video.index.is_cut_short:
            raise DecodeError(video.path, "is cut short")
        size = video.geometry(frame).size(frame.height, frame.width)
        reference = geometry_of(frame, None, "reference").size(frame.height, frame.width)
        fps = video.rate
        if not fps:
            raise DecodeError(video.path, "does not say its frames per second")
        return VideoInfo(
            *size,
            fps,
            video.num_frames,
            is_irregular(video.seconds),
            is_hdr(frame),
            reference if reference != size else None,
        )
