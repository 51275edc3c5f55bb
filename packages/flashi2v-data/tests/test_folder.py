"""A folder as people keep it becomes a meta JSON."""

import json

import numpy as np
import pytest
from PIL import Image

from flashi2v_data import FilterConfig, FilterReport, filter_records, write_video
from flashi2v_data.curation.folder import read_folder, write_meta
from flashi2v_data.curation.meta import read_entries
from flashi2v_data.errors import InputError
from flashi2v_data.records import read_annotations


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Videos, and one image, with captions of every kind; one clip has none."""
    monkeypatch.chdir(tmp_path)
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    for name in ("a b.mp4", "in/c.MOV", "in/deep/d.mp4", "in/红.mp4", "none.mp4", ".hidden.mp4"):
        video = tmp_path / "videos" / name
        write_video(video.with_suffix(".mp4"), frames, 16)
        video.with_suffix(".mp4").rename(video)
    Image.new("RGB", (64, 48), "red").save("videos/picture.png")
    texts = {
        "a b.txt": "moves\n to the left\n",
        "in/c.json": json.dumps({"caption": ["one", "two"], "score": 3}),
        "picture.txt": "\ufeffa red picture",
        "metadata.csv": 'file_name,text\nin/deep/d.mp4,"d, of the table"\nin/红.mp4,of the outer table\ngone.mp4,x\n',
        "in/metadata.jsonl": json.dumps({"file_name": "红.mp4", "text": "一个红色的圆"}, ensure_ascii=False) + "\n\n",
        "numbers.csv": "x,y\n1,2\n",
    }
    for name, text in texts.items():
        (tmp_path / "videos" / name).write_text(text, "utf-8")
    return tmp_path / "videos"


def test_captions_are_found_wherever_they_stand(folder, caplog):
    found = read_folder("videos")
    assert found.entries == [
        {"path": "videos/a b.mp4", "cap": "moves to the left"},
        {
            "path": "videos/picture.png",
            "cap": "a red picture",
            "resolution": {"height": 48, "width": 64},
            "fps": 24,
            "num_frames": 1,
        },
        {"path": "videos/in/c.MOV", "cap": ["one", "two"], "score": 3},
        {"path": "videos/in/红.mp4", "cap": "一个红色的圆"},
        {"path": "videos/in/deep/d.mp4", "cap": "d, of the table"},
    ]
    assert found.without_caption == ["videos/none.mp4"]
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "videos/metadata.csv: 1 rows name no video or image of the folder, the first is gone.mp4"
    assert told[1].startswith("not read: videos/numbers.csv: no column is called path")
    assert len(told) == 2


def test_the_meta_json_is_what_the_filter_reads(folder):
    annotation = write_meta('a, "b".json', read_folder("videos").entries)
    (line,) = read_annotations(annotation)
    limits = FilterConfig(
        ann_txt_path="", save_path="", sample_height=32, sample_width=48, sample_num_frames=5, min_hxw=1,
        train_fps=16, max_h_div_w_ratio=2, min_h_div_w_ratio=0.4,
    )  # fmt: skip
    report = FilterReport()
    kept = list(filter_records(read_entries(line), limits, report))
    assert [record["cap"] for record in kept] == [
        "moves to the left",
        ["one", "two"],
        "一个红色的圆",
        "d, of the table",
    ]
    assert report.dropped["too_short"] == 1  # the image


def test_a_caption_beside_the_clip_counts_before_a_table(folder, caplog):
    (folder / "in/deep/d.txt").write_text("beside")
    assert read_folder("videos").entries[-1]["cap"] == "beside"
    assert "1 clips have one caption beside them, which counts, and another in a table" in caplog.text


def test_a_link_that_leads_back_is_not_followed(folder):
    before = read_folder("videos")
    (folder / "in/round").symlink_to(folder)
    assert read_folder("videos") == before


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", b"caf\xe9", "none.txt, line 1: is not UTF-8; save it as UTF-8"),
        ("none.txt", "x".encode("utf-16"), "none.txt: is UTF-16; save it as UTF-8"),
        ("none.json", b"{", "none.json: not valid JSON"),
        ("none.json", b"[1]", "none.json: expected a caption or an object with the key cap"),
        ("in/metadata.jsonl", b"{}", "metadata.jsonl, line 1: expected an object with the key file_name"),
        ("metadata.csv", b"x,y\n1,2\n", "metadata.csv: no column is called path"),
    ],
)
def test_what_cannot_be_read_is_named(folder, name, content, expected):
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        read_folder("videos")
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named_and_the_rest_is_read(folder):
    before = read_folder("videos").entries
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "broken.txt").write_text("a picture")
    found = read_folder("videos")
    assert found.entries == before
    assert len(found.unreadable) == 1
    assert "broken.png: is no image that can be read" in found.unreadable[0]


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no video"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "absent")
