"""Orientation, shape of pixels, time and HDR: from files to pictures."""

import logging
import os
import socket
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from flashi2v_data.errors import DecodeError
from flashi2v_data.video import pyav
from flashi2v_data.video.decode import read_frames
from flashi2v_data.video.frames import Moments, frames_at, is_irregular
from flashi2v_data.video.probe import probe
from flashi2v_data.video.write import write_video

SCENE = np.full((8, 64, 96, 3), 30, np.uint8)
SCENE[:, :32, :48], SCENE[:, :32, 48:], SCENE[:, 32:, :48] = (220, 40, 40), (40, 200, 40), (40, 40, 220)

# a, b, c, d of the display matrix, and what it does to a picture.
ORIENTATIONS = {
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda p: p[::-1]),
    "by 180 degrees": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "by a quarter to the right": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "by a quarter to the left": ((0, -1, 1, 0), lambda p: np.rot90(p)),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
}


def _turn(path, matrix) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16
    a, b, c, d = (number << 16 for number in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def _encode(path, frames, *, ratio=None, times=None, codec="libx264", pixels="yuv420p", rate=16, **options) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pixels
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        for number, frame in enumerate(frames):
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _frames(pictures) -> list[av.VideoFrame]:
    return [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_all_eight_orientations_come_out_upright(tmp_path, name, backend):
    pytest.importorskip(backend if backend != "pyav" else "av")
    matrix, turned = ORIENTATIONS[name]
    path = tmp_path / "a.mp4"
    write_video(path, SCENE, 16)
    plain = read_frames(path, [3])[0]
    _turn(path, matrix)
    picture = read_frames(path, [3], backend)[0]
    assert np.array_equal(picture, turned(plain))
    assert probe(path)[:2] == picture.shape[:2]


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_pixels_become_squares_unless_the_reference_is_wanted(tmp_path, backend):
    pytest.importorskip(backend if backend != "pyav" else "av")
    path = tmp_path / "a.mp4"
    _encode(path, _frames(SCENE), ratio=Fraction(64, 45), crf="10")
    picture, stored = read_frames(path, [3], backend)[0], read_frames(path, [3], backend, geometry="reference")[0]
    info = probe(path)
    assert picture.shape == (64, 137, 3)
    assert info.size("upright") == (64, 137)
    assert stored.shape == (64, 96, 3)
    assert info.size("reference") == (64, 96)
    expected = stored[:, (np.arange(137) * 96 / 137).astype(int)].astype(int)
    assert np.abs(picture - expected).mean() < 4
    _turn(path, (0, 1, -1, 0))
    assert read_frames(path, [3], backend).shape == (1, 137, 64, 3)
    assert read_frames(path, [3], backend, geometry="reference").shape == (1, 96, 64, 3)
    assert probe(path).reference_size == (96, 64)


def test_pixels_of_an_absurd_shape_are_a_fault_of_the_file(tmp_path):
    _encode(tmp_path / "a.mp4", _frames(SCENE), ratio=Fraction(20))
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(DecodeError, match="says that its pixels are 20:1"):
            read(tmp_path / "a.mp4")


def test_where_a_rate_is_irregular_frames_are_chosen_by_time(tmp_path):
    times = np.array([k / 60 for k in range(60)] + [1 + k / 20 for k in range(40)])
    pictures = np.zeros((100, 32, 80, 3), np.uint8)
    for number, bit in np.ndindex(100, 8):
        pictures[number, :, 10 * bit : 10 * bit + 10] = 255 * (number >> bit & 1)
    path = tmp_path / "a.mp4"
    _encode(path, _frames(pictures), times=[round(600 * time) for time in times], rate=60)
    info = probe(path)
    assert info.is_irregular
    assert info.fps == pytest.approx(99 / times[-1], rel=1e-3)

    moments = Moments(0, 100, [place / 16 for place in range(4, 37)])
    bits = read_frames(path, range(33), moments=moments)[:, 16, 5::10].mean(-1) > 128
    found = times[(bits << np.arange(8)).sum(1)]
    wanted = np.array(moments.seconds)
    assert (found <= wanted + 0.002).all()
    assert (wanted - found < 0.05 + 0.002).all()
    # A clip that the mean rate takes for longer than it is: its last second is what there is.
    assert frames_at(Moments(0, 60, [0.5, 1.0, 1.25]), times) == [15, 45, 59]
    assert frames_at(Moments(0, 60, [0.0, 1.25]), times) is None
    with pytest.raises(DecodeError, match=r"frames 0 to 59 last less than 1\.25 s: the rate is irregular"):
        read_frames(path, [0, 1], moments=Moments(0, 60, [0.0, 1.25]))


def test_jitter_and_rounding_are_no_irregular_rate():
    even = np.arange(200) / 24
    assert not is_irregular(even)
    assert not is_irregular((even * 1000).round() / 1000)
    assert not is_irregular(np.cumsum([2, 3] * 60) / 59.94)  # telecine
    assert is_irregular(np.delete(even, 100))


def test_in_a_regular_file_moments_change_nothing(tmp_path):
    write_video(tmp_path / "a.mp4", (SCENE * np.linspace(1, 0.2, 8)[:, None, None, None]).astype(np.uint8), 16)
    moments = Moments(0, 8, [0.3, 0.4])
    assert np.array_equal(
        read_frames(tmp_path / "a.mp4", [1, 2], moments=moments), read_frames(tmp_path / "a.mp4", [1, 2])
    )


def test_a_rate_that_the_header_gets_wrong_is_measured(tmp_path):
    path = tmp_path / "a.dv"
    picture = av.VideoFrame.from_ndarray(np.zeros((576, 720, 3), np.uint8), format="rgb24")
    _encode(path, [picture] * 5, codec="dvvideo", rate=25)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate > 1000
    assert probe(path)[:4] == (576, 768, 25.0, 5)


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.5807), (18, 0.75)], ids=["PQ", "HLG"])
def test_hdr_is_told_and_warned_of_or_tone_mapped(tmp_path, caplog, transfer, white):
    levels = np.repeat([0, white / 2, white, 1], 24)  # black, a grey, what is lit as white paper, the brightest
    luma = np.broadcast_to((64 + 876 * levels).round().astype(np.uint16), (64, 96))
    planes = np.concatenate([luma.ravel(), np.full(64 * 96 // 2, 512, np.uint16)]).reshape(96, 96)
    frames = [av.VideoFrame.from_ndarray(planes, format="yuv420p10le") for _ in range(3)]
    colours = f"log-level=none:pools=1:colorprim=9:colormatrix=9:range=limited:transfer={transfer}:qp=4"
    path = tmp_path / "a.mp4"
    _encode(path, frames, codec="libx265", pixels="yuv420p10le", **{"x265-params": colours})
    assert probe(path).is_hdr
    pyav._warned_of_hdr.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pale = read_frames(path, [1])[0][32, 12::24]
    assert [record.message.count("HDR") for record in caplog.records] == [1]
    shown = read_frames(path, [1], tone_map=True)[0][32, 12::24]
    assert pale[2].mean() == pytest.approx(255 * white, abs=3)
    assert shown[0].max() <= 2
    assert 215 <= shown[2].min() <= shown[2].max() <= 240
    assert shown[3].min() >= 250
    assert np.ptp(shown, axis=1).max() <= 3


def test_a_path_is_a_file_whatever_it_reads_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("plain.mp4", SCENE, 16)
    expected = read_frames("plain.mp4", [0])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.mp4"
        for name in (
            address,
            "concat:a|b.mp4",
            "subfile,,start,0,end,9,,:a.mp4",
            "cache:a.mp4",
            "a%03d.mp4",
            "12:30.mp4",
        ):
            os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
            write_video(name, SCENE, 16)
            for backend in ("pyav", "decord", "torchcodec"):
                if backend == "pyav" or pytest.importorskip(backend):
                    assert np.array_equal(read_frames(name, [0], backend), expected)
            assert probe(name)[:2] == (64, 96)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nplain.mp4\n#EXT-X-ENDLIST\n"),
        ("a.mp4", "ffconcat version 1.0\nfile plain.mp4\n"),
        ("a.sdp", "v=0\nm=video 1234 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
        ("a.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"></MPD>'),
    ],
)
def test_what_leads_to_other_files_is_no_video(tmp_path, name, text):
    write_video(tmp_path / "plain.mp4", SCENE, 16)
    (tmp_path / name).write_text(text)
    for read in (probe, lambda path: read_frames(path, [0])):
        with pytest.raises(DecodeError, match=r"is not a container of videos|Invalid data found"):
            read(tmp_path / name)
