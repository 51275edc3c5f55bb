"""Frames by PyAV: where each frame lies in a file, and from which key frame on to decode it.

A frame's index is its place among the frames that a decoder puts out, from the start of the file on: those that an
edit list leaves out, or that lack what they build on (a recording that begins in mid-group), are not counted.

    path -> open_video    as a file, never as an address or a playlist, and only what is a container of videos
         -> Video._scan   the packets in their order of storage: from an mp4's index, else by reading the file through
         -> Video.frame   jumps to a key frame and ranks what is decoded by its packets' times, or, where times do not
                          prove right, decodes from the start and counts

Times are what files get wrong: AVI has none of display, and FFmpeg then invents some in the order of storage; those of
program streams change after a jump; copying packets makes wrong ones lasting. So a jump is believed only to a packet
that is the key frame sought, by its size and position; and ranks only where the decoder puts frames out in their order.
"""

import bisect
import collections
import contextlib
import functools
import itertools
import logging
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.colour import is_hdr, tone_mapped
from flashi2v_data.video.frames import is_irregular
from flashi2v_data.video.geometry import Geometry, Way, geometry_of
from flashi2v_data.video.write import file_url

logger = logging.getLogger(__name__)

# Containers that hold videos themselves. Playlists, lists of pictures and whatever leads to other files are none.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,vc1,av1,obu,ivf,dv,flv,live_flv,asf,ogg,mxf,nut,gxf,rm,"
    "wtv,nsv,swf,yuv4mpegpipe,gif,h261,h263,cavsvideo,dirac,mjpeg"
)
# Of containers, the two whose packets bear the times that their writer gave them, and each a whole picture.
_TRUSTED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Frames that a jump must spare: starting a decoder anew costs about as much as decoding a few.
_WORTH_A_JUMP = 4
# Frames that may be stored between a key frame and one that is shown before it.
_MOST_LEADING = 16
# A header's frames per second that differ by more from frames over duration are wrong.
_RATE_TOLERANCE = 0.02
# Fewer frames than this have no rate of their own.
_FEW = 3
# Before any timestamp.
_NEVER = -(1 << 63)


class _Packet(NamedTuple):
    """What is known of a packet before it is read again.

    Attributes:
        shown_at: its timestamp of display; None where it bears none, and for all of an index.
        decoded_at: its timestamp of decoding, if it bears one.
        position: in the file, where that is known.
        is_shown: whether it holds a picture that is part of the video.
        place: how many frames are stored before it; its own place among those shown, if it is a key frame, or just
            before.
    """

    shown_at: int | None
    decoded_at: int | None
    size: int
    position: int | None
    is_key: bool
    is_shown: bool
    place: int


class _Key(NamedTuple):
    """A frame that can be decoded without others.

    Attributes:
        number: of its packet.
        place: of its packet.
        target: the timestamp to seek.
    """

    number: int
    place: int
    target: int


