import importlib.util
import logging

import av
import numpy as np
import pytest

from flashi2v_data import decode
from flashi2v_data.decode import read_frames, resolve_backend
from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.probe import probe
from flashi2v_data.video import write_video

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")
BACKENDS = [pytest.param("decord", marks=needs_decord), "pyav"]
NUM_FRAMES = 300


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


@needs_decord
def test_backends_give_identical_frames(clip):
    indices = [298, 2, 1, 100, 100, 251]
    assert np.array_equal(read_frames(clip, indices, "decord"), read_frames(clip, indices, "pyav"))


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
    assert probe(path) == probe(clip) == (36, 72, 24.0, NUM_FRAMES)


def test_auto_takes_what_is_installed_and_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for installed, expected in ((object(), "decord"), (None, "pyav")):
        caplog.clear()
        resolve_backend.cache_clear()
        monkeypatch.setattr(decode.importlib.util, "find_spec", lambda _name, found=installed: found)
        assert [resolve_backend("auto"), resolve_backend("auto")] == [expected, expected]
        assert caplog.messages == [f"videos are decoded by {expected}"]
    with pytest.raises(InputError, match=r"pip install 'flashi2v-data\[decord\]'"):
        resolve_backend("decord")
    with pytest.raises(InputError, match="choose auto, decord or pyav"):
        resolve_backend("ffmpeg")


@pytest.fixture(autouse=True)
def _fresh_backend_choice():
    resolve_backend.cache_clear()
    yield
    resolve_backend.cache_clear()
