"""The filter's limits on what signals measured."""

import json

import pytest

from flashi2v_data.curation.judge import Judge, read_entry
from flashi2v_data.curation.report import FilterReport
from flashi2v_data.curation.rules import REASONS, SIGNAL_RULES, NearMiss, Rejection
from flashi2v_data.curation.stream import filter_records
from flashi2v_data.errors import DecodeError
from flashi2v_data.records import SIGNAL_COLUMNS
from flashi2v_data.signals import find_signals
from flashi2v_data.store.reader import open_store, write_store

GOOD = {
    "path": "good.mp4",
    "cap": "a cap",
    "resolution": {"height": 32, "width": 48},
    "fps": 16,
    "num_frames": 13,
    "object_motion": 2.5,
    "camera_motion": 10.0,
    "stillness": 0.5,
    "black_share": 0.1,
    "bar_share": 0.25,
    "num_loops": 1.0,
    "text_area": 0.02,
    "scene_cuts": [3, 9],
    "is_duplicate": False,
}
# A limit that GOOD just keeps, one that it misses, and what would keep it.
LIMITS = {
    "min_object_motion": (2.5, 2.6, "things_too_slow", 2.5),
    "max_object_motion": (2.5, 2.4, "things_too_fast", 2.5),
    "max_camera_motion": (10, 9, "camera_too_fast", 10),
    "max_stillness": (0.5, 0.4, "too_still", 0.5),
    "max_black_share": (0.1, 0.05, "too_black", 0.1),
    "max_bar_share": (0.25, 0.2, "too_barred", 0.25),
    "max_num_loops": (1, 0, "looping", 1),
    "max_text_area": (0.02, 0.01, "too_much_text", 0.02),
    "max_scene_cuts": (2, 1, "too_many_cuts", 2),
}


def judge(entry, config):
    clip = read_entry(entry)
    return clip if isinstance(clip, Rejection) else Judge(config)(clip)


def test_every_rule_is_tried_and_every_column_is_a_built_in_signals():
    assert {*LIMITS} == {rule.setting for rule in SIGNAL_RULES}
    pytest.importorskip("cv2")
    filled = {
        name for signal in find_signals(["motion", "cuts", "text", "still", "duplicates"]) for name in signal.columns
    }
    assert filled == {*SIGNAL_COLUMNS}


@pytest.mark.parametrize("setting", LIMITS)
def test_a_clip_on_each_side_of_a_limit(filter_config, setting):
    kept_by, dropped_by, reason, settable = LIMITS[setting]
    assert judge(GOOD, filter_config(**{setting: kept_by})) == "kept"
    found = judge(GOOD, filter_config(**{setting: dropped_by}))
    assert found == Rejection(reason, NearMiss(setting, settable, ""))
    assert reason in REASONS
    assert judge(GOOD, filter_config(**{setting: settable})) == "kept"


@pytest.mark.parametrize("setting", [*LIMITS, "drop_duplicates"])
def test_a_limit_on_what_was_not_measured_is_not_passed_over(filter_config, setting):
    bare = {key: value for key, value in GOOD.items() if key not in SIGNAL_COLUMNS}
    assert judge(bare, filter_config()) == "kept"
    assert judge(bare, filter_config(**{setting: setting == "drop_duplicates" or 1})) == Rejection("not_scored")


def test_duplicates_are_dropped_where_that_is_asked_for(filter_config):
    twin = {**GOOD, "is_duplicate": True, "duplicate_of": 0}
    assert judge(twin, filter_config()) == "kept"
    assert judge(twin, filter_config(drop_duplicates=True)) == Rejection("duplicate")
    assert judge(GOOD, filter_config(drop_duplicates=True)) == "kept"


def test_of_two_limits_none_alone_is_the_cause(filter_config):
    config = filter_config(max_text_area=0.01, max_stillness=0.4)
    assert judge(GOOD, config) == Rejection("too_still")
    assert judge({**GOOD, "fps": 12}, filter_config(max_text_area=0.01)) == Rejection("fps_too_low")


@pytest.mark.parametrize(
    "change", [{"text_area": "much"}, {"scene_cuts": 3}, {"scene_cuts": [-1]}, {"is_duplicate": 1}, {"stillness": None}]
)
def test_a_column_of_another_kind_is_counted(filter_config, change):
    assert judge({**GOOD, **change}, filter_config()) == Rejection("invalid_signal")


def test_columns_are_kept_in_the_store_and_read_from_it(tmp_path, filter_config):
    entries = [GOOD, {**GOOD, "is_duplicate": True, "duplicate_of": 0.0}, {**GOOD, "further": 1}]
    report = FilterReport()
    config = filter_config(max_text_area=0.5)
    write_store(tmp_path / "a.lmdb", filter_records(entries, config, report), config.model_dump())
    assert report.kept == 3
    records = [*open_store(tmp_path / "a.lmdb")]
    assert records[0] == {**GOOD, "start_frame_idx": 0}
    assert records[1]["duplicate_of"] == 0
    assert records[2]["scene_cuts"] == [3, 9]


def test_explain_tells_every_limit_that_is_set(filter_config):
    def probe(path):
        raise DecodeError(path, "is not opened")

    config = filter_config(max_text_area=0.01, max_scene_cuts=2)
    told = "\n".join(Judge(config).explain(GOOD, probe))
    assert "FAILS   too_much_text    max_text_area 0.01, the clip has 0.02" in told
    assert "passes  too_many_cuts    max_scene_cuts 2, the clip has 2" in told
    assert "stillness" not in told
    told = [*Judge(filter_config(drop_duplicates=True)).explain({**GOOD, "is_duplicate": True}, probe)]
    assert told[-1].startswith("FAILS   duplicate")
    assert len([*Judge(config).explain({**GOOD, "text_area": "much"}, probe)]) == 9, "a line for each form"


def test_reports_name_rules_of_signals_where_they_dropped_something(filter_config):
    config, report = filter_config(max_text_area=0.01), FilterReport()
    assert [*filter_records([GOOD], config, report)] == []
    text = report.describe(config)
    assert "too_much_text" in text
    assert "too_still" not in text
    assert "misses max_text_area by 1e+02 %; 0.02 would keep it" in text
    assert FilterReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_limits_are_checked(filter_config):
    with pytest.raises(ValueError, match="min_object_motion exceeds max_object_motion"):
        filter_config(min_object_motion=3, max_object_motion=2)
    with pytest.raises(ValueError, match="max_text_area"):
        filter_config(max_text_area=-1)
