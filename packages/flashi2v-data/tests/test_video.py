from fractions import Fraction

import av
import numpy as np
import pytest

from flashi2v_data.errors import InputError
from flashi2v_data.video.probe import VideoInfo, probe
from flashi2v_data.video.write import write_video

FRAMES = np.full((5, 32, 48, 3), (200, 60, 30), dtype=np.uint8)


def test_a_video_is_written_with_its_rate_size_and_colours(tmp_path):
    path = tmp_path / "new" / "video.mp4"
    write_video(path, FRAMES, 30000 / 1001)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == FRAMES.shape
    assert np.abs(decoded.astype(int) - FRAMES).max() <= 4
    assert probe(path) == VideoInfo(32, 48, 30000 / 1001, 5)


def test_metadata_of_any_name_is_kept(tmp_path):
    write_video(tmp_path / "video.mp4", FRAMES, 16, {"prompt": "a café; b=c", "seed": "3"})
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert container.metadata["prompt"] == "a café; b=c"
        assert container.metadata["seed"] == "3"


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "video.mp4"
    write_video(path, FRAMES, 16)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        write_video(path, FRAMES[:, ::-1], 16)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "expected"),
    [
        ("a.mp4", FRAMES.astype(np.float32), 16, "must be uint8"),
        ("a.mp4", FRAMES[0], 16, "must be uint8"),
        ("a.mp4", FRAMES[:, :31], 16, "even height and width"),
        ("a.mp4", FRAMES[:0], 16, "at least one frame"),
        ("a.mp4", FRAMES, 0, "fps must be positive"),
        ("a.gif", FRAMES, 16, "must end in one of"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, frames, fps, expected):
    with pytest.raises(InputError, match=expected):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []
