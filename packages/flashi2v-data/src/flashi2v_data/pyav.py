"""Frames by PyAV: where each frame lies in a file, and from which key frame on to decode it.

A frame's index is its place in the order of display, among the frames that a player would show: those that an edit
list leaves out are not counted. Pictures are turned as the file's display matrix says, as players do.
"""

import bisect
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError

# Frames that a jump must spare: starting a decoder anew costs about as much as decoding a few.
_WORTH_A_JUMP = 4


@dataclass
class _Key:
    """A frame that can be decoded without others.

    Attributes:
        time: the timestamp that its packet bears.
        place: how many frames are stored before it, which is its place among those shown, or just before.
        target: the timestamp to seek.
    """

    time: int
    place: int
    target: int


def read(path: str, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield frames, (H, W, 3) uint8, for ascending indices.

    Raises:
        DecodeError: the file is damaged or has no such frame.
    """
    import av

    video: _Video | None = None
    try:
        video = _Video(path)
        for index in indices:
            yield _picture(video.frame(index))
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or str(error), is_partial=video is not None) from error
    finally:
        if video is not None:
            video.close()


def check_file(path: str) -> None:
    """Refuse what is no regular file: opening a pipe may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(mode):
        raise DecodeError(path, "is a directory" if stat.S_ISDIR(mode) else "is no regular file")


def open_video(path: str) -> tuple[Any, Any]:
    """Open a file without decoding anything yet; return its container and its video stream.

    Raises:
        DecodeError: it holds no video, or one that cannot be decoded.
    """
    import av

    # FFmpeg decodes the first frames to learn about a stream. Skipping them makes opening up to 50 times as fast, and
    # loses no more than the pixel format. Titles in another encoding must not keep a file from being read.
    container = av.open(path, options={"skip_frame": "all"}, metadata_errors="replace")
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise DecodeError(path, "has no video stream" if stream is None else "its codec is unknown")
    stream.codec_context.skip_frame = "DEFAULT"
    # One thread: loader workers provide the parallelism.
    stream.codec_context.thread_count = 1
    return container, stream


def full_index(container: Any, stream: Any) -> Sequence[Any] | None:
    """Return the entries of an mp4's index, which lists all frames in the order of decoding; other files have none."""
    index = stream.index_entries
    return index if container.format.name.startswith("mov") and len(index) == stream.frames else None


def _picture(frame: Any) -> NDArray[np.uint8]:
    image = frame.to_ndarray(format="rgb24", threads=1)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class _Video:
    """An open file, and where its decoding stands."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._container, self._stream = open_video(path)
        self._untouched = True
        self._keys, self._num_frames, self._has_times = self._scan()
        self._before = {key.time: key.place for key in self._keys}
        self._frames = self._from_start()
        self._next = 0

    def close(self) -> None:
        self._container.close()

    def frame(self, index: int) -> Any:
        """Return a frame, decoding no more than needed where `index` ascends from call to call."""
        if index >= self._num_frames:
            reason = f"has {self._num_frames} frames, frame {index} was asked for"
            raise DecodeError(self.path, reason, is_partial=True)
        last = bisect.bisect_right(self._keys, index, key=lambda key: key.place) - 1
        if last < 0 or self._keys[last].place < self._next + _WORTH_A_JUMP:
            frame = self._advance(index)
            if frame is not None:
                return frame
        # In an open group of pictures those shown before the key frame need the group before it. Where seeking in a
        # container cannot be relied on, decoding from the start can.
        for number in range(last, max(last - 2, -1), -1):
            self._frames = self._from_key(self._keys[number])
            frame = self._advance(index)
            if frame is not None:
                return frame
        self._frames = self._from_start()
        frame = self._advance(index)
        if frame is None:
            raise DecodeError(self.path, f"frame {index} cannot be decoded", is_partial=True)
        return frame

    def _advance(self, index: int) -> Any | None:
        for found, frame in self._frames:
            self._next = found + 1
            if found >= index:
                return frame if found == index else None
        return None

    def _from_start(self) -> Iterator[tuple[int, Any]]:
        if not self._untouched:
            self.close()
            self._container, self._stream = open_video(self.path)
        self._untouched = False
        yield from self._decode(0)

    def _from_key(self, key: _Key) -> Iterator[tuple[int, Any]]:
        self._untouched = False
        self._container.seek(key.target, stream=self._stream)
        yield from self._decode(None)

    def _decode(self, first: int | None) -> Iterator[tuple[int, Any]]:
        """Yield (index, frame) from where the file stands, without damaged frames.

        Args:
            first: index of the first frame; None leaves it to the first key frame that is met.
        """
        times: list[int] = []
        count = 0
        for packet in self._container.demux(self._stream):
            if first is None:
                first = self._before.get(getattr(packet, self._stamp))
                if first is None:
                    continue
            if packet.pts is not None and not packet.is_discard:
                bisect.insort(times, packet.pts)
            for frame in packet.decode():
                # All that is shown before a frame has been read before it is decoded, so its rank is final.
                rank = bisect.bisect_left(times, frame.pts) if self._has_times else count
                count += 1
                if not frame.is_corrupt:
                    yield first + rank, frame

    def _scan(self) -> tuple[list[_Key], int, bool]:
        """Find the key frames, count the frames, and tell whether packets say when they are shown."""
        index = full_index(self._container, self._stream)
        if index is not None:  # then nothing else needs to be read, however long the video
            self._stamp = "dts"
            entries = [(entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in index]
        else:
            self._stamp = "pts"
            self._untouched = False
            packets = [packet for packet in self._container.demux(self._stream) if packet.size]
            entries = [(packet.pts, packet.is_keyframe, packet.is_discard) for packet in packets]
        keys: list[_Key] = []
        num_frames = 0
        for time, is_key, is_discarded in entries:
            if is_key:
                keys.append(_Key(time, num_frames, time))
            elif keys and self._stamp == "dts":
                # Seeking goes by the time of display, and the one of decoding, being earlier, would lead to the group
                # before; that of the group's last frame does not.
                keys[-1].target = time
            num_frames += not is_discarded
        has_times = all(time is not None for time, _, _ in entries)
        return keys if has_times else [], num_frames, has_times
