"""Frames of video files."""

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flashi2v_data.errors import DecodeError, InputError

logger = logging.getLogger(__name__)

Backend = Literal["auto", "decord", "pyav"]


@functools.cache
def resolve_backend(backend: Backend) -> Literal["decord", "pyav"]:
    """Return the backend that serves `backend`; "auto" is decord where installed, else PyAV.

    Raises:
        InputError: an unknown backend, or decord asked for by name and not installed.
    """
    installed = importlib.util.find_spec("decord") is not None
    if backend == "auto":
        chosen: Literal["decord", "pyav"] = "decord" if installed else "pyav"
        logger.info("videos are decoded by %s", chosen)
        return chosen
    if backend == "decord" and not installed:
        raise InputError("decoder decord is not installed: pip install 'flashi2v-data[decord]', or choose pyav")
    if backend not in ("decord", "pyav"):
        raise InputError(f"unknown decoder {backend!r}: choose auto, decord or pyav")
    return backend


def read_frames(
    path: str | os.PathLike[str], indices: Sequence[int] | NDArray[np.integer], backend: Backend = "auto"
) -> NDArray[np.uint8]:
    """Read frames by their position in the order of display; positions may repeat and come in any order.

    Returns:
        (T, H, W, 3), uint8 RGB, T = len(indices).

    Raises:
        DecodeError: the file is missing, damaged, or has no such frame.
        InputError: the backend is not installed.
    """
    name = os.fspath(path)
    wanted = [int(index) for index in indices]
    if not wanted:
        raise InputError(f"{name}: no frame was asked for")
    if min(wanted) < 0:
        raise DecodeError(name, f"there is no frame {min(wanted)}")
    if resolve_backend(backend) == "decord":
        return _read_decord(name, wanted)
    return _read_pyav(name, wanted)


def _read_decord(path: str, indices: list[int]) -> NDArray[np.uint8]:
    import decord

    # decord reports a missing file as it does a damaged one.
    if not os.path.isfile(path):
        raise DecodeError(path, "no such file")
    try:
        # One thread: loader workers provide the parallelism, and decord's own pool costs memory in each of them.
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        _check_range(path, indices, len(reader))
        frames: NDArray[np.uint8] = reader.get_batch(indices).asnumpy()
    except DecodeError:
        raise
    except (RuntimeError, decord.DECORDError) as error:
        if "DECORDArrayCopyFromTo" in str(error):
            # decord 0.6 takes the rows of some narrow pictures (48 and 72 pixels) for four channels wide.
            _note_width()
            return _read_pyav(path, indices)
        lines = str(error).strip().splitlines()
        raise DecodeError(path, lines[0] if lines else "damaged") from error
    return frames


@functools.cache
def _note_width() -> None:
    logger.info("decord cannot copy frames of this width: they are decoded by pyav, which gives the same frames")


def _read_pyav(path: str, indices: list[int]) -> NDArray[np.uint8]:
    import av

    wanted = set(indices)
    found: dict[int, NDArray[np.uint8]] = {}
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise DecodeError(path, "has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # as above
            # Packets are stored in decoding order; sorted by presentation time, their rank is the frame's index.
            times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
            _check_range(path, indices, len(times))
            index_of = {time: index for index, time in enumerate(times)}
            # Seeking lands on the last key frame at or before the first frame that is wanted.
            container.seek(times[min(wanted)], stream=stream)
            for frame in container.decode(stream):
                index = index_of.get(frame.pts)
                if index in wanted:
                    found[index] = frame.to_ndarray(format="rgb24")
                    if len(found) == len(wanted):
                        break
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(path, error.strerror or str(error)) from error
    missing = wanted - found.keys()
    if missing:
        raise DecodeError(path, f"frame {min(missing)} cannot be decoded")
    return np.stack([found[index] for index in indices])


def _check_range(path: str, indices: list[int], num_frames: int) -> None:
    if max(indices) >= num_frames:
        raise DecodeError(path, f"has {num_frames} frames, frame {max(indices)} was asked for")
