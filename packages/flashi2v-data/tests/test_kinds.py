"""Kinds of video files: every frame alone, and clips from every start, are those that the `ffmpeg` command decodes."""

import itertools
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flashi2v_data.errors import InputError
from flashi2v_data.video.decode import read_frames, resolve_backend
from flashi2v_data.video.probe import probe

HEIGHT, WIDTH, NUM_FRAMES, LENGTH = 64, 96, 30, 9
EVEN = [10 * number for number in range(NUM_FRAMES)]
# In ticks of 1/240 s: one rate for half a second, then a third of it.
UNEVEN = EVEN[:15] + [150 + 30 * number for number in range(15)]
# A start before 0 becomes an edit list of mp4.
EARLY = [time - 80 for time in EVEN]


def _x264(num_b_frames: int, *, is_open: bool = False, more: str = "") -> dict[str, str]:
    common = "scenecut=0:b-adapt=0:keyint=8:min-keyint=8:threads=1"
    return {"x264-params": f"{common}:bframes={num_b_frames}:open-gop={int(is_open)}{more}"}


def _x265(num_b_frames: int, *, is_open: bool = False) -> dict[str, str]:
    common = "log-level=none:pools=1:frame-threads=1:scenecut=0:b-adapt=0:keyint=8:min-keyint=8"
    return {"preset": "ultrafast", "x265-params": f"{common}:bframes={num_b_frames}:open-gop={int(is_open)}"}


MPEG_B = {"g": "8", "bf": "2", "qmin": "2", "qmax": "3"}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264 b": ("libx264", "yuv420p", _x264(3)),
    "h264 open": ("libx264", "yuv420p", _x264(3, is_open=True)),
    "h264 p": ("libx264", "yuv420p", _x264(0)),
    "h264 10 bits": ("libx264", "yuv420p10le", _x264(3)),
    "h264 444": ("libx264", "yuv444p", _x264(3)),
    "h264 refresh": ("libx264", "yuv420p", _x264(0, more=":intra-refresh=1")),
    "hevc b": ("libx265", "yuv420p", _x265(3)),
    "hevc open": ("libx265", "yuv420p", _x265(3, is_open=True)),
    "hevc 10 bits": ("libx265", "yuv420p10le", _x265(3)),
    "mpeg2 b": ("mpeg2video", "yuv420p", MPEG_B),
    "mpeg2 closed": ("mpeg2video", "yuv420p", MPEG_B | {"flags": "+cgop", "sc_threshold": "1000000000"}),
    "mpeg1 b": ("mpeg1video", "yuv420p", MPEG_B),
    "mpeg4 b": ("mpeg4", "yuv420p", MPEG_B),
    "mpeg4 p": ("mpeg4", "yuv420p", MPEG_B | {"bf": "0"}),
    "vp8": ("libvpx", "yuv420p", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
    "vp8 hidden": ("libvpx", "yuv420p", {"g": "16", "auto-alt-ref": "1", "lag-in-frames": "10", "b": "200k"}),
    "vp9": ("libvpx-vp9", "yuv420p", {"g": "8", "cpu-used": "8", "lag-in-frames": "8"}),
    "mjpeg": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2"}),
    "ffv1": ("ffv1", "yuv420p", {}),
    "prores": ("prores_ks", "yuv422p10le", {}),
    "wmv2": ("wmv2", "yuv420p", {"g": "8", "qmin": "2", "qmax": "2"}),
    "flv1": ("flv1", "yuv420p", {"g": "8", "qmin": "2", "qmax": "2"}),
}


def _encode(codec: str, times: list[int] = EVEN, **container: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        name, pixels, options = CODECS[codec]
        with av.open(str(path), "w", options=container) as file:
            stream = file.add_stream(name, rate=24, options=options)
            stream.height, stream.width, stream.pix_fmt, stream.thread_count = HEIGHT, WIDTH, pixels, 1
            is_coarse = path.suffix == ".avi" or "mpeg" in name or name == "mjpeg"
            stream.codec_context.time_base = Fraction(1, 24 if is_coarse else 240)
            for number, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(_numbered(number), format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 240)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())

    return write


