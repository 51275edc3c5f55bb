import json

from flashi2v_data.curation.config import FilterConfig
from flashi2v_data.curation.report import MAX_GROUPS, FilterReport, write_report
from flashi2v_data.curation.rules import NearMiss, Rejection

CONFIG = FilterConfig(
    ann_txt_path="videos.txt",
    save_path="lmdb",
    sample_height=480,
    sample_width=832,
    sample_num_frames=49,
    min_hxw=921600,
    train_fps=16,
    max_h_div_w_ratio=1.2,
    min_h_div_w_ratio=0.4,
)
HD = Rejection("res_too_small", NearMiss("min_hxw", 898560, "1280x720"))


def test_near_misses_are_told_in_sentences():
    report = FilterReport()
    report.count(10, [HD] * 3120 + [Rejection("too_fast", NearMiss("min_motion_value", -0.1, ""))] * 2)
    text = report.describe(CONFIG)
    assert "3120 clips of 1280x720 miss min_hxw by 2.5 % after cropping to 480:832; 898560 would keep them" in text
    assert "2 clips miss min_motion_value by 0.1; -0.1 would keep them" in text


def test_one_clip_has_its_own_grammar():
    report = FilterReport()
    report.count(0, [Rejection("too_short", NearMiss("sample_num_frames", 41 - 4 * number, "")) for number in range(6)])
    lines = report.describe(CONFIG).splitlines()
    assert "1 clip misses sample_num_frames by 16 %; 41 would keep it" in lines
    assert lines[-1] == "1 further clip misses sample_num_frames alone, see report.json"


def test_of_many_groups_the_most_numerous_are_told_nearest_first_and_the_others_counted():
    report = FilterReport()
    for number in range(8):
        report.count(0, [Rejection("too_short", NearMiss("sample_num_frames", 17 + 4 * number, ""))] * (10 + number))
    lines = report.describe(CONFIG).splitlines()[-6:]
    assert [line.split(";")[1].split()[0] for line in lines[:5]] == ["45", "41", "37", "33", "29"]
    assert lines[5] == "33 further clips miss sample_num_frames alone, see report.json"


def test_a_report_survives_json():
    report = FilterReport()
    report.count(3, [HD, HD, Rejection("no_cap")])
    assert FilterReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_groups_are_bounded_and_the_nearest_remain():
    total = FilterReport()
    for number in range(4 * MAX_GROUPS):
        part = FilterReport()
        part.count(0, [Rejection("res_too_small", NearMiss("min_hxw", 900_000 - number, str(number)))])
        total.add(part, CONFIG)
    assert total.total == total.dropped["res_too_small"] == 4 * MAX_GROUPS
    assert len(total.near_misses) <= 2 * MAX_GROUPS
    assert total.near_misses[NearMiss("min_hxw", 900_000, "0")] == 1


def test_the_report_is_written_as_text_json_and_picture(tmp_path):
    report = FilterReport()
    report.count(3, [HD])
    write_report(report, CONFIG, tmp_path, plots=True)
    assert (tmp_path / "report.txt").read_text() == report.describe(CONFIG) + "\n"
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["near_misses"] == [{"setting": "min_hxw", "value": 898560, "clips": "1280x720", "count": 1}]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_near_misses_says_so(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, path, **_: (texts.extend(text.get_text() for text in figure.axes[1].texts), path.touch()),
    )
    report = FilterReport()
    report.count(3, [Rejection("no_cap")])
    write_report(report, CONFIG, tmp_path, plots=True)
    assert texts == ["no clip that a single changed setting would keep"]
