"""Frames of video files, by one of three decoders."""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashi2v_data import pyav
from flashi2v_data.errors import DecodeError, InputError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "decord", "pyav", "torchcodec"]
_Decoder = Literal["decord", "pyav", "torchcodec"]

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
    convert: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Read frames by their place in the order of display; places may repeat and come in any order.

    All backends give the same frames, turned as the file's display matrix says, without those that its edit list
    leaves out. Where a decoder is known to differ from the others (`_difference`), PyAV stands in, which is logged
    once for every reason. Two threads work: one decodes, the other calls `convert`.

    Args:
        path: of a regular file.
        indices: places, from 0 on.
        backend: see `resolve_backend`.
        convert: called as `convert(frame, place)` for each frame, (H, W, 3) uint8, as soon as it is decoded; it puts
            the frame into its place in `out`, cropped, resized, or in another order, so that no clip is ever held at
            full size. It needs `out`.
        out: where the result goes, of T places; the default makes a new array.

    Returns:
        (T, H, W, 3), uint8 RGB, T = len(indices); or `out`.

    Raises:
        DecodeError: the file is missing, damaged, or has no such frame.
        InputError: the backend is not installed.
    """
    name = os.fspath(path)
    positions: dict[int, list[int]] = {}
    for position, index in enumerate(indices):
        positions.setdefault(int(index), []).append(position)
    if not positions:
        raise InputError(f"{name}: no frame was asked for")
    wanted = sorted(positions)
    if wanted[0] < 0:
        raise DecodeError(name, f"there is no frame {wanted[0]}")
    pyav.check_file(name)
    size: tuple[int, ...] | None = None
    # While one frame is converted, the next is decoded: no more than two are held at full size.
    with ThreadPoolExecutor(1, "convert") as converter:
        converted: Future[None] | None = None
        for frame, index in zip(_frames(name, wanted, resolve_backend(backend)), wanted):
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
            converted = converter.submit(_place, frame, out, positions[index], convert)
        if converted is not None:
            converted.result()
    assert out is not None
    return out


def _place(
    frame: NDArray[np.uint8],
    out: NDArray[np.uint8],
    positions: list[int],
    convert: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None] | None,
) -> None:
    first, *others = positions
    if convert is None:
        out[first] = frame
    else:
        convert(frame, out[first])
    for position in others:
        out[position] = out[first]


def _frames(path: str, indices: list[int], decoder: _Decoder) -> Iterator[NDArray[np.uint8]]:
    if decoder != "pyav":
        reason = _difference(path, decoder)
        if reason is not None:
            _note(decoder, reason)
            decoder = "pyav"
    if decoder == "decord":
        return _read_decord(path, indices)
    return _read_torchcodec(path, indices) if decoder == "torchcodec" else pyav.read(path, indices)


def _difference(path: str, decoder: Literal["decord", "torchcodec"]) -> str | None:
    """Tell for what kind of video a decoder is known not to give the frames that the others give, if this is one.

    Raises:
        DecodeError: the file cannot be opened.
    """
    import av

    try:
        path.encode()
    except UnicodeEncodeError:
        return "a path that is not UTF-8"
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise DecodeError(path, "has no video stream")
            codec, pixels, kind = stream.codec_context.name, stream.codec_context.format, container.format.name
            odd = stream.width % 2 or stream.height % 2
            edited = any(entry.is_discard for entry in stream.index_entries)
            open_groups = decoder == "decord" and _has_open_groups(container.demux(stream))
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    if edited:
        return "frames that an edit list leaves out"
    if not kind.startswith(("mov", "matroska")):
        return f"the container {kind}"
    if pixels is None or any(component.bits > 8 for component in pixels.components):
        return "more than 8 bits a colour"
    if odd and pixels.name.startswith(("yuv420", "yuv422", "yuvj420", "yuvj422")):
        return "an odd width or height with halved colour planes"
    if decoder == "decord" and "av1" in codec:
        return "AV1"
    return "open groups of pictures" if open_groups else None


def _has_open_groups(packets: Iterable[Any]) -> bool:
    """Tell whether frames shown before a key frame are stored after it (decord then miscounts after a jump)."""
    key_time = None
    for packet in packets:
        if packet.is_keyframe:
            key_time = packet.pts
        elif key_time is not None and packet.pts is not None and packet.pts < key_time:
            return True
    return False


@functools.cache
def _note(decoder: str, reason: str) -> None:
    logger.info("%s differs from the other decoders for %s: such videos are decoded by pyav", decoder, reason)


def _read_decord(path: str, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    import decord

    try:
        # One thread: loader workers provide the parallelism, and decord's own pool costs memory in each of them.
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        _check_range(path, indices, len(reader))
        for begin in range(0, len(indices), _CHUNK):
            yield from reader.get_batch(indices[begin : begin + _CHUNK]).asnumpy()
    except DecodeError:
        raise
    except decord.DECORDError as error:
        if "DECORDArrayCopyFromTo" not in str(error):
            raise DecodeError(path, _first_line(error), is_partial=True) from error
        # decord 0.6 pads the rows of some narrow pictures (of 48 and 72 pixels, say) and fails at the first.
        _note("decord", "some narrow pictures")
        yield from pyav.read(path, indices)
    except RuntimeError as error:
        raise DecodeError(path, _first_line(error), is_partial=True) from error


def _read_torchcodec(path: str, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    from torchcodec.decoders import VideoDecoder

    try:
        reader: Any = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        _check_range(path, indices, len(reader))
        for begin in range(0, len(indices), _CHUNK):
            yield from reader.get_frames_at(indices[begin : begin + _CHUNK]).data.numpy()
    except DecodeError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise DecodeError(path, _first_line(error), is_partial=True) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["damaged"])[0]


def _check_range(path: str, indices: list[int], num_frames: int) -> None:
    if indices[-1] >= num_frames:
        reason = f"has {num_frames} frames, frame {indices[-1]} was asked for"
        raise DecodeError(path, reason, is_partial=True)
