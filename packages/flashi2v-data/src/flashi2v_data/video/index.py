"""What lies where in a video file: its packets in their order of storage, its key frames, and when frames are shown.

Nothing is decoded here. An mp4 lists its packets; other files are read through once for theirs. Times are what files
get wrong: AVI has none of display, and FFmpeg then invents some in the order of storage; those of program streams
change after a jump; copying packets makes wrong ones lasting. `pyav` finds out by decoding which ones hold.
"""

import collections
import contextlib
import functools
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.frames import is_irregular
from flashi2v_data.video.write import file_url

# Containers that hold videos themselves. Playlists, lists of pictures and whatever leads to other files are left out.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,vc1,av1,obu,ivf,dv,flv,live_flv,asf,ogg,mxf,nut,gxf,rm,"
    "wtv,nsv,swf,yuv4mpegpipe,gif,h261,h263,cavsvideo,dirac,mjpeg"
)
# Of containers, the two whose packets bear the times that their writer gave them, and each a whole picture.
TRUSTED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# A header's frames per second that differ by more from frames over duration are wrong.
_RATE_TOLERANCE = 0.02
# Fewer frames than this have no rate of their own.
_FEW = 3
# Before any timestamp.
_NEVER = -(1 << 63)


class Packet(NamedTuple):
    """What is known of a packet before it is read again.

    Attributes:
        shown_at: its timestamp of display; None where it bears none, and for all of an mp4's list.
        decoded_at: its timestamp of decoding, if it bears one.
        position: in the file, where that is known.
        is_shown: whether it holds a picture that is part of the video.
        rank: how many frames are stored before it; of a key frame its own rank among those shown, or just before.
    """

    shown_at: int | None
    decoded_at: int | None
    size: int
    position: int | None
    is_key: bool
    is_shown: bool
    rank: int


class Key(NamedTuple):
    """A frame that can be decoded without others.

    Attributes:
        number: of its packet.
        rank: of its packet.
        target: the timestamp to seek.
    """

    number: int
    rank: int
    target: int


def check_file(path: str) -> None:
    """Refuse what is not a regular file: opening a pipe may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise DecodeError(path, getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(mode):
        raise DecodeError(path, "is a directory" if stat.S_ISDIR(mode) else "is not a regular file")


@contextlib.contextmanager
def decoding(path: str, *, is_partial: bool = True) -> Iterator[None]:
    """Turn the errors of FFmpeg into those of this package."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or str(error), is_partial=is_partial) from error


