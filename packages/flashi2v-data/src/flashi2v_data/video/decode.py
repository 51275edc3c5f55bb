"""Frames of video files, by one of three decoders, and images."""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.video.colour import is_hdr
from flashi2v_data.video.frames import Moments, frames_at, is_irregular
from flashi2v_data.video.geometry import BY_ANGLE, Way
from flashi2v_data.video.images import is_image, read_image
from flashi2v_data.video.pyav import Video
from flashi2v_data.video.write import file_url

logger = logging.getLogger(__name__)

Backend = Literal["auto", "decord", "pyav", "torchcodec"]
_Decoder = Literal["decord", "pyav", "torchcodec"]
# Brings a frame, (H, W, 3), into its place in the result.
Convert = Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]

# Frames that decord and torchcodec hold at full size at a time; PyAV holds one.
_CHUNK = 8


@functools.cache
def resolve_backend(backend: Backend) -> _Decoder:
    """Return the decoder that serves `backend`; "auto" is PyAV, which reads everything and is the fastest of them.

    Raises:
        InputError: an unknown backend, or one asked for by name that is not installed or cannot be loaded.
    """
    if backend == "auto":
        return "pyav"
    if backend == "pyav":
        return backend
    if backend not in ("decord", "torchcodec"):
        raise InputError(f"unknown decoder {backend!r}: choose auto, decord, pyav or torchcodec")
    try:
        importlib.import_module(backend)
    except ModuleNotFoundError:
        raise InputError(
            f"decoder {backend} is not installed: pip install 'flashi2v-data[{backend}]', or choose pyav"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        # torchcodec raises a RuntimeError over many lines where FFmpeg's libraries or its own do not fit.
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise InputError(
            f"decoder {backend} cannot be loaded: {reason}; it needs the shared libraries of FFmpeg 4 to 8 and a build "
            "for this torch, or choose pyav"
        ) from None
    return backend


def read_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | NDArray[np.integer],
    backend: Backend = "auto",
    *,
    convert: Convert | None = None,
    out: NDArray[np.uint8] | None = None,
    geometry: Way = "upright",
    tone_map: bool = False,
    moments: Moments | None = None,
) -> NDArray[np.uint8]:
    """Read frames by their number in the order of display; numbers may repeat and come in any order.

    An image is a clip of one frame.

    All backends give the same frames, upright and of square pixels, without those that an edit list leaves out.
    Where a decoder is known to differ from the others (`_difference`), PyAV is used, which is logged once for every
    reason. Two threads work: one decodes, the other calls `convert`.

    Args:
        path: of a regular file.
        indices: numbers of frames, from 0 on.
        backend: see `resolve_backend`.
        convert: called as `convert(frame, out[t])` for each frame, (H, W, 3) uint8, as soon as it is decoded; it writes
            the frame there cropped, resized, or in another order, so that no clip is ever held at full size. It needs
            `out`.
        out: where the result goes, (T, ...); the default makes a new array.
        geometry: see `geometry.Way`.
        tone_map: show HDR videos as on other screens; without it a warning names the first.
        moments: when the frames are to be shown; in a file of irregular rate these choose them, not `indices`.

    Returns:
        (T, H, W, 3), uint8 RGB, T = len(indices); or `out`.

    Raises:
        DecodeError: the file is missing, damaged, or has no such frame.
        InputError: the backend is not installed.
    """
    name = os.fspath(path)
    if len(indices) == 0:
        raise InputError(f"{name}: no frame was asked for")
    if min(indices) < 0:
        raise DecodeError(name, f"there is no frame {min(indices)}")
    decoder = resolve_backend(backend)
    if is_image(name):
        _check_range(name, [max(map(int, indices))], 1)
        frame = read_image(name)
        out = np.empty((len(indices), *frame.shape), np.uint8) if out is None else out
        _put(frame, out, [*range(len(indices))], convert or _copy)
        return out
    with Video(name, geometry, tone_map=tone_map) as video:
        if moments is not None and is_irregular(video.seconds):
            indices = _chosen(video, moments)
        return _read(video, [int(index) for index in indices], decoder, convert or _copy, out)


def _chosen(video: Video, moments: Moments) -> list[int]:
    chosen = frames_at(moments, video.seconds)
    if chosen is None:
        asked = moments.seconds[-1] - moments.seconds[0]
        reason = f"frames {moments.start} to {moments.end - 1} last less than {asked:.2f} s: the rate is irregular"
        raise DecodeError(video.path, reason, is_of_record=True)
    return chosen


def _read(
    video: Video,
    indices: list[int],
    decoder: _Decoder,
    convert: Convert,
    out: NDArray[np.uint8] | None,
) -> NDArray[np.uint8]:
    name = video.path
    positions: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        positions.setdefault(index, []).append(position)
    wanted = sorted(positions)
    size: tuple[int, ...] | None = None
    # While one frame is converted, the next is decoded: no more than two are held at full size.
    with ThreadPoolExecutor(1, "convert") as converter:
        converted: Future[None] | None = None
        for frame, index in zip(_frames(video, wanted, decoder), wanted):
            if size is None:
                size = frame.shape
                out = np.empty((len(indices), *size), np.uint8) if out is None else out
            elif frame.shape != size:
                raise DecodeError(
                    name, f"changes its size from {size[0]}x{size[1]} to {frame.shape[0]}x{frame.shape[1]}"
                )
            assert out is not None
            if converted is not None:
                converted.result()
            converted = converter.submit(_put, frame, out, positions[index], convert)
        if converted is not None:
            converted.result()
    assert out is not None
    return out


