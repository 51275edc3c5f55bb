import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import forked
import lmdb
import pytest

from flashi2v_data.curation.inspection import _edges
from flashi2v_data.store.reader import open_store, write_store

FILTER = """\
ann_txt_path: shapes/videos.txt # as the reference's file
save_path: lmdb
sample_height: 32
sample_width: 48
sample_num_frames: 5
min_hxw: 1000
train_fps: 16
max_h_div_w_ratio: 1.2
min_h_div_w_ratio: 0.4
"""


def _run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run("flashi2v-data", *arguments, cwd=directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory in which shapes were written and filtered by the commands."""
    place = tmp_path_factory.mktemp("cli")
    made = _run(place, "shapes", "shapes", "--num", "6", "--seed", "5", "--size", "32x48", "--frames", "7")
    assert (made.returncode, made.stderr) == (0, "")
    (place / "filter.yaml").write_text(FILTER)
    meta = place / "shapes" / "videos.json"
    entries = json.loads(meta.read_text())
    entries[1]["fps"] = None
    entries[2]["path"] = "videos/missing.mp4"
    del entries[3]["num_frames"]
    entries.append({"path": "videos/also-missing.mp4", "cap": "a cap"})
    meta.write_text(json.dumps(entries))
    filtered = _run(place, "filter", "--filter_config", "filter.yaml", "--jobs", "2")
    assert (filtered.returncode, filtered.stderr) == (0, "")
    assert "written to lmdb/filtered_samples_5.lmdb" in filtered.stdout
    return place


def test_filter_writes_the_store_and_its_reports(place):
    assert sorted(path.name for path in (place / "lmdb").iterdir()) == [
        "filtered_samples_5.lmdb",
        "probe_cache",
        "report.json",
        "report.txt",
    ]
    report = json.loads((place / "lmdb" / "report.json").read_text())
    assert (report["total"], report["kept"]) == (7, 5)
    assert {key: count for key, count in report["dropped"].items() if count} == {"no_fps": 1, "unreadable": 1}
    assert "no_fps                     1  fps is not a positive number" in (place / "lmdb/report.txt").read_text()
    store = open_store(place / "lmdb")
    assert len(store) == 5
    assert store[2]["num_frames"] == 7
    assert store.config["train_fps"] == 16


def test_filter_never_mixes_two_results_in_one_folder(place):
    again = _run(place, "filter", "--filter-config", "filter.yaml")
    assert again.returncode == 2
    assert again.stderr.startswith("flashi2v-data: save_path holds lmdb/filtered_samples_5.lmdb already")


def test_inspect_counts_and_shows(place):
    result = _run(place, "inspect", "lmdb", "--open-videos")
    assert (result.returncode, result.stderr) == (0, "")
    for expected in (
        "records    5\n",
        "setting    train_fps: 16.0\n",
        "filtered   5 of 7 clips were kept\n",
        "resolution        32x48          5  ########################################\n",
        "fps                16.0          5  ###",
        "frames                7          5  ###",
        "missing    1 clip\n",
        "missing.mp4\n",
    ):
        assert expected in result.stdout
    assert result.stdout.count("example ") == 3


def test_inspect_reports_videos_that_cannot_be_opened(place):
    path = place / "shapes/videos/000000.mp4"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"no video")
        opened, looked = _run(place, "inspect", "lmdb", "--open-videos"), _run(place, "inspect", "lmdb")
    finally:
        path.write_bytes(whole)
    assert f"unreadable 1 clip\n           {path}: Invalid data" in opened.stdout
    assert "unreadable" not in looked.stdout


def test_inspect_reports_videos_that_are_not_what_their_records_say(place, tmp_path):
    record = {**open_store(place / "lmdb")[0], "num_frames": 8, "start_frame_idx": 0}
    write_store(tmp_path / "a.lmdb", [record, {**record, "num_frames": 7, "fps": 24}, {**record, "num_frames": 7}], {})
    result = _run(place, "inspect", str(tmp_path / "a.lmdb"), "--open-videos")
    assert result.returncode == 0
    assert f"wrong      2 clips\n           {record['path']}: the video is 48x32, 16 fps, 7 frames" in result.stdout


def test_inspect_reads_stores_of_the_public_code(place, tmp_path):
    with lmdb.open(str(tmp_path / "a.lmdb")) as environment, environment.begin(write=True) as transaction:
        for number in range(30):
            record = {"path": f"/{number}.mp4", "cap": "a b", "num_frames": 40 + number}
            transaction.put(b"%012d" % number, pickle.dumps(record))
    result = _run(place, "inspect", str(tmp_path / "a.lmdb"))
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert "a.lmdb: no checksums, so damage to a value may go unnoticed; filter again to have them" in result.stderr
    for expected in (
        "records    30\n",
        "setting    none: written by the public code\n",
        "resolution     not said         30  ###",
        "frames            40-43          4  ###",
        "missing    30 clips\n           /0.mp4\n",
        "           /2.mp4\n           ...; --open-videos lists all\n",
    ):
        assert expected in result.stdout
    opened = _run(place, "inspect", str(tmp_path / "a.lmdb"), "--open-videos")
    assert opened.stdout.split("missing    30 clips\n")[1].split() == [f"/{number}.mp4" for number in range(30)]


def test_inspect_counts_and_names_records_that_are_no_clips(tmp_path):
    changes = [{"cap": None}, {"resolution": [32, 48]}, {}, {"fps": float("inf")}, {"num_frames": "7"}]
    with lmdb.open(str(tmp_path / "a.lmdb")) as environment, environment.begin(write=True) as transaction:
        for number, change in enumerate(changes):
            record = {"path": "/a.mp4", "cap": "a b", "num_frames": 40} | change
            transaction.put(b"%012d" % number, pickle.dumps(record))
        transaction.put(b"%012d" % 5, pickle.dumps({"path": "/a.mp4", "num_frames": 40}))
    result = _run(tmp_path, "inspect", "a.lmdb")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    at = lines.index("at fault   5 clips")
    fault = "           a.lmdb: record {} is not a clip that can be trained on: "
    assert [line[: len(fault) - 1] for line in lines[at + 1 : at + 4]] == [fault.format(number) for number in (0, 1, 3)]
    assert "got `null` - at `$.cap`" in lines[at + 1]
    assert lines[at + 4 :] == ["           ...; --open-videos lists all", "missing    1 clip", "           /a.mp4"]
    assert "a.lmdb: no checksums, so damage to a value may go unnoticed" in result.stderr


def test_inspect_lists_a_missing_video_of_many_clips_once(place, tmp_path):
    record = {**open_store(place / "lmdb")[0], "path": "/gone.mp4"}
    write_store(tmp_path / "a.lmdb", [record] * 5, {})
    result = _run(place, "inspect", str(tmp_path / "a.lmdb"), "--open-videos")
    assert result.stdout.endswith("missing    5 clips\n           /gone.mp4\n")


@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_filter_warns_when_nothing_was_kept(place, tmp_path, arguments):
    settings = FILTER.replace("save_path: lmdb", f"save_path: {tmp_path / 'lmdb'}").replace(
        "min_hxw: 1000", "min_hxw: 9999"
    )
    (tmp_path / "filter.yaml").write_text(settings)
    result = _run(place, "filter", "--filter_config", str(tmp_path / "filter.yaml"), *arguments)
    assert result.returncode == 0
    assert result.stderr == "WARNING none of 7 clips were kept: the report says which limits dropped them\n"


def test_inspect_stops_at_its_limit_and_plots(place):
    result = _run(place, "inspect", "lmdb/filtered_samples_5.lmdb", "--limit", "2", "--plots", "plots")
    assert result.returncode == 0
    assert "records    5, looked at the first 2\n" in result.stdout
    assert "resolution        32x48          2  ###" in result.stdout
    names = {path.name for path in (place / "plots").iterdir()}
    assert names == {"fps.png", "num_frames.png", "resolution.png", "caption_words.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (place / "plots").iterdir())


def test_plots_without_matplotlib_say_how_to_install_it(place):
    program = "import sys; sys.modules['matplotlib'] = None; from flashi2v_data.cli import main; main()"
    command = [sys.executable, "-c", program, "inspect", "lmdb", "--plots", "elsewhere"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "pip install 'flashi2v-data[plots]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["filter"], "--filter_config"),
        (["filter", "--filter_config", "nothing.yaml"], "nothing.yaml: no such file"),
        (["filter", "--filter_config", "filter.yaml", "--jobs", "0"], "--jobs"),
        (["filter", "--filter_config", "shapes/videos.txt"], "shapes/videos.txt: must hold settings"),
        (["inspect", "nowhere"], "nowhere: no such LMDB"),
        (["inspect", "shapes"], "shapes: neither an LMDB nor a folder"),
        (["filter", "--filter_config", "filter.yaml", "--explain", "no.mp4"], "no entry has the path no.mp4"),
        (["filter", "--filter_config", "filter.yaml", "--probe-timeout", "0"], "--probe-timeout"),
        (["filter", "--filter_config", "filter.yaml", "--explain", "a", "--resume"], "--explain writes nothing: leave"),
        (["filter", "--filter_config", "filter.yaml", "--explain", "a", "--plots"], "leave out --plots"),
        (["filter", "--filter_config", "filter.yaml", "--explain", "a", "--dry-run"], "leave out --dry-run"),
        (["filter", "--filter_config", "filter.yaml", "--dry-run", "--resume", "--plots"], "out --resume and --plots"),
        (["inspect", "lmdb", "--jobs", "2"], "without --open-videos no video is opened: leave out --jobs"),
        (["inspect", "lmdb", "--probe-timeout", "2"], "leave out --probe-timeout"),
        (["inspect", "lmdb", "--plots", "filter.yaml"], "--plots: cannot write below"),
        (["shapes", "/proc/x"], "/proc/x: cannot be made"),
        (["shapes", "filter.yaml/x"], "filter.yaml/x: cannot be made"),
        (["shapes", "shapes"], "exists: name a new directory"),
        (["shapes", "new", "--size", "64"], "--size: expected HEIGHTxWIDTH"),
        (["shapes", "new", "--sise", "64x64"], "Unknown option"),
        (["select"], "Unknown command"),
    ],
)
def test_bad_input_exits_2_with_one_line(place, arguments, expected):
    before = sorted(path.name for path in place.iterdir())
    result = _run(place, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("flashi2v-data: ")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize("command", ["filter", "inspect", "shapes"])
def test_help_has_an_example(tmp_path, command):
    result = _run(tmp_path, command, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"Example: flashi2v-data {command}" in result.stdout


@pytest.mark.parametrize("values", [[3], [3, 9], [0, 1000], [17, 17 + 81]])
def test_plotted_bins_of_whole_numbers_are_equally_wide_and_hold_every_value(values):
    edges = _edges(values)
    assert len(edges) <= 41
    assert {edge % 1 for edge in edges} == {0.5}
    assert len({high - low for low, high in itertools.pairwise(edges)}) == 1
    assert edges[0] < min(values) <= max(values) < edges[-1]