class _Unordered(Exception):
    """Times are not those at which the decoder's frames are shown."""


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
        DecodeError: it is no video, or one that cannot be decoded.
    """
    import av

    # FFmpeg decodes the first frames to learn about a stream. Skipping them makes opening up to 50 times as fast, and
    # loses no more than the pixel format. Titles in another encoding must not keep a file from being read.
    options = {"skip_frame": "all", "protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(file_url(path), options=options, metadata_errors="replace")
    except av.ArgumentError:  # told so of what is not among the formats
        raise DecodeError(path, "is no container of videos") from None
    stream = container.streams.best("video")
    if stream is None or stream.codec_context is None:
        container.close()
        raise DecodeError(path, "has no video stream" if stream is None else "its codec is unknown")
    stream.codec_context.skip_frame = "DEFAULT"
    # One thread: loader workers provide the parallelism.
    stream.codec_context.thread_count = 1
    return container, stream


_warned_of_hdr = threading.Event()


def _warn_of_hdr(path: str) -> None:
    if not _warned_of_hdr.is_set():
        _warned_of_hdr.set()
        logger.warning("%s is HDR (PQ or HLG), and looks pale: set tone_map; of others nothing more is said", path)


class Video:
    """An open file: its frames, how many and when, and where its decoding stands.

    Args:
        path: of a regular file.
        way: how pictures are brought into shape.
        tone_map: show HDR as on other screens.

    Raises:
        DecodeError: the file cannot be read, here and in every method.
    """

    def __init__(self, path: str, way: Way = "upright", *, tone_map: bool = False) -> None:
        check_file(path)
        self.path, self._way, self._tone_map = path, way, tone_map
        with self._faults(is_partial=False):
            self._container, self.stream = open_video(path)
            self.format: str = self._container.format.name
            self._is_untouched = True
            self._packets = self._scan()
        self._num_shown = sum(packet.is_shown for packet in self._packets)
        self._keys = self._find_keys()
        # Of two that look alike neither is known again after a jump.
        looks = collections.Counter(map(self._look, self._keys))
        self._key_of = {self._look(key): key for key in self._keys if looks[self._look(key)] == 1}
        self._has_ranks = bool(self._keys)
        self._undecodable: int | None = None  # frames before the first that can be decoded
        self._counted: int | None = None  # frames, where all had to be decoded to be counted
        self._frames, self._next = self._walk(None), 0

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _look(self, key: _Key) -> tuple[int | None, int]:
        packet = self._packets[key.number]
        return packet.position, packet.size

    @contextlib.contextmanager
    def _faults(self, *, is_partial: bool = True) -> Iterator[None]:
        import av

        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise DecodeError(self.path, error.strerror or str(error), is_partial=is_partial) from error

    # ---- pictures --------------------------------------------------------------------------------------------------

    def pictures(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield frames, (H, W, 3) uint8, for ascending indices."""
        with self._faults():
            for index in indices:
                frame = self._frame(index)
                yield self._picture(frame)

    def _picture(self, frame: Any) -> NDArray[np.uint8]:
        geometry, hdr = self.geometry(frame), is_hdr(frame)
        width = geometry.stored_width(frame.width)
        if width != frame.width:
            pixels = frame.format.name if hdr and self._tone_map else "rgb24"
            frame = frame.reformat(width=width, format=pixels, interpolation="BICUBIC", threads=1)
        if hdr and self._tone_map:
            return geometry.turn(tone_mapped(frame))
        if hdr:
            _warn_of_hdr(self.path)
        return geometry.turn(frame.to_ndarray(format="rgb24", threads=1))

    def first_frame(self) -> Any:
        """Return the first frame, as PyAV gives it."""
        with self._faults(is_partial=False):
            return self._frame(0)

    def geometry(self, frame: Any) -> Geometry:
        """Return how the pictures of this file come into shape; `frame` is any of them."""
        ratio = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        try:
            return geometry_of(frame, ratio, self._way)
        except ValueError as error:
            raise DecodeError(self.path, str(error)) from None

    def _frame(self, index: int) -> Any:
        """Return a frame, decoding no more than needed where `index` ascends from call to call."""
        try:
            frame = self._find(index) if not self._has_ranks or index < self._num_shown else None
        except _Unordered:
            self._distrust()
            frame = self._advance(index)
        if frame is None:
            num_frames = self.num_frames
            reason = f"has {num_frames} frames, frame {index} was asked for"
            if not num_frames:
                reason = "holds no frame"
            elif index < num_frames:
                reason = f"frame {index} cannot be decoded"
            raise DecodeError(self.path, reason, is_partial=num_frames > 0)
        return frame

    def _find(self, index: int) -> Any | None:
        """Return a frame, from the nearest key frame before it if that is worth a jump."""
        if index < self._next:
            self._frames, self._next = self._walk(None), 0
        nearest = self._nearest_key(index)
        if nearest is not None and self._undecodable is None:
            self._learn_first()
            nearest = self._nearest_key(index)
        if nearest is None:
            frame = self._advance(index)
            if frame is not None or not self._has_ranks:
                return frame
            nearest = -1
        # In an open group of pictures those shown before the key frame need the group before it. Where seeking in a
        # container cannot be relied on, decoding from the start can.
        for start in (*self._keys[max(nearest - 1, 0) : nearest + 1][::-1], None):
            self._frames = self._walk(start)
            frame = self._advance(index)
            if frame is not None:
                break
        return frame

    def _nearest_key(self, index: int) -> int | None:
        """Return which key frame is the nearest before a frame, if it is worth a jump."""
        undecodable = self._undecodable or 0
        nearest = bisect.bisect_right(self._keys, index + undecodable, key=lambda key: key.place) - 1
        is_worth_it = nearest >= 0 and self._keys[nearest].place - undecodable >= self._next + _WORTH_A_JUMP
        return nearest if is_worth_it else None

    def _advance(self, index: int) -> Any | None:
        for found, frame in self._frames:
            self._next = found + 1
            if found >= index:
                return frame if found == index else None
        return None

    # ---- decoding --------------------------------------------------------------------------------------------------

    def _walk(self, key: _Key | None) -> Iterator[tuple[int, Any]]:
        """Yield (index, frame) from a key frame on, or from the start.

        Raises:
            _Unordered: times and frames do not agree.
        """
        if not self._has_ranks:
            yield from enumerate(self._decode(self._read_on(None)))
            return
        first = None
        for rank, frame in self._ordered(self._ranked(key)):
            if first is None and key is None:
                first = rank
                if self._undecodable not in (None, first):
                    raise _Unordered
                self._undecodable = first
            assert self._undecodable is not None  # learned before the first jump
            yield rank - self._undecodable, frame

    def _ordered(self, ranked: Iterable[tuple[int, Any, bool]]) -> Iterator[tuple[int, Any]]:
        """Yield (rank, frame); where times may not tell the order, when the next has been seen to follow at once."""
        held: tuple[int, Any] | None = None
        last: int | None = None
        for rank, frame, is_proven in ranked:
            if last is not None and (rank <= last if is_proven else rank != last + 1):
                raise _Unordered
            last = rank
            if held is not None:
                yield held
            held = rank, frame
            if is_proven:
                yield held
                held = None
        if held is not None:
            yield held

    def _ranked(self, key: _Key | None) -> Iterator[tuple[int, Any, bool]]:
        """Yield frames with their ranks by time, and whether times have been seen to differ from the order of storage.

        Where they never do, they may be those of storage, which FFmpeg invents where a file has none.
        """
        times: list[int] = []
        time_of: dict[int, int] = {}
        is_proven, first = False, 0

        def noting() -> Iterator[Any]:
            nonlocal is_proven, first
            for number, packet in self._numbered(key):
                known = self._packets[number]
                if not time_of:
                    first = known.place
                time = packet.pts if self._has_index else known.shown_at
                if known.is_shown:
                    if time is None:
                        raise _Unordered
                    is_proven |= self.format in _TRUSTED and bool(times) and time < times[-1]
                    bisect.insort(times, time)
                    time_of[number] = time
                packet.pts = number  # the decoder hands it on to the frame
                yield packet

        for frame in self._decode(noting()):
            if frame.pts not in time_of:
                raise _Unordered
            # All that is shown before a frame has been read before it is decoded, so its rank is final.
            yield first + bisect.bisect_left(times, time_of[frame.pts]), frame, is_proven

    def _decode(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Decode packets to the last frame; what cannot be decoded before the first frame is passed over."""
        import av

        is_begun, fault = False, None
        for packet in itertools.chain(packets, [None]):
            try:
                frames = self.stream.codec_context.decode(packet)
            except av.InvalidDataError as error:
                if is_begun:
                    raise
                fault = error
                continue
            for frame in frames:
                is_begun = True
                yield frame
        if fault is not None and not is_begun:
            raise fault

    def _numbered(self, key: _Key | None) -> Iterator[tuple[int, Any]]:
        """Read packets with their numbers, and see that they are those that were listed."""
        number = -1 if key is None else None
        for packet in self._read_on(key):
            if number is None:
                met = self._key_of.get((packet.pos, packet.size)) if packet.is_keyframe else None
                if met is None:
                    continue
                number = met.number
            else:
                number += 1
            if number >= len(self._packets) or packet.size != self._packets[number].size:
                raise _Unordered
            yield number, packet

    def _read_on(self, key: _Key | None) -> Iterator[Any]:
        """Read the packets from the start, or from somewhere before a key frame, where the container can find it."""
        import av

        if key is not None:
            try:
                self._container.seek(key.target, stream=self.stream)
            except av.FFmpegError:
                raise _Unordered from None
        elif not self._is_untouched:
            self._container.close()
            self._container, self.stream = open_video(self.path)
        self._is_untouched = False
        for packet in self._container.demux(self.stream):
            if packet.size:
                yield packet

    def _learn_first(self) -> None:
        """Find how many frames at the beginning build on what the file does not hold, and cannot be decoded."""
        if self.format in _TRUSTED and self._begins_with_key():
            self._undecodable = 0
        elif next(self._walk(None), None) is None:
            self._undecodable = self._num_shown

    def _begins_with_key(self) -> bool:
        """Tell, without decoding, whether a file begins with a key frame and nothing that is shown before it."""
        begin = itertools.islice(self._numbered(None), _MOST_LEADING)
        times = [packet.pts for number, packet in begin if self._packets[number].is_shown]
        return self._packets[0].is_key and None not in times and times[:1] == [min(times, default=0)]

    def _distrust(self) -> None:
        """Count from now on: times have been found wrong."""
        logger.debug("%s: its times are not those of its frames, which are counted", self.path)
        self._has_ranks, self._keys = False, []
        self._frames, self._next = self._walk(None), 0

    # ---- packets ---------------------------------------------------------------------------------------------------

    def _scan(self) -> list[_Packet]:
        """List the packets in the order of storage."""
        index = self.stream.index_entries
        # An mp4's index lists all; then nothing else needs to be read, however long the video.
        self._has_index = self.format == _TRUSTED[0] and len(index) == self.stream.frames
        if self._has_index:
            found = [(None, e.timestamp, e.size, e.pos, e.is_keyframe, not e.is_discard) for e in index if e.size]
        else:
            # VP8 keeps pictures that are never shown in packets of their own.
            hides = self.stream.codec_context.name == "vp8"
            found = [
                (
                    p.pts,
                    p.dts,
                    p.size,
                    p.pos,
                    p.is_keyframe,
                    not (p.is_discard or (hides and not memoryview(p)[0] & 16)),
                )
                for p in self._read_on(None)
            ]
        packets, num_shown = [], 0
        for shown_at, decoded_at, size, position, is_key, is_shown in found:
            packets.append(_Packet(shown_at, decoded_at, size, position, is_key, is_shown, num_shown))
            num_shown += is_shown
        return packets

    def _find_keys(self) -> list[_Key]:
        """List the key frames that may be jumped to; none where times cannot be right."""
        keys: list[_Key] = []
        latest, seen = _NEVER, set()
        for number, packet in enumerate(self._packets):
            time = packet.decoded_at if self._has_index else packet.shown_at
            if self._has_index:
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
                if self.format not in _TRUSTED and packet.decoded_at is not None:
                    time = packet.decoded_at
                keys.append(_Key(number, packet.place, time))
        return keys

    # ---- numbers ---------------------------------------------------------------------------------------------------

    @property
    def num_frames(self) -> int:
        """How many frames can be decoded; where times are wrong, all are decoded to count them."""
        with self._faults():
            if self._has_ranks and self._undecodable is None:
                try:
                    self._learn_first()
                except _Unordered:
                    self._distrust()
            if self._has_ranks:
                return self._num_shown - (self._undecodable or 0)
            if self._counted is None:
                self._counted = sum(1 for _ in self._walk(None))
            return self._counted

    @property
    def is_ordered(self) -> bool:
        """Whether times of display have not been found wrong, yet."""
        return self._has_ranks

    @property
    def is_cut_short(self) -> bool:
        """Whether an index names packets that lie beyond the file's end."""
        return self._has_index and any((p.position or 0) + p.size > self._container.size for p in self._packets)

    @functools.cached_property
    def seconds(self) -> NDArray[np.float64]:
        """When frames are shown, by index, the first at 0; empty where the file does not say."""
        if self.format == "mpeg":
            return np.empty(0)  # a program stream has a time for some frames, and FFmpeg guesses the others'
        shown = [packet for packet in self._packets if packet.is_shown]
        decoded_at = [packet.decoded_at for packet in shown]
        if self._has_index:
            times = self._times(decoded_at)
            # An index holds the times of decoding, which may be uneven although those of display are not.
            if is_irregular(times):
                times = self._times([packet.shown_at for packet in self.timed if packet.is_shown])
            return times
        shown_at = [packet.shown_at for packet in shown]
        if self._has_ranks and self.format != "avi":
            return self._times(shown_at)
        # Times of decoding, or those that were invented in the order of storage, are as far apart as those of display.
        for stamps in (decoded_at, shown_at):
            known = [stamp for stamp in stamps if stamp is not None]
            if len(known) == len(stamps) and known == sorted(set(known)):
                return self._times(stamps)
        return np.empty(0)

    @functools.cached_property
    def timed(self) -> list[_Packet]:
        """The packets with their times of display, for which an mp4 is read through too."""
        if not self._has_index:
            return self._packets
        with self._faults():
            container, stream = open_video(self.path)
            with container:
                times = [packet.pts for packet in container.demux(stream) if packet.size]
        return [packet._replace(shown_at=time) for packet, time in zip(self._packets, times)]

    def _times(self, stamps: list[int | None]) -> NDArray[np.float64]:
        if None in stamps:
            return np.empty(0)
        times = np.sort(np.array(stamps, np.float64))[self._undecodable or 0 :] * float(self.stream.time_base)
        return times - times[:1]

    @property
    def rate(self) -> float | None:
        """Frames per second: what the header says, unless frames over duration say otherwise."""
        says = [float(rate) for rate in (self.stream.average_rate, self.stream.guessed_rate) if rate]
        seconds = self.seconds
        if len(seconds) < _FEW or seconds[-1] <= 0:
            return says[-1] if says else None
        measured = float((len(seconds) - 1) / seconds[-1])
        # Of two headers the nearer: what an older FFmpeg guesses of Matroska's average is 1.7 % off.
        near = (
            rate for limit in (_RATE_TOLERANCE / 4, _RATE_TOLERANCE) for rate in says if _is_near(rate, measured, limit)
        )
        return next(near, measured)


def _is_near(rate: float, measured: float, tolerance: float) -> bool:
    return abs(rate - measured) <= tolerance * measured