def _as_from_avi(codec: str) -> Callable[[Path], None]:
    """With the order of storage as that of display, as copies from AVI have it."""

    def write(path: Path) -> None:
        source = path.with_name(f"source of {path.name}.mp4")
        _encode(codec)(source)
        with av.open(str(source)) as read, av.open(str(path), "w") as file:
            stream = file.add_stream_from_template(read.streams.video[0])
            packets = [packet for packet in read.demux(video=0) if packet.size]
            first = packets[0].dts
            for packet in packets:
                packet.pts = packet.dts = packet.dts - first
                packet.stream = stream
                file.mux(packet)
        source.unlink()

    return write


def _cut(codec: str, begin: float, unit: int) -> Callable[[Path], None]:
    """Without its beginning, as a recording that was switched on at some time."""

    def write(path: Path) -> None:
        _encode(codec)(path)
        data = path.read_bytes()
        path.write_bytes(data[int(len(data) * begin) // unit * unit :])

    return write


def _twice(codec: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        _encode(codec)(path)
        path.write_bytes(2 * path.read_bytes())

    return write


FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
KINDS: dict[str, Callable[[Path], None]] = {
    **{f"h264 b.{end}": _encode("h264 b") for end in ("mp4", "mov", "mkv", "avi", "ts", "flv", "nut", "3gp", "h264")},
    **{f"h264 open.{end}": _encode("h264 open") for end in ("mp4", "mkv", "avi", "ts")},
    **{f"h264 p.{end}": _encode("h264 p") for end in ("mp4", "mkv", "avi", "ts")},
    **{f"{codec}.mp4": _encode(codec) for codec in ("h264 10 bits", "h264 444", "hevc b", "hevc open", "hevc 10 bits")},
    **{f"hevc b.{end}": _encode("hevc b") for end in ("mkv", "ts", "hevc")},
    **{f"hevc open.{end}": _encode("hevc open") for end in ("mkv", "ts")},
    **{f"mpeg2 b.{end}": _encode("mpeg2 b") for end in ("mpg", "vob", "ts", "avi", "mkv", "m2v")},
    "mpeg2 closed.mpg": _encode("mpeg2 closed"),
    "mpeg1 b.mpg": _encode("mpeg1 b"),
    **{f"mpeg4 b.{end}": _encode("mpeg4 b") for end in ("avi", "mp4", "mkv")},
    "mpeg4 p.avi": _encode("mpeg4 p"),
    **{f"{codec}.webm": _encode(codec) for codec in ("vp8", "vp8 hidden", "vp9")},
    "vp9.mp4": _encode("vp9"),
    **{f"mjpeg.{end}": _encode("mjpeg") for end in ("avi", "mov")},
    "ffv1.mkv": _encode("ffv1"),
    "prores.mov": _encode("prores"),
    "wmv2.wmv": _encode("wmv2"),
    "flv1.flv": _encode("flv1"),
    "fragments.mp4": _encode("h264 b", **FRAGMENTS),
    "fragments, open.mp4": _encode("h264 open", **FRAGMENTS),
    "a fragment for each frame.mp4": _encode("h264 b", movflags="frag_every_frame+empty_moov+default_base_moof"),
    "edit list.mp4": _encode("h264 b", EARLY),
    "edit list, open.mp4": _encode("h264 open", EARLY),
    **{f"uneven.{end}": _encode("h264 b", UNEVEN) for end in ("mp4", "mkv", "avi", "ts", "flv")},
    **{f"from avi, {codec}.{end}": _as_from_avi(codec) for codec in ("h264 b", "h264 open") for end in ("mp4", "mkv")},
    "from avi, mpeg4 b.mp4": _as_from_avi("mpeg4 b"),
    "cut, h264 b.ts": _cut("h264 b", 0.4, 188),
    "cut, h264 open.ts": _cut("h264 open", 0.4, 188),
    "cut, h264 refresh.ts": _cut("h264 refresh", 0.4, 188),
    "cut, mpeg2 b.ts": _cut("mpeg2 b", 0.4, 188),
    "cut, mpeg2 b.mpg": _cut("mpeg2 b", 0.4, 2048),
    "two in one.ts": _twice("h264 b"),
    "two in one.mpg": _twice("mpeg2 b"),
}


def _numbered(number: int) -> np.ndarray:
    """A picture whose columns are the bits of its number."""
    bits = np.array([(number >> bit & 1) * 200 + 28 for bit in range(8)], np.uint8)
    return np.broadcast_to(np.repeat(bits, WIDTH // 8)[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def _numbers(pictures: Iterable[np.ndarray]) -> list[int]:
    columns = [picture.reshape(HEIGHT, 8, -1).mean((0, 2)) > 128 for picture in pictures]
    return [sum(1 << bit for bit in range(8) if column[bit]) for column in columns]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A directory of all kinds of files."""
    found = tmp_path_factory.mktemp("kinds")
    for name, write in KINDS.items():
        write(found / name)
    return found


@pytest.fixture(scope="module")
def played(directory) -> dict[str, list[int]]:
    """The numbers on the pictures of each file, in the order in which they are decoded from its start."""
    if shutil.which("ffmpeg") is None:
        warnings.warn("no ffmpeg command here: compared with PyAV's plain decoding", stacklevel=1)
        return {name: _decoded(directory / name) for name in KINDS}
    inputs: Any = (("-i", directory / name) for name in KINDS)
    outputs: Any = (
        (
            "-map",
            f"{place}:v:0",
            "-fps_mode",
            "passthrough",
            "-pix_fmt",
            "gray",
            "-f",
            "rawvideo",
            directory / f"{name}.y",
        )
        for place, name in enumerate(KINDS)
    )
    # One process for all. Warnings of files that begin in mid-group say nothing here.
    command = ["ffmpeg", "-v", "fatal", "-nostdin", *itertools.chain(*inputs), *itertools.chain(*outputs)]
    subprocess.run(command, check=True)
    frames = {name: np.fromfile(directory / f"{name}.y", np.uint8).reshape(-1, HEIGHT, WIDTH) for name in KINDS}
    return {name: _numbers(pictures) for name, pictures in frames.items()}


def _decoded(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return _numbers(frame.to_ndarray(format="gray") for frame in container.decode(video=0))


def test_the_kinds_hold_what_their_names_say(played):
    assert len(KINDS) >= 60
    whole = {name for name in KINDS if "cut" not in name and "two" not in name and "edit" not in name}
    assert {name for name in whole if played[name] != [*range(NUM_FRAMES)]} == set()
    assert all(played[name] == 2 * [*range(NUM_FRAMES)] for name in KINDS if "two" in name)
    assert all(0 < len(played[name]) < NUM_FRAMES for name in KINDS if "cut" in name or "edit" in name)


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_and_every_clip_is_what_a_player_shows(directory, played, name):
    path, numbers = directory / name, played[name]
    count = len(numbers)
    wrong = {}
    for begin, length in [(0, count), *((start, size) for start in range(count) for size in (1, LENGTH))]:
        asked = [*range(begin, min(begin + length, count))]
        got = _numbers(read_frames(path, asked))
        if got != [numbers[place] for place in asked]:
            wrong[begin, length] = got
    assert wrong == {}
    assert probe(path).num_frames == count


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_every_decoder_gives_the_same(directory, played, backend):
    try:
        resolve_backend(backend)
    except InputError as error:
        pytest.skip(str(error))
    wrong = []
    for name, numbers in played.items():
        count = len(numbers)
        for asked in (range(count), range(count // 2, count), *([place] for place in range(1, count, 6))):
            got = _numbers(read_frames(directory / name, asked, backend))
            if got != [numbers[place] for place in asked]:
                wrong.append((name, asked, got))
    assert wrong == []


@pytest.mark.parametrize("name", KINDS)
def test_rates_are_frames_over_duration(directory, name):
    info = probe(directory / name)
    is_uneven = name.startswith("uneven")
    assert info.is_irregular == is_uneven
    # AVI and raw streams bear no exact times, and FFmpeg takes the latter for 25 a second.
    expected = 29 / (570 / 240) if is_uneven else 24
    assert info.fps == pytest.approx(expected, rel=0.1 if name.endswith((".avi", ".hevc", ".m2v", ".h264")) else 0.01)
