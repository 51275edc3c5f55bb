"""What the pipeline returns can be kept and seen."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashi2v_data import read_frames
from flashi2v_infer import FlashI2VPipelineOutput, InputError, read_record, save_video, write_mp4
from flashi2v_infer.files.export import as_frames

PIXELS = np.stack([np.full((2, 32, 48, 3), 60 * t, np.uint8) for t in range(4)], 1)  # (2, T, H, W, 3)


def output(kind: str, num_videos: int = 1) -> FlashI2VPipelineOutput:
    """The same videos, as the pipeline returns them with each `output_type`."""
    videos = PIXELS[:num_videos]
    frames = {
        "pil": [[Image.fromarray(frame) for frame in video] for video in videos],
        "np": (videos / 255).astype(np.float32),
        "pt": torch.from_numpy(videos).float().div(255).movedim(-1, 2),
    }[kind]
    return FlashI2VPipelineOutput(frames=frames, decoding="whole pictures", fps=8)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_what_is_returned_is_written(kind, tmp_path):
    frames = output(kind).frames
    assert np.array_equal(as_frames(frames), PIXELS[0])
    assert np.array_equal(as_frames(frames[0]), PIXELS[0])
    write_mp4(tmp_path / "a.mp4", frames, 8)
    save_video(str(tmp_path / "b.webp"), frames[0], 8)
    assert len(read_frames(tmp_path / "a.mp4", range(4))) == 4
    assert Image.open(tmp_path / "b.webp").n_frames == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.webp"]


def test_an_output_saves_itself_in_every_format(tmp_path):
    made = output("np")
    for name in ("a.mp4", "a.gif", "a.webp", "frames"):
        assert made.save(tmp_path / name) == tmp_path / name
    assert np.abs(read_frames(tmp_path / "a.mp4", range(4)).astype(int) - PIXELS[0]).max() <= 6
    assert np.array_equal(np.asarray(Image.open(tmp_path / "frames" / "frame_0003.png")), PIXELS[0, 3])
    assert Image.open(tmp_path / "a.gif").info["duration"] in (120, 130)
    assert not list(tmp_path.rglob("*.json"))
    record = {"prompt": "a", "seed": 0, "settings": {}}
    made.save(tmp_path / "b.mp4", record=record)
    assert read_record(tmp_path / "b.mp4") == record == json.loads((tmp_path / "b.json").read_text())


def test_of_several_videos_one_is_named(tmp_path):
    made = output("pt", 2)
    made.save(tmp_path / "second.mp4", 1)
    with pytest.raises(InputError, match=r"there are 2 videos: say which to save, save\(path, 0\)"):
        made.save(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="there is no video 2: there are 2, counted from 0"):
        made.save(tmp_path / "a.mp4", 2)
    with pytest.raises(InputError, match="of a batch give one"):
        save_video(tmp_path / "a.mp4", made.frames, 8)
    with pytest.raises(InputError, match=r"save: .*a.avi must end in .mp4, .gif or .webp"):
        made.save(tmp_path / "a.avi", 0)
    latents = FlashI2VPipelineOutput(frames=torch.zeros(1, 16, 2, 4, 6))
    with pytest.raises(InputError, match="these are latents: sample with another output_type"):
        latents.save(tmp_path / "a.mp4")
    assert latents._repr_html_() == "<pre>latents (1, 16, 2, 4, 6)</pre>"
    assert [path.name for path in tmp_path.iterdir()] == ["second.mp4"]


def test_a_notebook_plays_it(tmp_path):
    page = output("pil", 2)._repr_html_()
    players = re.findall(r'<video [^>]*width="240" height="160"[^>]* src="data:video/mp4;base64,([^"]+)">', page)
    assert len(players) == 2
    Path(tmp_path / "a.mp4").write_bytes(base64.b64decode(players[1]))
    assert np.abs(read_frames(tmp_path / "a.mp4", range(4)).astype(int) - PIXELS[1]).max() <= 6
