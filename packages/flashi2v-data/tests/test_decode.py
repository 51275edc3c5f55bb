import functools
import itertools
import logging
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.video import decode, pyav
from flashi2v_data.video.decode import read_frames, resolve_backend
from flashi2v_data.video.probe import VideoInfo, probe
from flashi2v_data.video.write import write_video

NUM_FRAMES = 300


def _missing(backend: Any) -> str:
    """Why a decoder cannot be tested here, or an empty text."""
    try:
        resolve_backend(backend)
    except InputError as error:
        return str(error)
    return ""


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(_missing(name)), reason=_missing(name) or "-"))
    for name in ("decord", "torchcodec", "pyav")
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """H.264 with B frames and several key frames; frame i shows its number in 9 stripes, as bits."""
    frames = np.zeros((NUM_FRAMES, 36, 72, 3), dtype=np.uint8)
    for number in range(NUM_FRAMES):
        for bit in range(9):
            frames[number, :, 8 * bit : 8 * bit + 8] = 255 * (number >> bit & 1)
    path = tmp_path_factory.mktemp("decode") / "clip.mp4"
    write_video(path, frames, 24)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert any(packet.pts != packet.dts for packet in packets), "the clip should have B frames"
    assert sum(packet.is_keyframe for packet in packets) > 1, "the clip should have several key frames"
    return path


def _numbers(frames) -> list[int]:
    bits = frames[:, 18, 4::8].mean(axis=-1) > 128
    return (bits * 2 ** np.arange(9)).sum(axis=1).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "indices", [[0], [299], [5, 3, 290, 3, 3, 0], list(range(0, 300, 37)), np.arange(250, 260)], ids=str
)
def test_frames_are_the_ones_asked_for_in_any_order(clip, backend, indices):
    frames = read_frames(clip, indices, backend)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), 36, 72, 3)
    assert _numbers(frames) == list(indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_beyond_the_end_is_a_decode_error(clip, backend):
    with pytest.raises(DecodeError, match="has 300 frames, frame 300 was asked for"):
        read_frames(clip, [0, 300], backend)
    with pytest.raises(DecodeError, match="there is no frame -1"):
        read_frames(clip, [-1], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "holes"])
