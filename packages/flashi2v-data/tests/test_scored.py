"""From videos through every signal and the filter's limits to a store that says what measured them."""

import json
from pathlib import Path

import lmdb
import numpy as np
import pytest

from flashi2v_data.cli import app
from flashi2v_data.curation.filter import filter_files
from flashi2v_data.shapes.films import draw_film, join_films
from flashi2v_data.store.reader import open_store
from flashi2v_data.video.write import write_video

for library in ("cv2", "scenedetect", "rapidocr", "onnxruntime"):
    pytest.importorskip(library)


def test_what_signals_measure_decides_what_is_stored_and_the_store_says_what_measured_it(
    tmp_path, monkeypatch, filter_config
):
    monkeypatch.chdir(tmp_path)
    fine = draw_film("motion", 4, 1, 25, 96, 160)
    joined, _ = join_films("motion", 7, 2, 96, 160, (20, 24))
    films = {"fine": fine, "cut": joined, "again": fine, "still": fine[:1].repeat(20, 0), "black": np.zeros_like(fine)}
    for name, frames in films.items():
        write_video(f"{name}.mp4", frames, 16, crf=28 if name == "again" else 16)
    Path("meta.json").write_text(json.dumps([{"path": f"{name}.mp4", "cap": name} for name in films]))
    arguments = [
        "score",
        "meta.json",
        "-o",
        "scored.json",
        "--signals",
        "motion,cuts,text,still,duplicates",
        "--jobs",
        "1",
    ]
    app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    limits = {"max_scene_cuts": 0, "max_stillness": 0.99, "max_black_share": 0.5, "drop_duplicates": True}
    config = filter_config(ann_txt_path="scored.txt", save_path="lmdb", too_long_factor=20, max_text_area=0.2, **limits)
    path, report = filter_files(config, jobs=1, probe_timeout=60)
    dropped = {reason: count for reason, count in report.dropped.items() if count}
    assert dropped == {"too_many_cuts": 1, "duplicate": 1, "too_still": 2}
    (record,) = open_store(path)
    assert record["cap"] == "fine"
    assert record["object_motion"] > 0.1
    assert record["scene_cuts"] == []
    assert record["is_duplicate"] is False
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        header = transaction.get(b"header")
    for told in (b"cv2 ", b"rapidocr ", b"scenedetect ", b"BSD-3-Clause"):
        assert told in header
