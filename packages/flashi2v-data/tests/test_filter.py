import json
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.judge import Judge, read_entry, record_of
from flashi2v_data.curation.meta import BrokenMetaError, read_entries
from flashi2v_data.curation.probing import Prober
from flashi2v_data.curation.report import FilterReport
from flashi2v_data.curation.rules import Length, NearMiss, Rejection, num_frames_available
from flashi2v_data.curation.stream import FileFilter, filter_records
from flashi2v_data.records import Annotation
from flashi2v_data.store.codec import ValueCodec
from flashi2v_data.video.frames import frame_indices, frame_interval
from flashi2v_data.video.probe import VideoInfo

CASES = json.loads(Path(__file__).with_name("filter_cases.json").read_text())
CONFIG = FilterConfig(ann_txt_path="videos.txt", save_path="lmdb", **CASES["config"])
INFO = VideoInfo(1080, 1920, 24.0, 120)
GOOD = {
    "path": "good.mp4",
    "cap": "a cap",
    "resolution": {"height": 1080, "width": 1920},
    "fps": 24,
    "num_frames": 120,
}


def judge(entry, info=None, config=CONFIG):
    """Return the record of a clip that is kept, why it is rejected, or "incomplete"."""
    clip = read_entry(entry)
    verdict = clip if isinstance(clip, Rejection) else Judge(config)(clip, info)
    return record_of(clip, entry) if verdict == "kept" else verdict


def _filter_files(annotations, config, jobs):
    with closing(Prober(1)) as prober, closing(FileFilter(annotations, config, prober, jobs=jobs)) as files:
        return list(files.outcomes())


@pytest.mark.parametrize("entry", CASES["entries"], ids=lambda entry: Path(entry["path"]).stem)
def test_every_entry_is_kept_or_dropped_as_by_the_reference(entry):
    outcome = judge(dict(entry), INFO if "fps" not in entry else None)
    expected = CASES["why"][Path(entry["path"]).stem]
    assert (outcome.reason if isinstance(outcome, Rejection) else "keep") == expected


def test_a_kept_record_is_complete_and_keeps_further_keys():
    record = judge({**GOOD, "cut": [10, 130], "crop": [0, 100, 0, 100]})
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
        ({"cut": [5, 5]}, "invalid_cut"),
        ({"cut": [30, 20]}, "invalid_cut"),
        ({"cut": [10**15, 10**16]}, "invalid_cut"),
        ({"resolution": [1080, 1920]}, "no_resolution"),
        ({"resolution": {"height": "1080", "width": 1920}}, "no_resolution"),
        ({"cap": None}, "no_cap"),
        ({"cap": []}, "no_cap"),
        ({"cap": ["a", 1]}, "no_cap"),
        ({"path": None}, "invalid_entry"),
        ({"path": ""}, "invalid_entry"),
        ({"fps": 10**400}, "no_fps"),
        ({"fps": 1e-300}, "no_fps"),
        ({"fps": [24]}, "no_fps"),
        ({"motion": {}}, "invalid_motion"),
        ({"motion": True}, "invalid_motion"),
        ({"resolution": {"height": 10**200, "width": 10**200}}, "no_resolution"),
        ({"resolution": {"height": True, "width": True}}, "no_resolution"),
        ({"crop": None}, "invalid_crop"),
        ({"crop": [0, 10, 5, 5]}, "invalid_crop"),
        ({"crop": [0, 10]}, "invalid_crop"),
        ({"crop": [0, 10, 0, "10"]}, "invalid_crop"),
        ({"crop": [0, 10.5, 0, 10]}, "invalid_crop"),
        ({"crop": [0, 1921, 0, 1080]}, "invalid_crop"),
        ({"crop": [0, 1920, 0, 1081]}, "invalid_crop"),
        ({"crop": [0, 10, 0, 10], "resolution": {"height": 0, "width": 0}}, "no_resolution"),
    ],
)
def test_unusable_values_are_counted_reasons_however_they_are_read(tmp_path, change, reason):
    entry = {**GOOD, **change}
    assert judge(dict(entry)) == Rejection(reason)
    (tmp_path / "meta.json").write_text(json.dumps([entry]))
    (outcome,) = _filter_files([Annotation("/videos", str(tmp_path / "meta.json"))], CONFIG, jobs=1)
    assert {name: count for name, count in outcome.report.dropped.items() if count} == {reason: 1}