def test_unreadable_files_are_decode_errors_that_name_the_file(clip, tmp_path, backend, damage):
    data = clip.read_bytes()
    path = tmp_path / "bad.mp4"
    if damage != "missing":
        holes = data[:9000] + bytes(len(data) - 9000)
        path.write_bytes(
            {"empty": b"", "text": b"no video" * 99, "truncated": data[: len(data) // 2], "holes": holes}[damage]
        )
    with pytest.raises(DecodeError) as caught:
        read_frames(path, range(NUM_FRAMES), backend)
    assert caught.value.path == str(path)
    assert "\n" not in str(caught.value)


def test_a_sound_file_has_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for read in (lambda: probe(path), lambda: read_frames(path, [0], "pyav")):
        with pytest.raises(DecodeError, match="has no video stream"):
            read()


def test_probe_counts_frames_where_the_header_does_not(tmp_path, clip):
    path = tmp_path / "copy.mkv"  # Matroska has no frame count
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert probe(path) == probe(clip) == VideoInfo(36, 72, 24.0, NUM_FRAMES)


# ---- kinds of video ------------------------------------------------------------------------------------------------

X264, X265, VP9 = "libx264", "libx265", "libvpx-vp9"


def _x264(options: str) -> dict[str, str]:
    return {"x264-params": f"scenecut=0:b-adapt=0:{options}"}


def _x265(options: str) -> dict[str, str]:
    return {"x265-params": f"log-level=none:scenecut=0:pools=1:{options}"}


VP9_FAST = {"g": "12", "cpu-used": "8", "lag-in-frames": "8"}
JITTER = np.cumsum(np.random.default_rng(5).integers(3, 40, 60)).tolist()

# name -> arguments of _write
KINDS: dict[str, dict[str, Any]] = {
    "h264 with b frames.mp4": {"options": _x264("keyint=12:bframes=3")},
    "h264 with b frames.mkv": {"options": _x264("keyint=12:bframes=3")},
    "long group.mp4": {"options": _x264("keyint=250:bframes=3")},
    "open groups.mp4": {"options": _x264("keyint=16:min-keyint=16:bframes=3:open-gop=1")},
    "hevc.mp4": {"codec": X265, "options": _x265("keyint=16:bframes=3:open-gop=0")},
    "hevc with open groups.mp4": {"codec": X265, "options": _x265("keyint=16:min-keyint=16:bframes=4:open-gop=1")},
    "hevc of 10 bits.mp4": {"codec": X265, "pixels": "yuv420p10le", "options": _x265("keyint=16")},
    "vp9.webm": {"codec": VP9, "options": VP9_FAST},
    "vp9.mp4": {"codec": VP9, "options": VP9_FAST},
    "variable rate.mp4": {"times": JITTER, "options": _x264("keyint=12:bframes=3")},
    "variable rate.mkv": {"times": JITTER, "options": _x264("keyint=12:bframes=3")},
    "odd size.mp4": {"size": (47, 63), "pixels": "yuv444p", "options": _x264("keyint=12")},
    "odd size with halved colours.webm": {"size": (47, 63), "codec": VP9, "options": VP9_FAST},
    "narrow.mp4": {"size": (48, 72), "options": _x264("keyint=12")},
    "late start.mp4": {"times": range(777, 1377, 10), "options": _x264("keyint=12:bframes=2")},
    "late start.mkv": {"times": range(777, 1377, 10), "options": _x264("keyint=12:bframes=2")},
    "transport stream.ts": {"times": range(777, 1377, 10), "options": _x264("keyint=12:bframes=2")},
    "edit list.mp4": {"times": range(-100, 500, 10), "options": _x264("keyint=12:bframes=2")},
    "fragments.mp4": {"options": _x264("keyint=12:bframes=2"), "container": {"movflags": "frag_keyframe+empty_moov"}},
    "full range.mp4": {"pixels": "yuvj420p", "options": _x264("keyint=12")},
    "without times.h264": {"options": _x264("keyint=12:bframes=3")},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "one frame.mp4": {"num_frames": 1},
    "turned by 90.mp4": {"turn": 90, "options": _x264("keyint=12")},
    "turned by 180.mp4": {"turn": 180, "options": _x264("keyint=12")},
    "turned by 270.mp4": {"turn": 270, "size": (64, 128), "options": _x264("keyint=12")},
}


@functools.cache
def _scene(height: int, width: int) -> np.ndarray:
    """A smooth texture that moves by 2 pixels a frame."""
    noise = np.random.default_rng(3).uniform(0, 255, (height + 4, width + 124, 3))
    smooth = sum(noise[dy : dy + height, dx : dx + width + 120] for dy in range(5) for dx in range(5)) / 25
    smooth = np.clip(4 * (smooth - 127.5) + 127.5, 0, 255).astype(np.uint8)
    return np.stack([smooth[:, 2 * t : 2 * t + width] for t in range(60)])


def _write(
    path: Path,
    *,
    codec: str = X264,
    size: tuple[int, int] = (48, 64),
    pixels: str = "yuv420p",
    num_frames: int = 60,
    times: Any = None,
    turn: int = 0,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> None:
    height, width = size
    with av.open(str(path), "w", options=container or {}) as target:
        stream = target.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        stream.codec_context.time_base = Fraction(1, 240)
        for number, image in enumerate(_scene(height, width)[:num_frames]):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (times or range(0, 600, 10))[number], Fraction(1, 240)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    if turn:
        # The display matrix of a phone's mp4 is in the track header: 16.16 fixed point, the last column 2.30.
        data = bytearray(path.read_bytes())
        plain = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
        at = data.index(plain, data.index(b"tkhd"))
        cos, sin = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[turn]
        turned = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
        data[at : at + 36] = struct.pack(">9i", *turned)
        path.write_bytes(data)


@functools.cache
def _played(path: Path) -> np.ndarray:
    """All frames, decoded from the first to the last without seeking, turned."""
    with av.open(str(path)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.rotation) for frame in container.decode(video=0)]
    return np.stack([np.rot90(image, turn // 90) for image, turn in frames])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kinds")
    for name, arguments in KINDS.items():
        _write(directory / name, **arguments)
    return directory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KINDS)
def test_every_backend_gives_the_frames_that_a_player_shows(kinds, name, backend):
    path = kinds / name
    expected = _played(path)
    count = len(expected)
    choices = [range(count), range(0, count, 7), range(count // 2, count), [count - 1, 0, count // 3, 0]]
    for places in [*choices, *([place] for place in range(0, count, 5))]:
        frames = read_frames(path, list(places), backend)
        assert frames.shape == (len(places), *expected.shape[1:])
        wrong = [p for p, frame in zip(places, frames) if not np.array_equal(frame, expected[p])]
        assert not wrong, f"frames {wrong} of {list(places)[:8]}"


@pytest.mark.parametrize("name", KINDS)
def test_the_probe_counts_and_measures_the_frames_that_a_player_shows(kinds, name):
    expected = _played(kinds / name)
    info = probe(kinds / name)
    assert (info.num_frames, info.height, info.width) == expected.shape[:3]


def test_the_kinds_of_video_are_what_their_names_say(kinds):
    def packets(name):
        with av.open(str(kinds / name)) as container:
            return [packet for packet in container.demux(video=0) if packet.size]

    for name in ("open groups.mp4", "hevc with open groups.mp4"):
        assert decode._has_open_groups(pyav.Video(str(kinds / name))), name
    assert not decode._has_open_groups(pyav.Video(str(kinds / "hevc.mp4")))
    assert any(packet.is_discard for packet in packets("edit list.mp4"))
    assert len(_played(kinds / "edit list.mp4")) == 50
    assert sum(packet.is_keyframe for packet in packets("long group.mp4")) == 1
    assert any(packet.pts is None for packet in packets("without times.h264"))
    assert len({b.pts - a.pts for a, b in zip(packets("variable rate.mp4"), packets("variable rate.mp4")[1:])}) > 10
    assert _played(kinds / "turned by 90.mp4").shape == (60, 64, 48, 3)
    upright, turned = _scene(48, 64)[0].mean(axis=-1), _played(kinds / "turned by 90.mp4")[0].mean(axis=-1)
    assert np.abs(turned - np.rot90(upright)).mean() < 0.3 * np.abs(turned - np.rot90(upright, -1)).mean()


@pytest.mark.parametrize(
    ("name", "places", "most"),
    [
        ("h264 with b frames.mp4", [55], 16),  # one group of 12, and what its decoder reads ahead
        ("h264 with b frames.mkv", [55], 16),
        ("vp9.webm", [59], 14),
        ("h264 with b frames.mp4", [1, 55], 30),
        ("h264 with b frames.mp4", range(20, 40), 32),
        ("long group.mp4", [5], 12),
    ],
)
def test_no_more_is_decoded_than_the_key_frames_ask_for(kinds, monkeypatch, name, places, most):
    decoded = []
    original = pyav.Video._decode

    def counting(self, packets):
        for frame in original(self, packets):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(pyav.Video, "_decode", counting)
    read_frames(kinds / name, list(places), "pyav")
    assert len(decoded) <= most


def test_an_mp4_is_not_read_through_to_find_a_frame(kinds):
    """The index says where a frame lies: what comes after it may as well be missing."""
    path = kinds / "h264 with b frames.mp4"
    data = path.read_bytes()
    with av.open(str(path)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    assert data.index(b"moov") > positions[-1]
    middle, end = positions[40], data.index(b"moov") - 4
    holes = kinds / "holes.mp4"
    holes.write_bytes(data[:middle] + b"\xff" * (end - middle) + data[end:])
    assert np.array_equal(read_frames(holes, range(12)), _played(path)[:12])
    with pytest.raises(DecodeError):
        read_frames(holes, [45])


def test_where_a_decoder_differs_pyav_stands_in_and_says_why_once(kinds, caplog, monkeypatch):
    monkeypatch.setattr(decode, "resolve_backend", lambda backend: backend)  # the check itself needs no decord
    caplog.set_level(logging.INFO)
    decode._note.cache_clear()
    expected = {
        "edit list.mp4": "frames that an edit list leaves out",
        "hevc of 10 bits.mp4": "more than 8 bits a colour",
        "odd size with halved colours.webm": "an odd width or height with halved colour planes",
        "open groups.mp4": "open groups of pictures",
        "transport stream.ts": "the container mpegts",
    }
    for name in (*expected, *expected):
        read_frames(kinds / name, [3, 12], "decord")
    assert caplog.messages == [
        f"decord differs from the other decoders for {reason}: such videos are decoded by pyav"
        for reason in expected.values()
    ]


# ---- files that are no video ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, backend):
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    (tmp_path / "folder.mp4").mkdir()
    for name, reason in (("pipe.mp4", "is not a regular file"), ("folder.mp4", "is a directory")):
        with pytest.raises(DecodeError, match=reason):
            read_frames(tmp_path / name, [0], backend)
    with pytest.raises(DecodeError, match="null"):
        read_frames("a\0b.mp4", [0], backend)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_path_need_not_be_unicode(clip, tmp_path, backend):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 \xff.mp4")
    Path(path).write_bytes(clip.read_bytes())
    assert _numbers(read_frames(path, [7, 299], backend)) == [7, 299]


def test_frames_are_converted_as_they_are_decoded(kinds):
    path = kinds / "vp9.mp4"
    out = np.empty((3, 24, 64, 3), np.uint8)
    result = read_frames(path, [5, 1, 5], convert=lambda frame, place: np.copyto(place, frame[::2]), out=out)
    assert result is out
    assert np.array_equal(out, _played(path)[[5, 1, 5], ::2])


@pytest.mark.parametrize("number", [0, 4])
def test_a_fault_of_the_conversion_is_the_callers_to_see(kinds, number):
    def convert(frame, place):
        if next(calls) == number:
            raise ZeroDivisionError

    calls = itertools.count()
    out = np.empty((5, 1), np.uint8)
    with pytest.raises(ZeroDivisionError):
        read_frames(kinds / "vp9.mp4", range(5), convert=convert, out=out)
    assert next(calls) == number + 1  # nothing is converted after it


def test_auto_is_pyav_and_what_is_missing_says_how_to_get_it(monkeypatch):
    assert resolve_backend("auto") == "pyav"
    for name in ("decord", "torchcodec"):
        monkeypatch.setitem(sys.modules, name, None)
        resolve_backend.cache_clear()
        with pytest.raises(InputError, match=rf"pip install 'flashi2v-data\[{name}\]'"):
            resolve_backend(name)
    with pytest.raises(InputError, match="choose auto, decord, pyav or torchcodec"):
        resolve_backend("ffmpeg")


def test_a_decoder_that_cannot_be_loaded_says_what_it_needs(monkeypatch, tmp_path):
    (tmp_path / "torchcodec.py").write_text("raise RuntimeError('Could not load libtorchcodec.\\nLong story.')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    resolve_backend.cache_clear()
    with pytest.raises(InputError, match=r"cannot be loaded: Could not load libtorchcodec\.; it needs .* FFmpeg"):
        resolve_backend("torchcodec")


@pytest.fixture(autouse=True)
def _fresh_backend_choice():
    resolve_backend.cache_clear()
    yield
    resolve_backend.cache_clear()


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    path = tmp_path / "A.PNG"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(read_frames(path, [0]), pixels[None])
    out = np.empty((1, 3, 20, 30), np.uint8)
    read_frames(path, [0], convert=lambda frame, place: np.copyto(place, frame.transpose(2, 0, 1)), out=out)
    assert np.array_equal(out[0], pixels.transpose(2, 0, 1))
    assert probe(path)[:4] == (20, 30, 24.0, 1)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned)
    assert read_frames(tmp_path / "turned.jpg", [0]).shape == (1, 30, 20, 3)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_frames(tmp_path / "clear.png", [0]).min() == 255
    with pytest.raises(DecodeError, match="has 1 frames, frame 1 was asked for"):
        read_frames(path, [1])
    Image.fromarray(np.full((4, 4), 0x8181, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(read_frames(tmp_path / "deep.png", [0])) == [0x81]
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(DecodeError, match="more than 8 bits"):
        read_frames(tmp_path / "deep.tif", [0])
    still = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moves.webp", "moves.png", "pages.tif"):
        still[0].save(tmp_path / name, save_all=True, append_images=still[1:])
        for read in (probe, lambda moving: read_frames(moving, [0])):
            with pytest.raises(DecodeError, match="holds several pictures: save it as a video"):
                read(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(DecodeError, match="is no image that can be read"):
        read_frames(tmp_path / "broken.png", [0])
    (tmp_path / "vector.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(DecodeError, match="is no image that can be read"):
        read_frames(tmp_path / "vector.png", [0])
