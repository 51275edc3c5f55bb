"""`flashi2v-data page`: what a filter drops, to look at."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashi2v_data.cli import app
from flashi2v_data.curation.filter import count_files
from flashi2v_data.curation.page import write_page
from flashi2v_data.errors import InputError
from flashi2v_data.video.decode import read_frames


class Reader(HTMLParser):
    """Notes what a page would fetch, its pictures, and its text under each heading."""

    def __init__(self) -> None:
        super().__init__()
        self.sources, self.tags, self.sections = [], set(), {"": ""}
        self._at = ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "h2":
            self._at = dict(attributes).get("id") or "failed"
            self.sections[self._at] = ""

    def handle_data(self, data):
        self.sections[self._at] += data


@pytest.fixture
def config(shapes, tmp_path, monkeypatch, filter_config):
    monkeypatch.chdir(tmp_path)
    entries = json.loads((shapes / "videos.json").read_text())
    for entry in entries:
        entry["path"] = str(shapes / entry["path"])
    entries[0] = {**entries[0], "text_area": 0.4, "cap": "<script>alert(1)</script>"}
    entries[1] = {**entries[1], "text_area": 0.3, "cut": [4, 13], "num_frames": 9}
    entries[2] = {"path": "nowhere.mp4", "cap": "a"}
    entries[3] = {"path": entries[3]["path"]}
    entries[4] = "no entry"
    entries[5] = {**entries[5], "cut": [99, 120], "num_frames": 1}
    for entry in entries[6:]:
        entry["text_area"] = 0
    Path("meta.json").write_text(json.dumps(entries))
    Path("meta.txt").write_text(",meta.json\n")
    fault = {"kind": "hung", "reason": "no answer within 5 seconds", "entry": {"path": "slow & dull.mp4"}}
    Path("meta.failed.jsonl").write_text(json.dumps(fault) + "\n")
    return filter_config(ann_txt_path="meta.txt", max_text_area=0.1)


def read(path: str = "page.html") -> Reader:
    reader = Reader()
    reader.feed(Path(path).read_text())
    return reader


def test_the_page_shows_what_the_filter_counts_and_fetches_nothing(config):
    found = write_page(config, Path("page.html"), num_examples=3, most_entries=None, jobs=1, timeout=60)
    report = count_files(config, jobs=1, probe_timeout=60)
    assert {reason: count for reason, count in found.counts.items() if reason != "kept"} == {
        reason: count for reason, count in report.dropped.items() if count
    }
    assert found.counts["kept"] == report.kept
    page = read()
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert not page.tags & {"script", "link", "iframe"}
    assert "url(" not in Path("page.html").read_text()
    assert "<script>alert(1)</script>" in page.sections["too_much_text"], "shown as text"
    assert "text_area" in page.sections["too_much_text"]
    assert "No such file" in page.sections["unreadable"]
    assert "no entry" in page.sections["invalid_entry"]
    assert "slow & dull.mp4" in page.sections["failed"]
    assert "no answer within 5 seconds" in page.sections["failed"]
    # Two of the dropped for text, one without caption, and three of those that are kept.
    assert len([source for source in page.sources if source.startswith("data:")]) == 6


def test_pictures_are_the_clips_first_middle_and_last_frame(config, shapes):
    write_page(config, Path("page.html"), num_examples=3, most_entries=2, jobs=1, timeout=60)
    second = read().sources[-1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(second.partition(",")[2])))).astype(int)
    frames = read_frames(sorted(shapes.rglob("*.mp4"))[1], [4, 8, 12])
    assert np.abs(picture - np.concatenate([*frames], axis=1)).mean() < 6
    assert "others were not judged" in Path("page.html").read_text()


def test_the_command_writes_it(config, capsys):
    settings = {key: value for key, value in config.model_dump().items() if value is not None}
    Path("filter.yaml").write_text(json.dumps(settings))
    arguments = ["page", "--filter_config", "filter.yaml", "-o", "page.html", "--examples", "1", "--jobs", "1"]
    app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    assert re.fullmatch(r"12 clips judged, written to page.html\n", capsys.readouterr().out)
    assert len([source for source in read().sources if source.startswith("data:")]) == 3
    with pytest.raises(InputError, match=r"a page ends in \.html"):
        write_page(config, Path("page.pdf"), num_examples=1, most_entries=None, jobs=1, timeout=60)