def test_a_crop_is_kept_as_whole_numbers():
    record = judge({**GOOD, "crop": [0.0, 1920, 0, 1080.0]})
    assert json.dumps(record["crop"]) == "[0, 1920, 0, 1080]"


def test_a_crop_that_exceeds_the_video_is_dropped_where_the_entry_leaves_out_the_resolution():
    entry = {name: value for name, value in GOOD.items() if name != "resolution"}
    assert judge({**entry, "crop": [0, 1921, 0, 1080]}, INFO) == Rejection("invalid_crop")
    assert not isinstance(judge({**entry, "crop": [0, 1920, 0, 1080]}, INFO), Rejection)
    *_, last = Judge(CONFIG).explain({**entry, "crop": [0, 1921, 0, 1080]}, lambda path: INFO)
    assert last.startswith("FAILS   invalid_crop")


@pytest.mark.parametrize("entry", [None, 5, "a.mp4", [], {}, {"cap": "no path"}])
def test_an_entry_that_is_no_record_is_counted(entry):
    assert judge(entry) == Rejection("invalid_entry")


@pytest.mark.parametrize("change", [{"id": 1 << 70}, {"cap": "\ud800"}, {"cap": ["a", "\udcff"]}, {"\ud800": 1}])
def test_what_cannot_be_stored_is_counted(change):
    report = FilterReport()
    assert list(filter_records([{**GOOD, **change}], CONFIG, report)) == []
    assert report.dropped["invalid_entry"] == report.total == 1


def test_rows_of_a_table_are_read_as_what_they_mean():
    row = {
        "path": Path("good.mp4"),
        "cap": np.array(["a cap", "another"]),
        "resolution": {"height": np.int32(1080), "width": np.uint64(1920)},
        "fps": np.float32(24),
        "num_frames": np.int64(120),
        "cut": (np.int8(10), 130),
        "crop": np.array([0, 100, 0, 100]),
        "motion": Fraction(1, 2),
        np.str_("id"): np.bool_(True),
    }
    report = FilterReport()
    (record,) = filter_records([row], CONFIG, report)
    expected = {**GOOD, "cap": ["a cap", "another"], "cut": [10, 130], "crop": [0, 100, 0, 100], "motion": 0.5}
    assert record == expected | {"id": True, "start_frame_idx": 10}
    assert ValueCodec().unpack(ValueCodec().pack(record)) == record
    unusable = [
        {"fps": np.float64("nan")},
        {"num_frames": np.float32(60.5)},
        {"fps": Fraction(10**400)},
        {"id": object()},
    ]
    assert list(filter_records([GOOD | change for change in unusable], CONFIG, report)) == []
    assert {name: count for name, count in report.dropped.items() if count} == {
        "no_fps": 2,
        "no_num_frames": 1,
        "invalid_entry": 1,
    }


def test_an_entry_that_can_be_read_but_not_sent_on_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("flashi2v_data.curation.meta.PIECE_BYTES", 2000)
    deep = "[" * 600 + "]" * 600
    entry = f'{{"path": "a.mp4", "cap": "a", "id": {deep}}}'
    (tmp_path / "meta.json").write_text(f"[{entry}, {entry}]")
    with pytest.raises(BrokenMetaError, match=r"meta\.json: .*nested too deeply"):
        _filter_files([Annotation("/videos", str(tmp_path / "meta.json"))], CONFIG, jobs=1)


def test_a_root_that_is_not_utf8_is_part_of_every_path(tmp_path):
    for entries in ([GOOD], [{**GOOD, "id": 1}]):
        (tmp_path / "meta.json").write_text(json.dumps(entries))
        (outcome,) = _filter_files([Annotation("/caf\udce9", str(tmp_path / "meta.json"))], CONFIG, jobs=1)
        assert [ValueCodec().unpack(value)["path"] for value in outcome.kept] == ["/caf\udce9/good.mp4"]


CAPTIONS = ["a cap", "@handle", ["", "a dog"], ["...", "https://a.com/x"], "一只猫", "   "]


