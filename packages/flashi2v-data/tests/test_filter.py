import json
from pathlib import Path

import pytest

from flashi2v_data.config import FilterConfig
from flashi2v_data.errors import DecodeError
from flashi2v_data.filter import FilterReport, filter_records, judge_entry
from flashi2v_data.probe import VideoInfo
from flashi2v_data.records import Annotation, read_entries

CASES = json.loads(Path(__file__).with_name("filter_cases.json").read_text())
CONFIG = FilterConfig(ann_txt_path="videos.txt", save_path="lmdb", **CASES["config"])
GOOD = {
    "path": "good.mp4",
    "cap": "a cap",
    "resolution": {"height": 1080, "width": 1920},
    "fps": 24,
    "num_frames": 120,
}


def _no_video(path: str) -> VideoInfo:
    raise DecodeError(path, "no such file")


def _video(_path: str) -> VideoInfo:
    return VideoInfo(1080, 1920, 24.0, 120)


@pytest.mark.parametrize("entry", CASES["entries"], ids=lambda entry: Path(entry["path"]).stem)
def test_every_entry_is_kept_or_dropped_as_by_the_reference(entry):
    outcome = judge_entry(entry, CONFIG, _video)
    expected = CASES["why"][Path(entry["path"]).stem]
    assert (outcome if isinstance(outcome, str) else "keep") == expected


def test_a_kept_record_is_complete_and_keeps_further_keys():
    record = judge_entry({**GOOD, "cut": [10, 130], "crop": [0, 100, 0, 100]}, CONFIG, _no_video)
    assert record == {**GOOD, "cut": [10, 130], "crop": [0, 100, 0, 100], "start_frame_idx": 10}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fps": None}, "no_fps"),
        ({"fps": 0}, "no_fps"),
        ({"fps": "24"}, "no_fps"),
        ({"fps": True}, "no_fps"),
        ({"num_frames": None}, "no_num_frames"),
        ({"num_frames": 60.5}, "no_num_frames"),
        ({"motion": None}, "invalid_motion"),
        ({"motion": float("nan")}, "invalid_motion"),
        ({"cut": None}, "invalid_cut"),
        ({"cut": []}, "invalid_cut"),
        ({"cut": [-1, 5]}, "invalid_cut"),
        ({"cut": ["0"]}, "invalid_cut"),
        ({"resolution": [1080, 1920]}, "no_resolution"),
        ({"resolution": {"height": "1080", "width": 1920}}, "no_resolution"),
        ({"cap": None}, "no_cap"),
        ({"cap": []}, "no_cap"),
        ({"cap": ["a", 1]}, "no_cap"),
        ({"path": None}, "invalid_entry"),
        ({"id": 1 << 70}, "invalid_entry"),
        ({"cap": "\ud800"}, "invalid_entry"),
    ],
)
def test_unusable_values_are_counted_reasons(change, reason):
    assert judge_entry({**GOOD, **change}, CONFIG, _no_video) == reason


@pytest.mark.parametrize("entry", [None, 5, "a.mp4", [], {}, {"cap": "no path"}])
def test_an_entry_that_is_no_record_is_counted(entry):
    assert judge_entry(entry, CONFIG, _no_video) == "invalid_entry"


@pytest.mark.parametrize("key", ["resolution", "fps", "num_frames"])
def test_what_an_entry_leaves_out_is_read_from_the_video(key):
    entry = {name: value for name, value in GOOD.items() if name != key}
    assert judge_entry(entry, CONFIG, _video) == {**GOOD, "start_frame_idx": 0}
    assert judge_entry(entry, CONFIG, _no_video) == "unreadable"


@pytest.mark.parametrize(
    ("cut", "num_frames"), [([20, 110], 90), ([20, 500], 100), ([20], 100), ([120, 130], None), ([30, 20], None)]
)
def test_without_num_frames_the_clip_is_its_cut_within_the_video(cut, num_frames):
    entry = {name: value for name, value in GOOD.items() if name != "num_frames"}
    outcome = judge_entry({**entry, "cut": cut}, CONFIG, _video)
    if num_frames is None:
        assert outcome == "invalid_cut"
    else:
        assert (outcome["start_frame_idx"], outcome["num_frames"]) == (cut[0], num_frames)


@pytest.mark.parametrize(("num_frames", "outcome"), [(96, "too_short"), (97, "keep"), (490, "keep"), (491, "too_long")])
def test_sample_stride_replaces_the_frame_rate(num_frames, outcome):
    config = CONFIG.model_copy(update={"train_fps": None, "sample_stride": 2})
    result = judge_entry({**GOOD, "fps": 5, "num_frames": num_frames}, config, _no_video)
    assert (result if isinstance(result, str) else "keep") == outcome


def test_a_picture_of_exactly_the_sample_size_has_exactly_its_pixels():
    config = CONFIG.model_copy(update={"min_hxw": 480 * 832})
    assert not isinstance(judge_entry({**GOOD, "resolution": {"height": 480, "width": 832}}, config), str)
    assert judge_entry({**GOOD, "resolution": {"height": 479, "width": 832}}, config) == "res_too_small"


def test_the_report_counts_every_entry_once():
    report = FilterReport()
    entries = [GOOD, {**GOOD, "fps": 12}, {**GOOD, "fps": 12}, 7]
    kept = list(filter_records(entries, CONFIG, report))
    assert len(kept) == report.kept == 1
    assert report.total == 4
    assert {reason: count for reason, count in report.dropped.items() if count} == {
        "fps_too_low": 2,
        "invalid_entry": 1,
    }
    assert "fps_too_low                2  fps below train_fps" in str(report)


def test_processes_give_the_same_records_in_the_same_order(shapes, filter_config):
    config = filter_config()
    entries = list(read_entries(Annotation(str(shapes), str(shapes / "videos.json"))))
    # Bare entries: everything is read from the videos; 25 times over, to fill several chunks.
    bare = [{"path": entry["path"], "cap": str(number)} for number, entry in enumerate(entries * 25)]
    bare[5]["path"] = str(shapes / "videos.txt")
    alone, shared = FilterReport(), FilterReport()
    expected = list(filter_records(bare, config, alone))
    assert list(filter_records(bare, config, shared, jobs=2)) == expected
    assert alone == shared
    assert alone.dropped["unreadable"] == 1
    assert [record["resolution"] for record in expected[:1]] == [{"height": 32, "width": 48}]
    assert expected[0]["num_frames"] == 13
    assert expected[0]["fps"] == 16.0


def test_entries_are_taken_as_they_are_needed(filter_config):
    taken = []

    def entries():
        for number in range(10_000):
            taken.append(number)
            yield GOOD

    next(filter_records(entries(), filter_config(sample_num_frames=49)))
    assert len(taken) < 1000
