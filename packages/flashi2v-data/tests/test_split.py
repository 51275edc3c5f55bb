"""`flashi2v-data split`: long videos become clips within their scenes, of the lengths that are wanted."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashi2v_data.cli import app
from flashi2v_data.curation.filter import filter_files
from flashi2v_data.curation.split import Lengths, clips_of
from flashi2v_data.errors import InputError
from flashi2v_data.shapes.films import join_films
from flashi2v_data.store.reader import open_store
from flashi2v_data.video.decode import read_frames
from flashi2v_data.video.write import write_video

pytest.importorskip("scenedetect")

FPS = 16


def command(name: str, *arguments: object) -> None:
    app([name, *map(str, arguments)], exit_on_error=False, print_error=False, result_action="return_value")


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """Two videos of several scenes and what cannot be read, as a meta JSON; and the edges of their scenes."""
    directory, edges = tmp_path_factory.mktemp("films"), []
    for seed in (3, 4):
        frames, cuts = join_films("motion", seed, 6, 54, 96, (12, 70))
        write_video(directory / f"{seed}.mp4", frames, FPS, crf=23)
        edges.append([0, *cuts, len(frames)])
    (directory / "broken.mp4").write_bytes(b"no video")
    entries = [
        {"path": f"{name}.mp4", "cap": f"film {name}", "motion": 0.9, "text_area": 0.0} for name in (3, "broken", 4)
    ]
    (directory / "films.json").write_text(json.dumps(entries))
    return directory, edges


def parts(clips: list[dict], name: str) -> list[tuple[int, int]]:
    return [tuple(clip["cut"]) for clip in clips if clip["path"].endswith(f"{name}.mp4")]


def test_clips_lie_within_scenes_have_the_lengths_and_pass_the_filter(
    films, tmp_path, monkeypatch, filter_config, capsys
):
    monkeypatch.chdir(tmp_path)
    directory, edges = films
    command("split", directory / "films.json", "-o", "clips.json", "--min-seconds", 1, "--max-seconds", 2, "--jobs", 1)
    clips = json.loads(Path("clips.json").read_text())
    assert f"clips {len(clips)} unreadable 1" in " ".join(capsys.readouterr().out.split())
    for name, scenes in zip((3, 4), edges):
        found = parts(clips, name)
        for begin, end in found:
            assert FPS <= end - begin <= 2 * FPS
            assert any(
                first + (first > 0) <= begin and end <= last - (last < scenes[-1]) for first, last in pairwise(scenes)
            )
        # Of every scene that is long enough something is kept, and of long ones nearly all.
        for first, last in pairwise(scenes):
            kept = sum(end - begin for begin, end in found if first <= begin and end <= last)
            assert kept >= (last - first - 2 - FPS if last - first - 2 >= FPS else 0)
    assert {*clips[0]} == {"path", "cap", "cut", "num_frames"}, "nothing that was said of the whole"
    (failed,) = [json.loads(line) for line in Path("clips.failed.jsonl").read_text().splitlines()]
    assert failed["kind"] == "unreadable"
    config = filter_config(ann_txt_path="clips.txt", save_path="lmdb", sample_num_frames=13, min_hxw=100)
    path, report = filter_files(config, jobs=1, probe_timeout=60)
    assert report.kept == report.total == len(clips)
    assert [record["start_frame_idx"] for record in open_store(path)] == [clip["cut"][0] for clip in clips]


def test_only_the_cut_of_an_entry_is_split(films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory, edges = films
    first, second = edges[0][1:3]
    entry = {"path": str(directory / "3.mp4"), "cap": "a", "cut": [first - 5, second + 5]}
    Path("one.json").write_text(json.dumps([entry]))
    command("split", "one.json", "-o", "clips.json", "--min-seconds", 0.25, "--max-seconds", 60, "--margin", 0)
    assert [clip["cut"] for clip in json.loads(Path("clips.json").read_text())] == [
        [first - 5, first],
        [first, second],
        [second, second + 5],
    ]


def test_shards_and_processes_write_the_same_bytes(films, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta, lengths = "films.json", ("--min-seconds", 1, "--max-seconds", 3)
    names = (3, "broken", 4, 4)  # of two shards each has one that can be read
    Path(meta).write_text(json.dumps([{"path": str(films[0] / f"{name}.mp4"), "cap": "a"} for name in names]))
    command("split", meta, "-o", "two.json", *lengths, "--jobs", 2)
    for index in (1, 0):
        command("split", meta, "-o", "shards.json", *lengths, "--jobs", 1, "--shard", f"{index}/2")
    command("merge", "shards.json")
    for suffix in (".json", ".failed.jsonl", ".signals.json"):
        assert Path(f"two{suffix}").read_bytes() == Path(f"shards{suffix}").read_bytes()
    assert "scenedetect" in json.loads(Path("two.signals.json").read_text())["cuts"]["version"]
    assert not [name for name in os.listdir() if "ledger" in name]


def test_no_more_is_held_of_a_long_video_than_of_a_short_one(films):
    from flashi2v_data.signals import Clip
    from flashi2v_data.signals.cuts import TINY

    with Clip({"path": str(films[0] / "3.mp4")}) as clip:
        pictures = clip.pictures(TINY)
        assert next(pictures).shape == (27, 48, 3)
        assert not clip._decoded
        assert 1 + sum(1 for _ in pictures) == clip.num_frames


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 400)), min_size=1, max_size=8),
    st.sampled_from([8.0, 23.976, 25.0, 60.0]),
    st.floats(0.05, 5),
    st.floats(1, 6),
    st.integers(0, 3),
)
def test_lengths_are_kept_and_no_cut_is_within_a_clip(scenes, fps, min_seconds, factor, margin):
    """Scenes follow each other behind transitions of some frames."""
    transitions, place = [], 0
    for gap, length in scenes:
        if place:
            transitions.append((place, place + gap))
        place += gap * bool(place) + length
    lengths = Lengths(min_seconds, min_seconds * factor, margin)
    clips = clips_of(place, fps, transitions, lengths)
    ends, begins = [*(end for end, _ in transitions), place], [0, *(begin for _, begin in transitions)]
    taken = np.zeros(place, int)
    for begin, end in clips:
        assert min_seconds - 1e-3 <= (end - begin) / fps <= min_seconds * factor + 1e-3
        assert any(first <= begin and end <= last for first, last in zip(begins, ends))
        taken[begin:end] += 1
    assert taken.max(initial=0) <= 1
    assert clips == sorted(clips)


def test_a_long_scene_becomes_equal_parts_or_as_many_as_fit():
    assert clips_of(100, 10, [], Lengths(2, 4)) == [[0, 33], [33, 66], [66, 100]]
    assert clips_of(60, 10, [], Lengths(4, 5)) == [[0, 50]], "two parts of 3 seconds would be too short"
    assert clips_of(19, 10, [], Lengths(2, 4)) == []
    assert clips_of(60, 10, [(20, 25)], Lengths(1, 9, 2)) == [[0, 18], [27, 60]]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--min-seconds", 5, "--max-seconds", 2], "--min-seconds 5 and --max-seconds 2"),
        (["--min-seconds", 0], "give positive numbers"),
        (["--address", "a:1"], "--address is of a Ray cluster"),
    ],
)
def test_wrong_options_are_refused_before_any_work(films, tmp_path, arguments, fault):
    with pytest.raises(InputError, match=fault):
        command("split", films[0] / "films.json", "-o", tmp_path / "clips.json", *arguments)
    assert not [*tmp_path.iterdir()]


def test_clips_show_what_they_say(films, tmp_path, monkeypatch):
    """The frames at a clip's edges are those of one scene: the picture hardly changes from one to the next."""
    monkeypatch.chdir(tmp_path)
    command("split", films[0] / "films.json", "-o", "clips.json", "--min-seconds", 1, "--max-seconds", 9)
    for clip in json.loads(Path("clips.json").read_text()):
        frames = read_frames(clip["path"], range(*clip["cut"])).astype(int)
        assert np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)).max() < 12