@pytest.mark.parametrize(
    ("changes", "num_empty", "num_dropped"),
    [
        ({}, 5, 0),
        ({"clean_captions": "reference"}, 6, 0),
        ({"clean_captions": False}, 3, 0),
        ({"drop_empty_captions": True}, 1, 3),
        ({"drop_empty_captions": True, "clean_captions": False}, 2, 1),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "further keys"])
def test_captions_that_are_or_become_empty_are_counted_and_dropped_if_asked_for(
    tmp_path, changes, num_empty, num_dropped, kind
):
    entries = [{**GOOD, "path": f"{n}.mp4", "cap": caption} for n, caption in enumerate(CAPTIONS)]
    if kind == "further keys":
        entries = [{**entry, "id": 1} for entry in entries]
    (tmp_path / "meta.json").write_text("\n".join(map(json.dumps, entries)))
    config, report = CONFIG.model_copy(update=changes), FilterReport()
    for outcome in _filter_files([Annotation("/v", str(tmp_path / "meta.json"))], config, jobs=1):
        report.add(outcome.report, config)
    alone = FilterReport()
    kept = list(filter_records(entries, config, alone))
    assert (report.captions.empty, report.dropped["empty_cap"], report.kept) == (num_empty, num_dropped, len(kept))
    assert (alone.captions.empty, alone.captions.total) == (report.captions.empty, report.captions.total)
    assert report.kept + num_dropped == len(CAPTIONS)
    assert f"{num_empty} of {report.captions.total} captions are empty, or become so" in report.describe(config)
    assert "the first is of /v/" in report.describe(config)
    assert FilterReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    lines = [*Judge(config).explain(dict(GOOD, cap=["..."]), lambda path: INFO)]
    assert (sum("empty_cap" in line for line in lines), lines[-1].startswith("FAILS")) == (
        (1, True) if "drop_empty_captions" in changes else (0, False)
    )


@pytest.mark.parametrize("key", ["resolution", "fps", "num_frames"])
def test_what_an_entry_leaves_out_is_read_from_the_video(key):
    entry = {name: value for name, value in GOOD.items() if name != key}
    assert judge(dict(entry)) == "incomplete"
    assert judge(entry, INFO) == {**GOOD, "start_frame_idx": 0}


@pytest.mark.parametrize(
    ("cut", "num_frames"), [([20, 110], 90), ([20, 500], 100), ([20], 100), ([120, 130], None), ([30, 20], None)]
)
def test_without_num_frames_the_clip_is_its_cut_within_the_video(cut, num_frames):
    entry = {name: value for name, value in GOOD.items() if name != "num_frames"}
    outcome = judge({**entry, "cut": cut}, INFO)
    if num_frames is None:
        assert outcome == Rejection("invalid_cut")
    else:
        assert (outcome["start_frame_idx"], outcome["num_frames"]) == (cut[0], num_frames)


@pytest.mark.parametrize(("num_frames", "outcome"), [(96, "too_short"), (97, "keep"), (490, "keep"), (491, "too_long")])
def test_sample_stride_replaces_the_frame_rate(num_frames, outcome):
    config = CONFIG.model_copy(update={"train_fps": None, "sample_stride": 2})
    result = judge({**GOOD, "fps": 5, "num_frames": num_frames}, None, config)
    assert (result.reason if isinstance(result, Rejection) else "keep") == outcome


def test_a_picture_of_exactly_the_sample_size_has_exactly_its_pixels():
    config = CONFIG.model_copy(update={"min_hxw": 480 * 832})
    assert not isinstance(judge({**GOOD, "resolution": {"height": 480, "width": 832}}, None, config), Rejection)
    assert judge({**GOOD, "resolution": {"height": 479, "width": 832}}, None, config).reason == "res_too_small"