def open_video(path: str) -> tuple[Any, Any]:
    """Open a file without decoding anything yet; return its container and its video stream.

    Raises:
        DecodeError: it is not a video, or one that cannot be decoded.
    """
    import av

    # FFmpeg decodes the first frames to learn about a stream. Skipping them makes opening up to 50 times as fast, and
    # loses no more than the pixel format. Titles in another encoding must not keep a file from being read.
    options = {"skip_frame": "all", "protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(file_url(path), options=options, metadata_errors="replace")
    except av.ArgumentError:  # FFmpeg's answer to what is not among the formats
        raise DecodeError(path, "is not a container of videos") from None
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise DecodeError(path, "has no video stream" if stream is None else "its codec is unknown")
    stream.codec_context.skip_frame = "DEFAULT"
    # One thread: loader workers provide the parallelism.
    stream.codec_context.thread_count = 1
    return container, stream


class Index:
    """The packets of an open file.

    Args:
        path: of the file.
        container: from `open_video`; it is read to its end, unless `is_listed`.
        stream: from `open_video`.

    Attributes:
        format: of the container.
        is_listed: whether the file lists its packets; then nothing else needs to be read, however long the video.
        packets: in the order of storage.
        num_shown: of these, how many hold a picture that is part of the video.
        keys: the key frames that may be jumped to; none where times cannot be right.
    """

    def __init__(self, path: str, container: Any, stream: Any) -> None:
        self._path = path
        self._num_bytes: int = container.size
        self._time_base = stream.time_base
        self.format: str = container.format.name
        index = stream.index_entries
        self.is_listed = self.format == TRUSTED[0] and len(index) == stream.frames
        if self.is_listed:
            found = [(None, e.timestamp, e.size, e.pos, e.is_keyframe, not e.is_discard) for e in index if e.size]
        else:
            # VP8 keeps pictures that are never shown in packets of their own.
            hides = stream.codec_context.name == "vp8"
            found = [
                (
                    p.pts,
                    p.dts,
                    p.size,
                    p.pos,
                    p.is_keyframe,
                    not (p.is_discard or (hides and not memoryview(p)[0] & 16)),
                )
                for p in container.demux(stream)
                if p.size
            ]
        self.packets: list[Packet] = []
        self.num_shown = 0
        for packet in found:
            self.packets.append(Packet(*packet, self.num_shown))
            self.num_shown += packet[-1]
        self.keys = self._find_keys()
        # Of two that look alike neither is known again after a jump.
        looks = collections.Counter(map(self._look, self.keys))
        self._key_of = {self._look(key): key for key in self.keys if looks[self._look(key)] == 1}

    def _look(self, key: Key) -> tuple[int | None, int]:
        packet = self.packets[key.number]
        return packet.position, packet.size

    def key_at(self, packet: Any) -> Key | None:
        """Return which key frame a packet of PyAV is, by its position and size."""
        return self._key_of.get((packet.pos, packet.size)) if packet.is_keyframe else None

    def _find_keys(self) -> list[Key]:
        keys: list[Key] = []
        latest, seen = _NEVER, set()
        for number, packet in enumerate(self.packets):
            time = packet.decoded_at if self.is_listed else packet.shown_at
            if self.is_listed:
                if keys and not packet.is_key and time is not None:
                    # Seeking goes by the time of display, and the one of decoding, being earlier, would lead to the
                    # group before; that of the group's last frame does not.
                    keys[-1] = keys[-1]._replace(target=time)
            elif packet.is_shown and (keys or packet.is_key):
                # A key frame is shown after all that are stored before it, and no two frames are shown at once.
                if time is None or time in seen or (packet.is_key and time < latest):
                    return []
                seen.add(time)
                latest = max(latest, time)
            if packet.is_key and time is not None:
                # Most containers are sought by times of decoding.
                if self.format not in TRUSTED and packet.decoded_at is not None:
                    time = packet.decoded_at
                keys.append(Key(number, packet.rank, time))
        return keys

    @property
    def is_cut_short(self) -> bool:
        """Whether packets are listed that lie beyond the file's end."""
        return self.is_listed and any((p.position or 0) + p.size > self._num_bytes for p in self.packets)

    @functools.cached_property
    def timed(self) -> list[Packet]:
        """The packets with their times of display, for which an mp4 is read through too."""
        if not self.is_listed:
            return self.packets
        with decoding(self._path):
            container, stream = open_video(self._path)
            with container:
                times = [packet.pts for packet in container.demux(stream) if packet.size]
        return [packet._replace(shown_at=time) for packet, time in zip(self.packets, times)]

    def seconds(self, *, is_ordered: bool, num_undecodable: int) -> NDArray[np.float64]:
        """Return when frames are shown, by index, the first at 0; empty where the file does not say.

        Args:
            is_ordered: whether times of display have not been found wrong.
            num_undecodable: frames at the beginning that are not counted.
        """
        if self.format == "mpeg":
            return np.empty(0)  # a program stream has a time for some frames, and FFmpeg guesses the others'

        def times(stamps: list[int | None]) -> NDArray[np.float64]:
            if None in stamps:
                return np.empty(0)
            found = np.sort(np.array(stamps, np.float64))[num_undecodable:] * float(self._time_base)
            return found - found[:1]

        shown = [packet for packet in self.packets if packet.is_shown]
        decoded_at = [packet.decoded_at for packet in shown]
        if self.is_listed:
            # A list holds the times of decoding, which may be uneven although those of display are not.
            if is_irregular(found := times(decoded_at)):
                return times([packet.shown_at for packet in self.timed if packet.is_shown])
            return found
        shown_at = [packet.shown_at for packet in shown]
        if is_ordered and self.format != "avi":
            return times(shown_at)
        # Times of decoding, or those that were invented in the order of storage, are as far apart as those of display.
        for stamps in (decoded_at, shown_at):
            known = [stamp for stamp in stamps if stamp is not None]
            if len(known) == len(stamps) and known == sorted(set(known)):
                return times(stamps)
        return np.empty(0)


def frame_rate(stream: Any, seconds: NDArray[np.float64]) -> float | None:
    """Return frames per second: what the header says, unless frames over duration say otherwise."""
    says = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if len(seconds) < _FEW or seconds[-1] <= 0:
        return says[-1] if says else None
    measured = float((len(seconds) - 1) / seconds[-1])
    # Of two headers the nearer: what an older FFmpeg guesses of Matroska's average is 1.7 % off.
    for tolerance in (_RATE_TOLERANCE / 4, _RATE_TOLERANCE):
        for rate in says:
            if abs(rate - measured) <= tolerance * measured:
                return rate
    return measured
