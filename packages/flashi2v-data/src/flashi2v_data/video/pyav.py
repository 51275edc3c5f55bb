"""Frames by PyAV: from which key frame on to decode, and which of the frames that are decoded is which.

A frame's index is its place among the frames that a decoder puts out, from the start of the file on: those that an
edit list leaves out, or that lack what they build on (a recording that begins in mid-group), are not counted.

    path -> open_video    as a file, never as an address or a playlist, and only what is a container of videos
         -> Index         the packets in their order of storage: from an mp4's list, else by reading the file through
         -> Video.frame   jumps to a key frame and ranks what is decoded by its packets' times, or, where times do not
                          prove right, decodes from the start and counts

A jump is believed only to a packet that is the key frame sought, by its size and position; and ranks only where the
decoder puts frames out in their order.
"""

import bisect
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError
from flashi2v_data.video.colour import is_hdr, tone_mapped
from flashi2v_data.video.geometry import Geometry, Way, geometry_of
from flashi2v_data.video.index import TRUSTED, Index, Key, check_file, decoding, frame_rate, open_video

logger = logging.getLogger(__name__)

# Frames that a jump must spare: starting a decoder anew costs about as much as decoding a few.
_WORTH_A_JUMP = 4
# Frames that may be stored between a key frame and one that is shown before it.
_MOST_LEADING = 16


class _Unordered(Exception):
    """Times are not those at which the decoder's frames are shown."""


_warned_of_hdr = threading.Event()


def _warn_of_hdr(path: str) -> None:
    if not _warned_of_hdr.is_set():
        _warned_of_hdr.set()
        logger.warning("%s is HDR (PQ or HLG) and looks pale: set tone_map (this is said only once)", path)


class Video:
    """An open file: its frames, how many and when, and where its decoding stands.

    Args:
        path: of a regular file.
        way: how pictures are brought into shape.
        tone_map: show HDR as on other screens.

    Attributes:
        stream: of PyAV.
        index: of its packets.
        is_ordered: whether times of display have not been found wrong, yet.

    Raises:
        DecodeError: the file cannot be read, here and in every method.
    """

    def __init__(self, path: str, way: Way = "upright", *, tone_map: bool = False) -> None:
        check_file(path)
        self.path, self._way, self._tone_map = path, way, tone_map
        with decoding(path, is_partial=False):
            self._container, self.stream = open_video(path)
            self.index = Index(path, self._container, self.stream)
        self._is_untouched = self.index.is_listed
        self.is_ordered = bool(self.index.keys)
        self._undecodable: int | None = None  # frames before the first that can be decoded
        self._counted: int | None = None  # frames, where all had to be decoded to be counted
        self._frames, self._next = self._walk(None), 0

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def pictures(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield frames, (H, W, 3) uint8, for ascending indices."""
        with decoding(self.path):
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
        with decoding(self.path, is_partial=False):
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
            frame = self._find(index) if not self.is_ordered or index < self.index.num_shown else None
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
            if frame is not None or not self.is_ordered:
                return frame
            nearest = -1
        # In an open group of pictures those shown before the key frame need the group before it. Where seeking in a
        # container cannot be relied on, decoding from the start can.
        for start in (*self.index.keys[max(nearest - 1, 0) : nearest + 1][::-1], None):
            self._frames = self._walk(start)
            frame = self._advance(index)
            if frame is not None:
                break
        return frame

    def _nearest_key(self, index: int) -> int | None:
        """Return which key frame is the nearest before a frame, if it is worth a jump."""
        undecodable = self._undecodable or 0
        if not self.is_ordered:
            return None
        nearest = bisect.bisect_right(self.index.keys, index + undecodable, key=lambda key: key.rank) - 1
        is_worth_it = nearest >= 0 and self.index.keys[nearest].rank - undecodable >= self._next + _WORTH_A_JUMP
        return nearest if is_worth_it else None

    def _advance(self, index: int) -> Any | None:
        for found, frame in self._frames:
            self._next = found + 1
            if found >= index:
                return frame if found == index else None
        return None

    def _walk(self, key: Key | None) -> Iterator[tuple[int, Any]]:
        """Yield (index, frame) from a key frame on, or from the start.

        Raises:
            _Unordered: times and frames do not agree.
        """
        if not self.is_ordered:
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

    def _ranked(self, key: Key | None) -> Iterator[tuple[int, Any, bool]]:
        """Yield frames with their ranks by time, and whether times have been seen to differ from the order of storage.

        Where they never do, they may be those of storage, which FFmpeg invents where a file has none.
        """
        times: list[int] = []
        time_of: dict[int, int] = {}
        is_proven, first = False, 0

        def noting() -> Iterator[Any]:
            nonlocal is_proven, first
            for number, packet in self._numbered(key):
                known = self.index.packets[number]
                if not time_of:
                    first = known.rank
                time = packet.pts if self.index.is_listed else known.shown_at
                if known.is_shown:
                    if time is None:
                        raise _Unordered
                    is_proven |= self.index.format in TRUSTED and bool(times) and time < times[-1]
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

    def _numbered(self, key: Key | None) -> Iterator[tuple[int, Any]]:
        """Read packets with their numbers, and see that they are those that were listed."""
        number = -1 if key is None else None
        for packet in self._read_on(key):
            if number is None:
                met = self.index.key_at(packet)
                if met is None:
                    continue
                number = met.number
            else:
                number += 1
            if number >= len(self.index.packets) or packet.size != self.index.packets[number].size:
                raise _Unordered
            yield number, packet

    def _read_on(self, key: Key | None) -> Iterator[Any]:
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
        if self.index.format in TRUSTED and self._begins_with_key():
            self._undecodable = 0
        elif next(self._walk(None), None) is None:
            self._undecodable = self.index.num_shown

    def _begins_with_key(self) -> bool:
        """Tell, without decoding, whether a file begins with a key frame and nothing that is shown before it."""
        begin = itertools.islice(self._numbered(None), _MOST_LEADING)
        times = [packet.pts for number, packet in begin if self.index.packets[number].is_shown]
        return self.index.packets[0].is_key and None not in times and times[:1] == [min(times, default=0)]

    def _distrust(self) -> None:
        """Count from now on: times have been found wrong."""
        logger.debug("%s: its times are not those of its frames, which are counted", self.path)
        self.is_ordered = False
        self._frames, self._next = self._walk(None), 0

    @property
    def num_frames(self) -> int:
        """How many frames can be decoded; where times are wrong, all are decoded to count them."""
        with decoding(self.path):
            if self.is_ordered and self._undecodable is None:
                try:
                    self._learn_first()
                except _Unordered:
                    self._distrust()
            if self.is_ordered:
                return self.index.num_shown - (self._undecodable or 0)
            if self._counted is None:
                self._counted = sum(1 for _ in self._walk(None))
            return self._counted

    @functools.cached_property
    def seconds(self) -> NDArray[np.float64]:
        """When frames are shown, by index, the first at 0; empty where the file does not say."""
        return self.index.seconds(is_ordered=self.is_ordered, num_undecodable=self._undecodable or 0)

    @property
    def rate(self) -> float | None:
        """Frames per second: what the header says, unless frames over duration say otherwise."""
        return frame_rate(self.stream, self.seconds)