@given(
    start=st.integers(0, 1000),
    num_frames=st.integers(1, 3000),
    fps=st.sampled_from([8, 15, 15.95, 16, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120]),
    rate=st.sampled_from([(16.0, None), (24.0, None), (8.0, None), (None, 1), (None, 3)]),
)
def test_the_number_of_frames_is_that_of_the_frames_that_training_reads(start, num_frames, fps, rate):
    limits = CONFIG.model_copy(update={"train_fps": rate[0], "sample_stride": rate[1]})
    indices = frame_indices(start, num_frames, frame_interval(fps, *rate))
    assert num_frames_available(Length(fps, num_frames), limits) == len(indices)


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({"resolution": {"height": 720, "width": 1280}}, NearMiss("min_hxw", 898560, "1280x720")),
        ({"resolution": {"height": 1201, "width": 1000}}, None),  # too small besides
        ({"resolution": {"height": 2402, "width": 2000}}, NearMiss("max_h_div_w_ratio", 1.201, "2000x2402")),
        ({"resolution": {"height": 1000, "width": 3000}}, NearMiss("min_h_div_w_ratio", 0.3333, "3000x1000")),
        ({"num_frames": 370}, NearMiss("too_long_factor", 5.1, "")),
        ({"num_frames": 70}, NearMiss("sample_num_frames", 45, "")),
        ({"num_frames": 1}, NearMiss("sample_num_frames", 1, "")),
        ({"fps": 12, "num_frames": 60}, NearMiss("train_fps", 12, "")),
        ({"fps": 12, "num_frames": 40}, None),  # too short even at 12 fps
        ({"motion": -0.1}, NearMiss("min_motion_value", -0.1, "")),
        ({"motion": 1.01}, NearMiss("max_motion_value", 1.01, "")),
        ({"motion": 1.01, "num_frames": 70}, None),
        ({"fps": None}, None),
    ],
)
def test_a_near_miss_names_the_one_setting_that_would_keep_the_clip(change, miss):
    drop = judge({**GOOD, **change})
    assert drop.near_miss == miss
    if miss is not None:
        value = int(miss.value) if isinstance(getattr(CONFIG, miss.setting), int) else miss.value
        fixed = CONFIG.model_copy(update={miss.setting: value})
        assert not isinstance(judge({**GOOD, **change}, None, fixed), Rejection)


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
    assert "fps_too_low                2  fps below train_fps" in report.describe(CONFIG)


def test_processes_give_the_same_records_in_the_same_order(shapes, filter_config):
    config = filter_config()
    entries = list(read_entries(Annotation(str(shapes), str(shapes / "videos.json"))))
    # Bare entries: everything is read from the videos; 25 times over, to fill several chunks.
    bare = [{"path": entry["path"], "cap": str(number)} for number, entry in enumerate(entries * 25)]
    bare[5]["path"] = str(shapes / "videos.txt")
    alone, shared = FilterReport(), FilterReport()
    expected = list(filter_records([dict(entry) for entry in bare], config, alone))
    again = [{"path": entry["path"], "cap": entry["cap"]} for entry in bare]
    assert list(filter_records(again, config, shared, jobs=2)) == expected
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


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", ["plain", "further keys", "lines", "nested lists"])
def test_files_give_the_same_in_processes_as_entry_by_entry(tmp_path, monkeypatch, kind, compression):
    monkeypatch.setattr("flashi2v_data.curation.meta.PIECE_BYTES", 2000)
    entries = [
        {**GOOD, "path": f"{number}.mp4", "num_frames": 60 + number, "motion": number / 50, "cut": [number, 999]}
        for number in range(100)
    ]
    if kind == "further keys":
        entries = [
            {**entry, "crop": [0, 9, 0, 9], "id": n, "fps": None if n == 7 else 24} for n, entry in enumerate(entries)
        ]
    if kind == "nested lists":
        entries = [{**entry, "shots": [{"at": 1}, {"at": 2}]} for entry in entries]
    path = tmp_path / "meta.json"
    path.write_text("\n".join(map(json.dumps, entries)) if kind == "lines" else json.dumps(entries, indent=1))
    annotations = [Annotation("/videos", str(path))] * 2
    config = CONFIG.model_copy(update={"compression": compression})

    alone, report = FilterReport(), FilterReport()
    expected = list(filter_records((e for a in annotations for e in read_entries(a)), config, alone))
    outcomes = _filter_files(annotations, config, jobs=2)
    codec = ValueCodec(compression)
    for outcome in outcomes:
        report.add(outcome.report, config)
    assert [codec.unpack(value) for outcome in outcomes for value in outcome.kept] == expected
    assert report == alone
    assert 0 < report.kept < report.total == 200
    assert [outcome.num_pieces for outcome in outcomes] == list(range(1, len(outcomes) + 1))
    assert len(outcomes) > 10