def _put(frame: NDArray[np.uint8], out: NDArray[np.uint8], positions: list[int], convert: Convert) -> None:
    first, *others = positions
    convert(frame, out[first])
    for position in others:
        out[position] = out[first]


def _copy(frame: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    out[:] = frame


def _frames(video: Video, indices: list[int], decoder: _Decoder) -> Iterator[NDArray[np.uint8]]:
    if decoder != "pyav":
        reason = _difference(video, decoder)
        if reason is not None:
            _note(decoder, reason)
            decoder = "pyav"
    if decoder == "decord":
        return _read_decord(video, indices)
    return _read_torchcodec(video, indices) if decoder == "torchcodec" else video.pictures(indices)


def _difference(video: Video, decoder: Literal["decord", "torchcodec"]) -> str | None:
    """Tell for what kind of video a decoder is known not to give the frames that the others give, if this is one.

    Raises:
        DecodeError: the file has no first frame.
    """
    try:
        video.path.encode()
    except UnicodeEncodeError:
        return "a path that is not UTF-8"
    frame, codec = video.first_frame(), video.stream.codec_context
    if not all(packet.is_shown for packet in video.index.timed):
        return "frames that an edit list leaves out"
    # Without frames that are stored before those shown earlier there is little to get wrong.
    has_order_of_storage = all(packet.shown_at == packet.decoded_at for packet in video.index.timed)
    if not video.index.format.startswith(_FORMATS) and not (has_order_of_storage and video.index.format == "avi"):
        return f"the container {video.index.format}"
    if video.geometry(frame) not in BY_ANGLE:
        return "mirrored pictures, or pixels that are not square"
    if is_hdr(frame):
        return "HDR"
    if any(component.bits > 8 for component in frame.format.components):
        return "more than 8 bits a colour"
    is_odd = frame.width % 2 or frame.height % 2
    if is_odd and frame.format.name.startswith(("yuv420", "yuv422", "yuvj420", "yuvj422")):
        return "an odd width or height with halved colour planes"
    if decoder == "decord" and "av1" in codec.name:
        return "AV1"
    times = [packet.shown_at for packet in video.index.timed if packet.shown_at is not None]
    if not video.is_ordered or (codec.has_b_frames and times == sorted(times)):
        return "times that are not those of display"
    return "open groups of pictures" if _has_open_groups(video) else None


# Containers in which the others find frames as PyAV does.
_FORMATS = ("mov", "matroska", "flv", "nut")


def _has_open_groups(video: Video) -> bool:
    """Tell whether frames shown before a key frame are stored after it (others miscount after a jump to it)."""
    key_time = None
    for packet in video.index.timed:
        if packet.is_key:
            key_time = packet.shown_at
        elif key_time is not None and packet.shown_at is not None and packet.shown_at < key_time:
            return True
    return False


@functools.cache
def _note(decoder: str, reason: str) -> None:
    logger.info("%s differs from the other decoders for %s: such videos are decoded by pyav", decoder, reason)


def _read_decord(video: Video, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    import decord

    try:
        # One thread: loader workers provide the parallelism, and decord's own pool costs memory in each of them.
        reader = decord.VideoReader(file_url(video.path), ctx=decord.cpu(0), num_threads=1)
        _check_range(video.path, indices, len(reader))
        for begin in range(0, len(indices), _CHUNK):
            yield from reader.get_batch(indices[begin : begin + _CHUNK]).asnumpy()
    except DecodeError:
        raise
    except decord.DECORDError as error:
        if "DECORDArrayCopyFromTo" not in str(error):
            raise DecodeError(video.path, _first_line(error), is_partial=True) from error
        # decord 0.6 pads the rows of some narrow pictures (of 48 and 72 pixels, say) and fails at the first.
        _note("decord", "some narrow pictures")
        yield from video.pictures(indices)
    except RuntimeError as error:
        raise DecodeError(video.path, _first_line(error), is_partial=True) from error


def _read_torchcodec(video: Video, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    from torchcodec.decoders import VideoDecoder

    try:
        url = file_url(video.path)
        reader: Any = VideoDecoder(url, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        _check_range(video.path, indices, len(reader))
        for begin in range(0, len(indices), _CHUNK):
            yield from reader.get_frames_at(indices[begin : begin + _CHUNK]).data.numpy()
    except DecodeError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise DecodeError(video.path, _first_line(error), is_partial=True) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["damaged"])[0]


def _check_range(path: str, indices: list[int], num_frames: int) -> None:
    if indices[-1] >= num_frames:
        reason = f"has {num_frames} frames, frame {indices[-1]} was asked for"
        raise DecodeError(path, reason, is_partial=True)
